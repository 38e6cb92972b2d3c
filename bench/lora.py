"""What LoRA as an input costs: UNets that take adapters beside the same ones without, in ONNX Runtime on a CPU.

Calls of one size are made in turns, each of the LoRA graph beside one of the plain graph:

    none         no row has an adapter: `lora` holds the zeros of adapter 0 alone
    one          all rows have the same adapter
    one a row    every row has an adapter of its own

The table goes to build/bench/lora.md, with --write-docs into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve.manifest import TensorShape
from diffuserve.spec import UNET
from diffuserve_export.lora import add_lora, lora_layout
from diffuserve_export.modules import UNet, module_of
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.options import WHOLE_ATTENTION
from diffuserve_export.ports import Ports, with_lora
from diffuserve_export.sources import open_checkpoint
from diffuserve_export.verify import open_graph
from measure.tables import table
from simulator.report import write_section

ROOT: Final = Path(__file__).resolve().parents[1]
ROUNDS: Final = 9
#: Beyond what no adapter may change of a plain graph's output, relative to its largest value.
SAME: Final = 1e-4
KINDS: Final = ("none", "one", "one a row")
# SD1.5's, 0.4 times as wide.
NARROW: Final = {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 768, "attention_head_dim": 8}


@dataclass(frozen=True)
class Case:
    """A UNet, the rank of its adapters, and the calls that are made: latents of one side, several row counts."""

    name: str
    rank: int
    side: int
    rows: tuple[int, ...]

    def module(self) -> UNet:
        if self.name == "shapes":
            module = module_of(open_checkpoint(ROOT / "checkpoints" / "shapes"), UNET)
            assert isinstance(module, UNet)
            return module
        torch.manual_seed(0)
        return UNet(UNet2DConditionModel(**NARROW)).eval().requires_grad_(False)


CASES: Final = (
    Case("shapes", 8, 8, (1, 4, 16, 64)),
    Case("SD1.5, 0.4 as wide", 16, 32, (1, 2, 4)),
)
Feeds = dict[str, np.ndarray[Any, Any]]


def graphs(case: Case, folder: Path) -> tuple[Path, Path, int]:
    """The plain graph, the one with adapters, and the length of an adapter."""
    module = case.module()
    width = int(module.model.config.cross_attention_dim)
    sample = TensorShape("sample", "FP32", ("rows", 4, "latent_height", "latent_width"))
    text = TensorShape("encoder_hidden_states", "FP32", ("rows", "tokens", width))
    output = TensorShape("model_output", "FP32", sample.shape)
    ports: Ports = ((sample, TensorShape("timestep", "FP32", ("rows",)), text), (output,))
    example = [torch.randn(3, 4, 16, 24), torch.rand(3) * 999, torch.randn(3, 154, width)]
    plain = onnx_from_component(module, ports, example, folder / "plain.onnx", WHOLE_ATTENTION)
    layout = lora_layout(module, case.rank, max(case.rows), 4)
    add_lora(module, layout)
    example += [torch.randn(4, layout.size), torch.arange(3)]
    path = folder / "lora.onnx"
    return (
        plain,
        onnx_from_component(module, with_lora(ports, layout.size), example, path, WHOLE_ATTENTION),
        layout.size,
    )


def feeds(case: Case, width: int, rows: int) -> Feeds:
    random = np.random.default_rng(rows)
    return {
        "sample": random.standard_normal((rows, 4, case.side, case.side), dtype=np.float32),
        "timestep": np.linspace(999, 1, rows, dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, width), dtype=np.float32),
    }


def adapters(kind: str, rows: int, size: int) -> Feeds:
    count = {"none": 1, "one": 2, "one a row": rows + 1}[kind]
    lora = np.random.default_rng(count).standard_normal((count, size), dtype=np.float32) * np.float32(0.02)
    lora[0] = 0
    index = np.arange(1, rows + 1) if kind == "one a row" else np.full(rows, count - 1)
    return {LORA: lora, LORA_INDEX: index.astype(np.int64)}


def lines(case: Case, rounds: int) -> list[tuple[str, ...]]:
    """The table's lines for a case: medians, and the median of the ratios of calls that were made in turns."""
    with tempfile.TemporaryDirectory() as folder:
        plain_path, lora_path, size = graphs(case, Path(folder))
        plain, lora = open_graph(plain_path, optimized=True), open_graph(lora_path, optimized=True)
    width = int(plain.get_inputs()[2].shape[2])
    found = []
    for rows in case.rows:
        plain_feeds = feeds(case, width, rows)
        given = {kind: {**plain_feeds, **adapters(kind, rows, size)} for kind in KINDS}
        check_same(plain, lora, plain_feeds, given["none"])
        seconds = dict[str, list[float]]((kind, []) for kind in ("plain", *KINDS))
        ratios = dict[str, list[float]]((kind, []) for kind in KINDS)
        for _ in range(rounds):
            for kind in KINDS:
                before, after = timed(plain, plain_feeds), timed(lora, given[kind])
                seconds["plain"].append(before)
                seconds[kind].append(after)
                ratios[kind].append(after / before)
        name = f"{case.name}, rank {case.rank}, {case.side} x {case.side}"
        milliseconds = f"{statistics.median(seconds['plain']) * 1000:.1f}"
        found.append((name, str(rows), milliseconds, *(f"{statistics.median(ratios[kind]):.2f}" for kind in KINDS)))
        print(*found[-1], sep="  ", flush=True)
    return found


def check_same(plain: Any, lora: Any, plain_feeds: Feeds, lora_feeds: Feeds) -> None:
    """Rows without an adapter are the plain graph's. Raises RuntimeError where they are not."""
    want, got = plain.run(None, plain_feeds)[0], lora.run(None, lora_feeds)[0]
    error = float(np.abs(want - got).max() / np.abs(want).max())
    if not error < SAME:
        raise RuntimeError(f"without adapters, the LoRA graph is off by {error:.1e}, and {SAME:.0e} is allowed")


def timed(session: Any, feed: Feeds) -> float:
    start = time.perf_counter()
    session.run(None, feed)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="the start of a case's name")
    parser.add_argument("--write-docs", action="store_true", help="the table into docs/benchmarks.md")
    chosen = parser.parse_args(arguments)
    rows = [line for case in CASES if case.name.startswith(chosen.only) for line in lines(case, chosen.rounds)]
    heads = ("UNet", "rows", "plain, ms", *(f"{kind}, times" for kind in KINDS))
    text = table(heads, rows)
    out = ROOT / "build" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "lora.md").write_text(text, encoding="utf-8")
    if chosen.write_docs:
        write_section("LoRA as an input", text, ROOT / "docs" / "benchmarks.md", by="bench/lora.py")


if __name__ == "__main__":
    main()
