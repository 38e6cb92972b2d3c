"""Cast a component to fp16 or bf16, and leave in float32 what needs its range.

fp16 ends at 65,504. A module whose inputs or outputs come near that in a calibration run is computed in float32,
together with its surroundings up to the smallest module that takes and gives small values: a float32 island.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffuserve_export.attention import float32_scores
from diffuserve_export.errors import ExportError

__all__ = ["DTYPES", "LIMIT", "Islands", "cast_module", "find_islands", "float32_reference", "within_half"]

DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Less than half of what fp16 can hold: calibration sees a few inputs, and users bring others.
LIMIT: Final = 30_000.0
_LARGEST_HALF: Final = 65_504.0


@dataclass(frozen=True, slots=True)
class Islands:
    """`modules` are computed in float32; of `attentions` only the scores are. The module "" is the whole component."""

    modules: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return "" in self.modules

    @property
    def names(self) -> tuple[str, ...]:
        """For the manifest."""
        return (*self.modules, *(f"{name}.scores" for name in self.attentions))


def find_islands(module: nn.Module, feeds: Sequence[Sequence[Tensor]], precision: str) -> Islands:
    """Run the float32 `module` on `feeds` and see what fp16 could not hold. bf16 has float32's range.

    Attention that its config wants in float32 (`upcast_attention`) is among the attentions in either precision.
    Raises ExportError where a value is not finite even in float32.
    """
    wanted = {name for name, one in module.named_modules() if isinstance(one, Attention) and one.upcast_attention}
    if precision != "fp16":
        return Islands(attentions=tuple(sorted(wanted)) if precision == "bf16" else ())
    peaks: dict[str, float] = {}
    scores: dict[str, float] = {}
    with _watched(module, peaks, scores), torch.no_grad():
        for feed in feeds:
            module(*feed)
    if lost := [name for name, peak in peaks.items() if not peak < float("inf")]:
        raise ExportError(f"{lost[0] or type(module).__name__} gives values that are not finite, in float32 too")
    modules = _outermost({_island(name, peaks) for name, peak in peaks.items() if peak > LIMIT})
    wanted |= {name for name, score in scores.items() if score > LIMIT}
    return Islands(modules, tuple(sorted(name for name in wanted if not _inside(name, modules))))


@contextmanager
def _watched(module: nn.Module, peaks: dict[str, float], scores: dict[str, float]) -> Iterator[None]:
    """Fill in the largest magnitude that goes into or out of each module, and a bound of each attention's scores."""

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            peaks[name] = max(peaks.get(name, 0.0), _peak((args, kwargs, output)))

        return hook

    handles, norms = [], dict[str, float]()
    for name, one in module.named_modules():
        handles.append(one.register_forward_hook(watch(name), with_kwargs=True))
        if isinstance(one, Attention):
            handles += _watch_scores(name, one, norms, scores)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_scores(name: str, attention: Attention, norms: dict[str, float], scores: dict[str, float]) -> list[Any]:
    """Scores are products of queries and keys: none is larger than the longest query times the longest key."""

    def hook(side: str) -> Any:
        def measure(_: nn.Module, __: Any, output: Tensor) -> None:
            norms[side] = float(output.unflatten(-1, (attention.heads, -1)).norm(dim=-1).max())
            if side == "k":
                scores[name] = max(scores.get(name, 0.0), norms["q"] * norms["k"] * attention.scale)

        return measure

    return [attention.to_q.register_forward_hook(hook("q")), attention.to_k.register_forward_hook(hook("k"))]


def _peak(value: Any) -> float:
    if isinstance(value, Tensor):
        # NaN compares as nothing, so it is turned into what it means here.
        return float(value.abs().max().nan_to_num(float("inf"))) if _is_wide(value) and value.numel() else 0.0
    if isinstance(value, dict):
        return max(map(_peak, value.values()), default=0.0)
    if isinstance(value, (list, tuple)):
        return max(map(_peak, value), default=0.0)
    return 0.0


def _island(name: str, peaks: dict[str, float]) -> str:
    """The smallest module around `name` that takes and gives small values; "" is the component."""
    while name:
        name = name.rpartition(".")[0]
        if peaks.get(name, float("inf")) <= LIMIT:
            break
    return name


def _outermost(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if not any(_inside(name, [other]) for other in names - {name})))


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == one or not one or name.startswith(f"{one}.") for one in modules)


def cast_module(module: nn.Module, precision: str, islands: Islands) -> list[Any]:
    """Cast `module` in place. Returns handles for `float32_reference`."""
    dtype = DTYPES[precision]
    if dtype == torch.float32 or islands.whole:
        return []
    _cast(module, dtype, "", islands.modules)
    handles = []
    for name, one in module.named_modules():
        if name in islands.modules:
            handles.append(one.register_forward_pre_hook(_enter, with_kwargs=True))
            handles.append(one.register_forward_hook(lambda _, __, output: _to(output, dtype)))
        elif name in islands.attentions:
            float32_scores(one)
    return handles


def _cast(module: nn.Module, dtype: torch.dtype, name: str, islands: Sequence[str]) -> None:
    """One tensor after another, so that two copies of the module are never in memory."""
    if name in islands:
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for key, buffer in module.named_buffers(recurse=False):
        if _is_wide(buffer):
            setattr(module, key, buffer.to(dtype))
    for key, child in module.named_children():
        _cast(child, dtype, f"{name}.{key}" if name else key, islands)


def float32_reference(module: nn.Module, handles: Sequence[Any]) -> nn.Module:
    """The module with the weights that it was cast to, computing in float32."""
    for handle in handles:
        handle.remove()
    _cast(module, torch.float32, "", ())
    return module


@contextmanager
def within_half(module: nn.Module, component: str, islands: Islands) -> Iterator[None]:
    """While it lasts, raise ExportError where the float32 `module` computes what fp16 cannot hold outside its islands.

    Every operator's output counts, where calibration saw those of modules. fp16 itself, which shows less, takes torch
    ten times as long on a CPU.
    """
    watch = _RangeWatch(component)
    handles: list[Any] = []
    for name in islands.modules:
        one = module.get_submodule(name)
        handles.append(one.register_forward_pre_hook(lambda *_: watch.enter(1)))
        handles.append(one.register_forward_hook(lambda *_: watch.enter(-1)))
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _RangeWatch(TorchDispatchMode):
    def __init__(self, component: str) -> None:
        super().__init__()
        self.component, self.islands = component, 0

    def enter(self, step: int) -> None:
        """Into an island, or out of it with -1."""
        self.islands += step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.islands and not func.is_view and not _peak(output) <= _LARGEST_HALF:
            raise ExportError(f"{self.component} overflows in fp16, in {func}; export it in bf16 or fp32")
        return output


def _is_wide(value: Tensor) -> bool:
    """Whether it is what precisions are about: fp8 is what a layer was quantized to, and stays."""
    return value.is_floating_point() and value.element_size() > 1


def _enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return _to(args, torch.float32), _to(kwargs, torch.float32)


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)(**{key: _to(one, dtype) for key, one in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_to(one, dtype) for one in value)
    return value
