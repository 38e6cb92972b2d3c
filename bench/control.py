"""What a ControlNet that is built in costs: UNets with one beside the same ones without, in ONNX Runtime on a CPU.

Calls of one size are made in turns, each of the graph with the ControlNet beside one of the plain graph:

    none   no row has a control: the scales are zeros, and so are the pictures
    all    every row has a control

The table goes to build/bench/control.md, with --write-docs into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import ControlNetModel

from diffuserve.manifest import TensorShape
from diffuserve.spec import CONTROL, CONTROL_SCALE
from diffuserve_export.modules import UNet
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.options import WHOLE_ATTENTION
from diffuserve_export.verify import open_graph
from measure.tables import table
from measure.unets import CHECKPOINTS, Case, Feeds, check_same, example_of, in_turns, ports_of
from simulator.report import write_section

ROOT: Final = Path(__file__).resolve().parents[1]
ROUNDS: Final = 9
KINDS: Final = ("none", "all")
CASES: Final = (Case("shapes", 8, (1, 4, 16, 64)), Case("SD1.5, 0.4 as wide", 32, (1, 2, 4)))


def controlnet_for(case: Case, module: UNet) -> ControlNetModel:
    """The shapes checkpoint's own; for others one of the usual size, whose weights are random."""
    if case.is_shapes:
        made = ControlNetModel.from_pretrained(CHECKPOINTS / "shapes-control", torch_dtype=torch.float32)
    else:
        made = ControlNetModel.from_unet(module.model)
    controlnet: ControlNetModel = made.eval().requires_grad_(False)
    return controlnet


def graphs(case: Case, folder: Path) -> tuple[Path, Path]:
    """The plain graph, and the one with a ControlNet."""
    module = case.module()
    (inputs, outputs), example = ports_of(module), example_of(module)
    plain = onnx_from_component(module, (inputs, outputs), example, folder / "plain.onnx", WHOLE_ATTENTION)
    controlled = UNet(module.model, controlnet_for(case, module)).eval()
    control = TensorShape(CONTROL, "FP32", ("rows", 3, "height", "width"))
    ports = (*inputs, control, TensorShape(CONTROL_SCALE, "FP32", ("rows",))), outputs
    example += [torch.rand(3, 3, 128, 192), torch.rand(3)]
    return plain, onnx_from_component(controlled, ports, example, folder / "control.onnx", WHOLE_ATTENTION)


def controls(kind: str, case: Case, rows: int) -> Feeds:
    shape = (rows, 3, 8 * case.side, 8 * case.side)
    if kind == "none":
        return {CONTROL: np.zeros(shape, np.float32), CONTROL_SCALE: np.zeros(rows, np.float32)}
    pictures = np.random.default_rng(rows).random(shape, dtype=np.float32)
    return {CONTROL: pictures, CONTROL_SCALE: np.ones(rows, np.float32)}


def lines(case: Case, rounds: int) -> list[tuple[str, ...]]:
    """The table's lines for a case."""
    with tempfile.TemporaryDirectory() as folder:
        plain, controlled = (open_graph(path, optimized=True) for path in graphs(case, Path(folder)))
    width = int(plain.get_inputs()[2].shape[2])
    found = []
    for rows in case.rows:
        feeds = case.feeds(width, rows)
        given = {kind: {**feeds, **controls(kind, case, rows)} for kind in KINDS}
        check_same(plain, controlled, feeds, given["none"])
        milliseconds, ratios = in_turns(plain, controlled, feeds, given, rounds)
        found.append((f"{case.name}, {case.side} x {case.side}", str(rows), milliseconds, *ratios))
        print(*found[-1], sep="  ", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="the start of a case's name")
    parser.add_argument("--write-docs", action="store_true", help="the table into docs/benchmarks.md")
    chosen = parser.parse_args(arguments)
    rows = [line for case in CASES if case.name.startswith(chosen.only) for line in lines(case, chosen.rounds)]
    text = table(("UNet", "rows", "plain, ms", *(f"{kind}, times" for kind in KINDS)), rows)
    out = ROOT / "build" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "control.md").write_text(text, encoding="utf-8")
    if chosen.write_docs:
        write_section("a ControlNet built in", text, ROOT / "docs" / "benchmarks.md", by="bench/control.py")


if __name__ == "__main__":
    main()
