"""Attention as one ONNX node (opset 23) beside the operators that it is made of (opset 18), to choose for each target.

    ONNX Runtime    a UNet like SD1.5's, narrower, on this machine's CPU, both forms in alternating rounds
    TensorRT-RTX    attention as the families have it: which forms are built, and the memory that they need. No GPU: no
                    times

The tables go to build/bench/attention.md, with --write-docs into docs/export.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from diffuserve.engine_files import read_facts
from diffuserve.manifest import TensorShape
from diffuserve.profiles import Profile, Range
from diffuserve_export.engines import EngineRequest, engine_from_onnx
from diffuserve_export.engines.build import EngineError
from diffuserve_export.engines.device import builder_version
from diffuserve_export.engines.options import TENSORRT_RTX
from diffuserve_export.modules import UNet
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.options import DECOMPOSED_ATTENTION, WHOLE_ATTENTION
from diffuserve_export.ports import DATATYPES, Ports
from diffuserve_export.precision import DTYPES
from diffuserve_export.verify import open_graph
from measure.tables import table
from simulator.report import write_section

ROOT: Final = Path(__file__).resolve().parents[1]
OPSETS: Final = (DECOMPOSED_ATTENTION, WHOLE_ATTENTION)
ROWS: Final = 2
SIDES: Final = (16, 32, 64)
ROUNDS: Final = 5
TEXT_WIDTH: Final = 768
# SD1.5's, 0.4 times as wide.
UNET: Final = {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": 8}


@dataclass(frozen=True)
class Case:
    """Self-attention where it is: as many heads, of that width, over as many tokens at most."""

    where: str
    heads: int
    width: int
    tokens: int
    rows: int


CASES: Final = (
    Case("SD1.5, 512 x 512, 64 x 64 latents", 8, 40, 4096, 64),
    Case("SD1.5, 32 x 32", 8, 80, 1024, 64),
    Case("SD1.5, 16 x 16", 8, 160, 256, 64),
    Case("SDXL, 1024 x 1024, 64 x 64", 10, 64, 4096, 16),
    Case("autoencoder, 512 x 512", 1, 512, 4096, 4),
)


class Attention(nn.Module):
    """`query`, `key` and `value` [rows, heads, tokens, width] -> `output`, the same."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def unet_graphs(folder: Path) -> list[Path]:
    """The same UNet in each form."""
    torch.manual_seed(0)
    module = UNet(UNet2DConditionModel(**UNET)).eval().requires_grad_(False)
    sample = TensorShape("sample", "FP32", ("rows", 4, "latent_height", "latent_width"))
    timestep = TensorShape("timestep", "FP32", ("rows",))
    text = TensorShape("encoder_hidden_states", "FP32", ("rows", "tokens", TEXT_WIDTH))
    output = TensorShape("model_output", "FP32", sample.shape)
    example = (torch.randn(3, 4, 32, 48), torch.rand(3) * 999, torch.randn(3, 154, TEXT_WIDTH))
    ports: Ports = ((sample, timestep, text), (output,))
    return [onnx_from_component(module, ports, example, folder / f"unet_{opset}.onnx", opset) for opset in OPSETS]


def onnxruntime_table(folder: Path, rounds: int) -> str:
    """Seconds of a call, by size, with both forms called in turns."""
    sessions = [open_graph(path, optimized=True) for path in unet_graphs(folder)]
    rows = []
    for side in SIDES:
        feeds = unet_feeds(side)
        first = [session.run(None, feeds)[0] for session in sessions]
        error = float(np.abs(first[0] - first[1]).max() / np.abs(first[0]).max())
        seconds: list[list[float]] = [[] for _ in sessions]
        for _ in range(rounds):
            for times, session in zip(seconds, sessions, strict=True):
                times.append(timed(session, feeds))
        parts, whole = (statistics.median(times) for times in seconds)
        rows.append((f"{side} x {side}", f"{parts:.3f}", f"{whole:.3f}", f"{parts / whole:.2f}", f"{error:.0e}"))
    heads = ("latents", "operators (opset 18), s", "one node (opset 23), s", "ratio", "relative difference")
    return table(heads, rows)


def unet_feeds(side: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    random = np.random.default_rng(side)
    return {
        "sample": random.standard_normal((ROWS, 4, side, side), dtype=np.float32),
        "timestep": np.array([721.5, 20.0], dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((ROWS, 77, TEXT_WIDTH), dtype=np.float32),
    }


def timed(
    session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]
) -> float:
    started = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - started


def tensorrt_table(folder: Path) -> str:
    """What each form comes to in TensorRT-RTX, beside the memory that all scores would take."""
    rows = []
    for case in CASES:
        for precision in ("fp16", "bf16", "fp32"):
            built = [built_attention(folder, case, precision, opset) for opset in OPSETS]
            scores = case.rows * case.heads * case.tokens**2 * DTYPES[precision].itemsize
            rows.append((case.where, str(case.width), precision, f"{scores / 1e6:.0f}", *built))
            print(" | ".join(rows[-1]), flush=True)
    heads = ("attention", "head", "precision", "scores, MB", "operators (opset 18), MB", "one node (opset 23), MB")
    return table(heads, rows)


def built_attention(folder: Path, case: Case, precision: str, opset: int) -> str:
    """The activation memory of an engine in MB, or why there is none."""
    shape = ("rows", case.heads, "tokens", case.width)
    inputs = tuple(TensorShape(name, DATATYPES[precision], shape) for name in ("query", "key", "value"))
    ports: Ports = (inputs, (TensorShape("output", DATATYPES[precision], shape),))
    example = [torch.randn(3, case.heads, 128, case.width, dtype=DTYPES[precision]) for _ in inputs]
    graph = onnx_from_component(Attention(), ports, example, folder / f"attention_{opset}.onnx", opset)
    sides = {"rows": Range(1, min(8, case.rows), case.rows), "tokens": Range(64, case.tokens, case.tokens)}
    request = EngineRequest(
        target=TENSORRT_RTX,
        version=builder_version(TENSORRT_RTX),
        precision=precision,
        inputs=inputs,
        profiles=(Profile(sides),),
        capabilities=("8.9",),
        device="any",
    )
    try:
        built = engine_from_onnx(graph, request, folder / "engines", print)
    except EngineError as error:
        print(f"{case.where}, {precision}, opset {opset}: {error}", flush=True)
        return "refused"
    return f"{read_facts(built).profiles[0].activation_bytes / 1e6:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="calls of each form in ONNX Runtime")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/export.md")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        texts = {
            "attention in TensorRT-RTX": tensorrt_table(Path(name)),
            "attention in ONNX Runtime": onnxruntime_table(Path(name), given.rounds),
        }
    out = ROOT / "build" / "bench" / "attention.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(f"## {name}\n\n{text}" for name, text in texts.items()) + "\n", encoding="utf-8")
    for name, text in texts.items():
        print(f"\n{name}\n\n{text}")
        if given.write_docs:
            write_section(name, text, ROOT / "docs" / "export.md", by="bench/attention.py")


if __name__ == "__main__":
    main()
