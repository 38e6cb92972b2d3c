"""Whether a graph computes what its torch module computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve.manifest import Range, TensorShape
from diffuserve.spec import CLIP_SKIP, CONTROL, CONTROL_SCALE, INPUT_IDS
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.errors import VerificationError
from diffuserve_export.float32_copy import float32_copy
from diffuserve_export.ports import Ports

__all__ = [
    "TOLERANCE",
    "Sides",
    "Verified",
    "check_shapes",
    "example_inputs",
    "example_shape",
    "open_graph",
    "reference_outputs",
    "verify_onnx",
]

Sides = Mapping[str, int]

TOLERANCE: Final = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2, "int8": 5e-2, "fp8": 5e-2, "int4": 5e-2}
_SEED: Final = 20
#: The longest side that a graph is verified at, in latents: a full-size model's own would take minutes on a CPU.
_LARGEST_SIDE: Final = 32
_DTYPES: Final = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16} | {
    "INT32": torch.int32,
    "INT64": torch.int64,
}
#: Of an adapter's numbers: with them, LoRA adds about half as much to a layer's output as there is.
_LORA_SPREAD: Final = 0.05


@dataclass(frozen=True, slots=True)
class Verified:
    """The relative error of one output at one shape: the largest difference over the largest value of torch's."""

    component: str
    output: str
    shape: tuple[int, ...]
    error: float


