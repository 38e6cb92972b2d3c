"""A UNet in float32 -> a UNet with quantized layers -> a verdict on the pictures that its graph makes."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from diffuserve.lora.layout import LORA, LORA_INDEX
from diffuserve.manifest import Quantization
from diffuserve.spec import UNET
from diffuserve_export.errors import ExportError
from diffuserve_export.modules import module_of
from diffuserve_export.ports import Ports
from diffuserve_export.quantize.calibrate import calibrated_layers, replace_layers
from diffuserve_export.quantize.options import QuantizePlan
from diffuserve_export.quantize.pictures import Run, Studio
from diffuserve_export.quantize.quality import Quality, check_quality
from diffuserve_export.quantize.recipes import choose_layers, recipe_of
from diffuserve_export.report import Report
from diffuserve_export.verify import open_graph

if TYPE_CHECKING:
    from diffuserve_export.export import Plan

__all__ = ["Judge", "QuantizedUNet", "graph_run", "module_run", "quantized_unet"]

# The seed of the first picture to judge by. Those to calibrate with begin at 0: no noise is seen twice.
_JUDGED_SEED: Final = 1_000_000
_DTYPES: Final = {"FP32": torch.float32, "FP16": torch.float16, "INT64": torch.int64}


class Judge:
    """Keeps pictures of a UNet in float32, to compare those of its quantized graph with."""

    def __init__(self, studio: Studio, plan: QuantizePlan, run: Run) -> None:
        self.studio, self.plan = studio, plan
        self.prompts = [plan.judged[index % len(plan.judged)] for index in range(plan.pictures)]
        self.expected = self._pictures(run) if self.prompts else None

    def _pictures(self, run: Run) -> Tensor:
        return self.studio.pictures(run, self.prompts, range(_JUDGED_SEED, _JUDGED_SEED + len(self.prompts)))

    def quality(self, precision: str, run: Run) -> Quality | None:
        """How pictures of `run` compare; None where none are wanted. Raises QualityError where they drifted."""
        if self.expected is None:
            return None
        return check_quality(precision, self._pictures(run), self.expected, self.plan.gate)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was quantized, and who judges the graph that comes of it."""

    precision: str
    facts: Quantization
    judge: Judge

    def __call__(self, path: Path, ports: Ports, report: Report) -> Quantization:
        """The facts, complete. Raises QualityError where the graph's pictures drifted."""
        report.stage(UNET, "judging")
        quality = self.judge.quality(self.precision, graph_run(path, ports))
        if quality is None:
            return self.facts
        report.note(
            f"{UNET} in {self.precision}: PSNR {quality.psnr:.1f} dB against float32 over {quality.pictures} pictures, "
            f"{quality.lowest:.1f} dB at worst"
        )
        return replace(self.facts, pictures=quality.pictures, psnr=quality.psnr, lowest=quality.lowest)


@dataclass(frozen=True, slots=True)
class QuantizedUNet:
    """`module` has quantized layers, and all others in float32."""

    module: nn.Module
    verdict: Verdict


def quantized_unet(plan: Plan, module: nn.Module, islands: Sequence[str], report: Report) -> QuantizedUNet:
    """Quantize the UNet `module`, which is used up. `islands` are modules of it that need float32.

    Raises ExportError where nothing is left to quantize.
    """
    quantize, precision = plan.quantize, plan.precisions[UNET]
    assert quantize is not None
    recipe = recipe_of(precision, plan.target)
    chosen, left = choose_layers(module, recipe, islands)
    if not chosen:
        reasons = ", ".join(sorted(set(left.values())))
        raise ExportError(f"{UNET} has no layer that can be {precision} ({reasons}); export it in fp16 or fp32")
    studio = Studio(plan.checkpoint, plan.size.opt, quantize.steps)
    report.stage(UNET, "drawing with")
    judge = Judge(studio, quantize, module_run(module))
    report.stage(UNET, "quantizing")
    prompts = quantize.calibration
    layers = calibrated_layers(
        module, recipe, chosen, lambda converted: studio.run(module_run(converted), prompts, range(len(prompts)))
    )
    del module
    gc.collect()  # ModelOpt's modules hold each other
    fresh = module_of(plan.checkpoint, UNET)
    replace_layers(fresh, layers)
    facts = Quantization(
        layers=_by_value({name: layer.weight.name for name, layer in chosen.items()}),
        left=_by_value(left),
        prompts=quantize.source,
        calibrated=len(prompts),
        steps=quantize.steps,
        gate=quantize.gate,
    )
    return QuantizedUNet(fresh, Verdict(precision, facts, judge))


def _by_value(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Layers' names, gathered by what is said of them."""
    return {value: tuple(name for name in names if names[name] == value) for value in dict.fromkeys(names.values())}


def module_run(module: nn.Module) -> Run:
    """A UNet in torch, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        output: Tensor = module(*(one.to(device) for one in inputs))
        return output.cpu()

    return run


def graph_run(path: Path, ports: Ports) -> Run:
    """A UNet's graph in ONNX Runtime on the CPU, with Q/DQ computed as it stands.

    Its optimizer puts integer kernels in the place of Q/DQ. Those for CPUs without VNNI add up in 16 bits, which
    overflow.
    """
    session = open_graph(path, optimized=False)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        typed = {
            port.name: one.to(_DTYPES[port.datatype]).numpy()
            for port, one in zip(ports[0], (*inputs, *_no_adapters(ports, len(inputs[0]))), strict=True)
        }
        return torch.from_numpy(session.run(None, typed)[0])

    return run


def _no_adapters(ports: Ports, rows: int) -> list[Tensor]:
    """What a graph with adapters takes besides, where no row has one."""
    shapes = {LORA: lambda port: (1, port.shape[1]), LORA_INDEX: lambda _: (rows,)}
    return [torch.zeros(shapes[port.name](port)) for port in ports[0] if port.name in shapes]
