"""UNets with something built in beside the same ones without: the graphs' calls, made in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from diffuserve.manifest import TensorShape
from diffuserve.spec import UNET
from diffuserve_export.modules import UNet, module_of
from diffuserve_export.ports import Ports
from diffuserve_export.sources import open_checkpoint

__all__ = ["CHECKPOINTS", "Case", "Feeds", "check_same", "example_of", "in_turns", "ports_of"]

CHECKPOINTS: Final = Path(__file__).resolve().parents[2] / "checkpoints"
#: Beyond what the plain graph's output may differ from one whose addition has no part in it, relative to its largest
#: value.
SAME: Final = 1e-4
# SD1.5's, 0.4 times as wide.
NARROW: Final = {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 768, "attention_head_dim": 8}

Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """A UNet, and the calls that are made: latents of one side, several row counts."""

    name: str
    side: int
    rows: tuple[int, ...]

    @property
    def is_shapes(self) -> bool:
        return self.name == "shapes"

    def module(self) -> UNet:
        if self.is_shapes:
            module = module_of(open_checkpoint(CHECKPOINTS / "shapes"), UNET)
            assert isinstance(module, UNet)
            return module
        torch.manual_seed(0)
        return UNet(UNet2DConditionModel(**NARROW)).eval().requires_grad_(False)

    def feeds(self, width: int, rows: int) -> Feeds:
        random = np.random.default_rng(rows)
        return {
            "sample": random.standard_normal((rows, 4, self.side, self.side), dtype=np.float32),
            "timestep": np.linspace(999, 1, rows, dtype=np.float32),
            "encoder_hidden_states": random.standard_normal((rows, 77, width), dtype=np.float32),
        }


def ports_of(module: UNet) -> Ports:
    """Of the plain graph."""
    width = int(module.model.config.cross_attention_dim)
    sample = TensorShape("sample", "FP32", ("rows", 4, "latent_height", "latent_width"))
    text = TensorShape("encoder_hidden_states", "FP32", ("rows", "tokens", width))
    output = TensorShape("model_output", "FP32", sample.shape)
    return (sample, TensorShape("timestep", "FP32", ("rows",)), text), (output,)


def example_of(module: UNet) -> list[torch.Tensor]:
    """Inputs of the plain graph."""
    width = int(module.model.config.cross_attention_dim)
    return [torch.randn(3, 4, 16, 24), torch.rand(3) * 999, torch.randn(3, 154, width)]


def check_same(plain: Any, other: Any, plain_feeds: Feeds, feeds: Feeds) -> None:
    """Rows in which the addition has no part are the plain graph's. Raises RuntimeError where they are not."""
    want, got = plain.run(None, plain_feeds)[0], other.run(None, feeds)[0]
    error = float(np.abs(want - got).max() / np.abs(want).max())
    if not error < SAME:
        raise RuntimeError(f"rows without what is built in are off by {error:.1e}, and {SAME:.0e} is allowed")


def in_turns(
    plain: Any, other: Any, plain_feeds: Feeds, given: Mapping[str, Feeds], rounds: int
) -> tuple[str, Sequence[str]]:
    """The plain call's median in milliseconds, and of each kind of other call the median of the ratios of neighbouring
    calls.
    """
    seconds, ratios = list[float](), dict[str, list[float]]((kind, []) for kind in given)
    for _ in range(rounds):
        for kind, feeds in given.items():
            before, after = _timed(plain, plain_feeds), _timed(other, feeds)
            seconds.append(before)
            ratios[kind].append(after / before)
    return f"{statistics.median(seconds) * 1000:.1f}", [f"{statistics.median(one):.2f}" for one in ratios.values()]


def _timed(session: Any, feeds: Feeds) -> float:
    start = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - start