def check_shapes(checkpoint: Checkpoint, size: Range) -> tuple[Sides, Sides]:
    """Two sets of sides: about the checkpoint's own size with one row, and a small oblong of three rows, two chunks."""
    step, bound = size.step, _LARGEST_SIDE * checkpoint.latent_scale
    own = max(step, min(size.opt, bound) // step * step)
    low = max(step, min(size.min, own // 2) // step * step)
    other = low + step if low + step <= size.max else low
    return (
        _sides(checkpoint, rows=1, chunks=1, height=own, width=own),
        _sides(checkpoint, rows=3, chunks=2, height=low, width=other),
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
        "vectors": 2 * rows - 1,
        "adapters": rows + 1,
        "height": height,
        "width": width,
        "latent_height": height // scale,
        "latent_width": width // scale,
    }


def example_inputs(checkpoint: Checkpoint, inputs: Sequence[TensorShape], sides: Sides) -> list[Tensor]:
    """Seeded inputs like those of a service: token ids with an end, timesteps of a schedule, pictures, noise.

    The first and the last row have a token of `embeddings`, and leave out no layer and as many as they may. Rows count
    adapters down from the last, but for one that has none where there are several. A ControlNet counts in full in the
    first row and not at all in the last of several.
    """
    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = min(int(checkpoint.parts[name].config["vocab_size"]) for name in checkpoint.family.encoders)
    # Configs that say 2 are from before that was put right; CLIP's own end is its last token.
    ends = {int(checkpoint.parts[name].config.get("eos_token_id", 2)) for name in checkpoint.family.encoders} - {2}
    drawn = []
    for port in inputs:
        shape = [sides[side] if isinstance(side, str) else side for side in port.shape]
        if port.name == INPUT_IDS:
            tensor = torch.randint(0, vocabulary - 1, shape, generator=generator)
            tensor[:, shape[1] // 2 :] = min(ends.pop() if len(ends) == 1 else vocabulary - 1, vocabulary - 1)
            tensor[0, 1], tensor[-1, 2] = vocabulary, vocabulary + sides["vectors"] - 1
        elif port.name == CLIP_SKIP:
            tensor = torch.linspace(0, checkpoint.clip_skip, shape[0])
        elif port.name == LORA:
            tensor = torch.randn(shape, generator=generator) * _LORA_SPREAD
            tensor[0] = 0
        elif port.name == LORA_INDEX:
            tensor = torch.arange(shape[0], 0, -1)
            tensor[1:2] = 0
        elif port.name == "timestep":
            tensor = torch.rand(shape, generator=generator) * 999
        elif port.name == "time_ids":
            tensor = torch.rand(shape, generator=generator) * 1024
        elif port.name == CONTROL:
            tensor = torch.rand(shape, generator=generator)
        elif port.name == CONTROL_SCALE:
            tensor = torch.linspace(1, 0, shape[0])
        elif port.name in ("pixels", "timestep_cond"):
            tensor = torch.rand(shape, generator=generator) * 2 - 1
        else:
            tensor = torch.randn(shape, generator=generator)
        drawn.append(tensor.to(_DTYPES[port.datatype]))
    return drawn


def reference_outputs(module: nn.Module, feeds: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What the float32 `module` makes of each of `feeds`."""
    outputs = []
    for feed in feeds:
        with torch.no_grad():
            output = module(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in feed))
        outputs.append(list(output) if isinstance(output, tuple) else [output])
    return outputs


def verify_onnx(
    path: Path,
    component: str,
    ports: Ports,
    feeds: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[Tensor]],
    tolerance: float,
    *,
    optimized: bool = True,
) -> list[Verified]:
    """Run the graph at `path` on `feeds` and compare every output with what is `expected`.

    `optimized` runs it as it is served in ONNX Runtime on a CPU. As it stands suffices where something else serves it,
    and takes a fifth of the memory: the optimizer makes float32 weights of half ones, and packs them once more.
    ONNX Runtime has no kernels for bf16 on a CPU: such a graph is run as a copy in float32, with its weights and
    inputs as they were rounded. Raises VerificationError where the graph does not load or run, has other tensors than
    `ports`, gives another shape or a value that is not finite, or is off by more than `tolerance`, relative to the
    largest value.
    """
    try:
        if not any(port.datatype == "BF16" for port in (*ports[0], *ports[1])):
            return _verify(open_graph(path, optimized=optimized), component, ports, feeds, expected, tolerance)
        with TemporaryDirectory(prefix=".float32-", dir=path.parents[1]) as folder:
            copy = float32_copy(path, Path(folder) / path.name)
            return _verify(open_graph(copy, optimized=optimized), component, ports, feeds, expected, tolerance)
    except VerificationError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common root
        reason = str(error).strip().splitlines()[0]
        raise VerificationError(f"{component}: ONNX Runtime cannot run the graph: {reason}") from error


def open_graph(path: Path, *, optimized: bool) -> onnxruntime.InferenceSession:
    """A graph in ONNX Runtime on the CPU, or, if not `optimized`, operator by operator as it stands."""
    options = onnxruntime.SessionOptions()
    # Its threads would wait for work on the cores that torch has between two calls: up to twice the processor time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])


def _verify(
    session: onnxruntime.InferenceSession,
    component: str,
    ports: Ports,
    feeds: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[Tensor]],
    tolerance: float,
) -> list[Verified]:
    _check_sides(session, component, ports)
    results = []
    for feed, wanted in zip(feeds, expected, strict=True):
        named = {port.name: _array(tensor) for port, tensor in zip(ports[0], feed, strict=True)}
        for port, want, got in zip(ports[1], wanted, session.run(None, named), strict=True):
            results.append(_compare(component, port.name, want, got, tolerance))
    return results


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """numpy has no bf16; the float32 copy of a graph takes its values in float32."""
    array: np.ndarray[Any, Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _check_sides(session: onnxruntime.InferenceSession, component: str, ports: Ports) -> None:
    for port, found in zip((*ports[0], *ports[1]), (*session.get_inputs(), *session.get_outputs()), strict=True):
        if (port.name, list(port.shape)) != (found.name, found.shape):
            raise VerificationError(f"{component}: the graph has {found.name} {found.shape} instead of {port}")


def _compare(component: str, output: str, want: Tensor, got: np.ndarray[Any, Any], tolerance: float) -> Verified:
    reference = want.numpy()
    if got.shape != reference.shape:
        raise VerificationError(f"{component}: {output} has shape {got.shape}, and torch gives {reference.shape}")
    error = float(np.abs(got.astype(np.float32) - reference).max() / max(float(np.abs(reference).max()), 1e-12))
    if not error <= tolerance:  # written so that a NaN fails
        raise VerificationError(
            f"{component}: {output} {list(got.shape)} is off by {error:.2e} relative to torch, "
            f"and {tolerance:.0e} is allowed"
        )
    return Verified(component, output, got.shape, error)
