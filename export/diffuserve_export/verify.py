"""Whether a graph computes what its torch module computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from diffuserve.manifest import Range, TensorShape
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.errors import VerificationError
from diffuserve_export.ports import Ports

__all__ = ["TOLERANCE", "Sides", "Verified", "check_shapes", "example_inputs", "example_shape", "verify_onnx"]

Sides = Mapping[str, int]

TOLERANCE: Final = {"fp32": 1e-4}
_SEED: Final = 20


@dataclass(frozen=True, slots=True)
class Verified:
    """The relative error of one output at one shape: the largest difference over the largest value of torch's."""

    component: str
    output: str
    shape: tuple[int, ...]
    error: float


def check_shapes(checkpoint: Checkpoint, size: Range) -> tuple[Sides, Sides]:
    """Two sets of sides: the checkpoint's own size with one row, and a small oblong with three rows and two chunks."""
    other = size.min + size.step if size.min + size.step <= size.max else size.min
    return (
        _sides(checkpoint, rows=1, chunks=1, height=size.opt, width=size.opt),
        _sides(checkpoint, rows=3, chunks=2, height=size.min, width=other),
    )


def example_shape(checkpoint: Checkpoint) -> Sides:
    """Sides to trace with. All differ, so that no two can be taken for one."""
    step = checkpoint.size_step
    return _sides(checkpoint, rows=3, chunks=2, height=4 * step, width=6 * step)


def _sides(checkpoint: Checkpoint, *, rows: int, chunks: int, height: int, width: int) -> Sides:
    scale = checkpoint.latent_scale
    return {
        "rows": rows,
        "tokens": chunks * checkpoint.token_limit,
        "height": height,
        "width": width,
        "latent_height": height // scale,
        "latent_width": width // scale,
    }


def example_inputs(checkpoint: Checkpoint, inputs: Sequence[TensorShape], sides: Sides) -> list[Tensor]:
    """Seeded inputs like those of a service: token ids with an end, timesteps of a schedule, pictures, noise."""
    generator = torch.Generator().manual_seed(_SEED)
    config = checkpoint.parts["text_encoder"].config
    vocabulary, last = int(config["vocab_size"]), int(config.get("eos_token_id", 49407))
    drawn = []
    for port in inputs:
        shape = [sides[side] if isinstance(side, str) else side for side in port.shape]
        if port.name == "input_ids":
            tensor = torch.randint(0, vocabulary, shape, generator=generator)
            tensor[:, shape[1] // 2 :] = min(last, vocabulary - 1)
            tensor = tensor.to(torch.int32)
        elif port.name == "timestep":
            tensor = torch.rand(shape, generator=generator) * 999
        elif port.name == "pixels":
            tensor = torch.rand(shape, generator=generator) * 2 - 1
        else:
            tensor = torch.randn(shape, generator=generator)
        drawn.append(tensor)
    return drawn


def verify_onnx(
    path: Path, module: nn.Module, component: str, ports: Ports, feeds: Sequence[Sequence[Tensor]], tolerance: float
) -> list[Verified]:
    """Run the graph at `path` and `module` on the same `feeds` and compare every output.

    Raises VerificationError where the graph does not load or run, has other tensors than `ports`, gives another
    shape or a value that is not finite, or is off by more than `tolerance`, relative to the largest value.
    """
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        _check_sides(session, component, ports)
        results = []
        for feed in feeds:
            expected = _run_torch(module, feed)
            named = {port.name: tensor.numpy() for port, tensor in zip(ports[0], feed, strict=True)}
            for port, want, got in zip(ports[1], expected, session.run(None, named), strict=True):
                results.append(_compare(component, port.name, want, got, tolerance))
    except VerificationError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common root
        reason = str(error).strip().splitlines()[0]
        raise VerificationError(f"{component}: ONNX Runtime cannot run the graph: {reason}") from error
    return results


def _check_sides(session: onnxruntime.InferenceSession, component: str, ports: Ports) -> None:
    for port, found in zip((*ports[0], *ports[1]), (*session.get_inputs(), *session.get_outputs()), strict=True):
        if (port.name, list(port.shape)) != (found.name, found.shape):
            raise VerificationError(f"{component}: the graph has {found.name} {found.shape} instead of {port}")


def _run_torch(module: nn.Module, feed: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output = module(*feed)
    return list(output) if isinstance(output, tuple) else [output]


def _compare(component: str, output: str, want: Tensor, got: np.ndarray[Any, Any], tolerance: float) -> Verified:
    reference = want.numpy()
    if got.shape != reference.shape:
        raise VerificationError(f"{component}: {output} has shape {got.shape}, and torch gives {reference.shape}")
    error = float(np.abs(got - reference).max() / max(float(np.abs(reference).max()), 1e-12))
    if not error <= tolerance:  # written so that a NaN fails
        raise VerificationError(
            f"{component}: {output} {list(got.shape)} is off by {error:.2e} relative to torch, "
            f"and {tolerance:.0e} is allowed"
        )
    return Verified(component, output, got.shape, error)
