"""What LoRA as an input costs: UNets that take adapters beside the same ones without, in ONNX Runtime on a CPU.

Calls of one size are made in turns, each of the LoRA graph beside one of the plain graph:

    none         no row has an adapter: `lora` holds the zeros of adapter 0 alone
    one          all rows have the same adapter
    one a row    every row has an adapter of its own

The table goes to build/bench/lora.md, with --write-docs into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve_export.lora import add_lora, lora_layout
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.options import WHOLE_ATTENTION
from diffuserve_export.ports import with_lora
from diffuserve_export.verify import open_graph
from measure.tables import table
from measure.unets import Case, Feeds, check_same, example_of, in_turns, ports_of
from simulator.report import write_section

ROOT: Final = Path(__file__).resolve().parents[1]
ROUNDS: Final = 9
KINDS: Final = ("none", "one", "one a row")
#: With the ranks of their adapters.
CASES: Final = ((Case("shapes", 8, (1, 4, 16, 64)), 8), (Case("SD1.5, 0.4 as wide", 32, (1, 2, 4)), 16))


def graphs(case: Case, rank: int, folder: Path) -> tuple[Path, Path, int]:
    """The plain graph, the one with adapters, and the length of an adapter."""
    module = case.module()
    ports, example = ports_of(module), example_of(module)
    plain = onnx_from_component(module, ports, example, folder / "plain.onnx", WHOLE_ATTENTION)
    layout = lora_layout(module, rank, max(case.rows), 4)
    add_lora(module, layout)
    example += [torch.randn(4, layout.size), torch.arange(3)]
    path = folder / "lora.onnx"
    return (
        plain,
        onnx_from_component(module, with_lora(ports, layout.size), example, path, WHOLE_ATTENTION),
        layout.size,
    )


def adapters(kind: str, rows: int, size: int) -> Feeds:
    count = {"none": 1, "one": 2, "one a row": rows + 1}[kind]
    lora = np.random.default_rng(count).standard_normal((count, size), dtype=np.float32) * np.float32(0.02)
    lora[0] = 0
    index = np.arange(1, rows + 1) if kind == "one a row" else np.full(rows, count - 1)
    return {LORA: lora, LORA_INDEX: index.astype(np.int64)}


def lines(case: Case, rank: int, rounds: int) -> list[tuple[str, ...]]:
    """The table's lines for a case."""
    with tempfile.TemporaryDirectory() as folder:
        plain_path, lora_path, size = graphs(case, rank, Path(folder))
        plain, lora = open_graph(plain_path, optimized=True), open_graph(lora_path, optimized=True)
    width = int(plain.get_inputs()[2].shape[2])
    found = []
    for rows in case.rows:
        feeds = case.feeds(width, rows)
        given = {kind: {**feeds, **adapters(kind, rows, size)} for kind in KINDS}
        check_same(plain, lora, feeds, given["none"])
        milliseconds, ratios = in_turns(plain, lora, feeds, given, rounds)
        found.append(
            (f"{case.name}, rank {rank}, {case.side} x {case.side}", str(rows), milliseconds, *ratios),
        )
        print(*found[-1], sep="  ", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="the start of a case's name")
    parser.add_argument("--write-docs", action="store_true", help="the table into docs/benchmarks.md")
    chosen = parser.parse_args(arguments)
    cases = [one for one in CASES if one[0].name.startswith(chosen.only)]
    rows = [line for case, rank in cases for line in lines(case, rank, chosen.rounds)]
    heads = ("UNet", "rows", "plain, ms", *(f"{kind}, times" for kind in KINDS))
    text = table(heads, rows)
    out = ROOT / "build" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "lora.md").write_text(text, encoding="utf-8")
    if chosen.write_docs:
        write_section("LoRA as an input", text, ROOT / "docs" / "benchmarks.md", by="bench/lora.py")


if __name__ == "__main__":
    main()
