"""The whole way of one export, as a list of what happens."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffuserve.manifest import Manifest, Range
from diffuserve.spec import UNET
from diffuserve_export.checkpoint import Checkpoint, part_of
from diffuserve_export.controlnet import with_controlnet
from diffuserve_export.digests import export_key
from diffuserve_export.engines.device import builder_facts
from diffuserve_export.engines.options import EngineOptions
from diffuserve_export.errors import CheckpointError, ExportError
from diffuserve_export.hub import find_checkpoint, find_controlnet
from diffuserve_export.options import QUANTIZED, TARGETS, ExportOptions
from diffuserve_export.ports import row_range, size_range, vae_range
from diffuserve_export.quantize import QuantizePlan, plan_quantization
from diffuserve_export.report import Report
from diffuserve_export.shared_models import share_components
from diffuserve_export.sources import open_architecture, open_checkpoint, open_single_file, with_preview_vae
from diffuserve_export.workspace import locked_workspace

__all__ = ["Plan", "export_checkpoint", "plan_export"]

_SPARE_BYTES = 64 << 20
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a weight, at most: of a quantized UNet some stay in fp16.
_BYTES = {"fp32": 4} | dict.fromkeys(("fp16", "bf16", *QUANTIZED), 2)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made: the checkpoint, the options with every default filled in.

    `precisions` are the components' own, where `precision` is what was asked for.
    """

    checkpoint: Checkpoint
    name: str
    source: str
    target: str
    precision: str
    precisions: Mapping[str, str]
    opset: int
    size: Range
    vae_size: Range
    rows: Range
    engine: EngineOptions
    #: What engines are built with and for; nothing where the target has none.
    builder: dict[str, Any]
    #: None where nothing is quantized.
    quantize: QuantizePlan | None = None
    #: Of adapters, 0 where none are taken.
    lora_rank: int = 0

    def facts(self) -> dict[str, Any]:
        """What enters the key besides the checkpoint's files."""
        options = {field: getattr(self, field) for field in ("name", "target", "precision", "opset")}
        ranges = {name: str(getattr(self, name)) for name in ("size", "vae_size", "rows", "precisions")}
        engine = {"engine": self.engine.facts(), "builder": self.builder}
        weights = type(self.checkpoint.weights).__name__, getattr(self.checkpoint.weights, "seed", None)
        quantize = {"quantize": asdict(self.quantize)} if self.quantize else {}
        lora = {"lora_rank": self.lora_rank} if self.lora_rank else {}
        return {
            **options,
            **ranges,
            **engine,
            **quantize,
            **lora,
            "family": self.checkpoint.family.name,
            "weights": weights,
        }

    @property
    def graph_bytes(self) -> dict[str, int]:
        """Of each component's weights."""
        weights = {name: self.checkpoint.parameters_of(name) for name in self.precisions}
        return {name: weights[name] * _BYTES[precision] for name, precision in self.precisions.items()}

    @property
    def engine_bytes(self) -> int:
        """Of all engines together, about: each holds its weights once for each kind of card. 0 without engines."""
        return sum(self.graph_bytes.values()) * len(self.builder.get("devices", ()))

    @property
    def bytes_needed(self) -> int:
        """On the deployment's disk, while it is made: what stays, and whatever else there is of one graph at a time.

        That is the graph itself where an engine takes its place, and the float32 copy that a bf16 graph is verified by.
        """
        graphs = self.graph_bytes
        copies = [2 * size for name, size in graphs.items() if self.precisions[name] == "bf16"]
        return (self.engine_bytes or sum(graphs.values())) + max(*graphs.values(), *copies) + _SPARE_BYTES


def export_checkpoint(options: ExportOptions, report: Report | None = None) -> Manifest:
    """Export one checkpoint into `options.out`, or do nothing where that very export is there and whole.

    Every graph is verified against torch before anything is put in place; an export that fails leaves the
    deployment as it was. Raises OptionError, CheckpointError, VerificationError or ExportError; KeyboardInterrupt says
    so where it came while a complete export was put in place, which is done all the same.
    """
    report = report or Report()
    plan = plan_export(options)
    with locked_workspace(options.out, report) as workspace:
        key = export_key(plan.checkpoint.files, plan.facts(), workspace.hashes)
        if manifest := workspace.current(plan.name, key):
            report.note(f"{plan.name} is up to date in {options.out}")
            return manifest
        _check_disk(options.out, plan.bytes_needed, "--out")
        _check_disk(options.engine.cache_folder, plan.engine_bytes, "DIFFUSERVE_CACHE")
        # Imported here because it brings transformers: a run that is up to date takes no second.
        from diffuserve_export.assembly import assemble

        try:
            with workspace.staging() as staging:
                manifest = share_components(options.out, staging, assemble(plan, key, staging, report))
                workspace.seal(staging, plan.name)
                workspace.publish(staging, plan.name)
        except KeyboardInterrupt as error:
            if workspace.current(plan.name, key) is None:
                raise
            raise KeyboardInterrupt(f"{plan.name} was complete by then, and is in {options.out}") from error
        except OSError as error:
            if error.errno not in _DISK_IS_FULL:
                raise
            raise ExportError(
                f"{error.filename or options.out} cannot be written: {error.strerror}; the export needs "
                f"{plan.bytes_needed / 1e9:.2f} GB; free some, or name a folder on another disk by --out"
            ) from error
        return manifest


def plan_export(options: ExportOptions) -> Plan:
    """Open the checkpoint and fill in what the options leave out."""
    checkpoint = _open(options)
    if options.preview_vae:
        checkpoint = with_preview_vae(checkpoint, options.preview_vae, allow_pickle=options.allow_pickle)
    if options.controlnet:
        found = find_controlnet(options.controlnet, allow_pickle=options.allow_pickle)
        checkpoint = with_controlnet(checkpoint, found, allow_pickle=options.allow_pickle)
    if options.family not in ("", checkpoint.family.name):
        raise CheckpointError(f"{checkpoint.label} is of family {checkpoint.family.name}, not {options.family}")
    size = size_range(checkpoint, options)
    return Plan(
        checkpoint=checkpoint,
        name=options.deployed_name,
        source=options.source,
        target=options.target,
        precision=options.precision,
        precisions={name: _precision(checkpoint, name, options) for name in checkpoint.components},
        opset=TARGETS[options.target].opset,
        size=size,
        vae_size=vae_range(checkpoint, size, options),
        rows=row_range(options),
        engine=options.engine,
        builder=builder_facts(options.target, options.engine),
        quantize=plan_quantization(checkpoint, options.quantize) if options.precision in QUANTIZED else None,
        lora_rank=options.lora_rank,
    )


def _open(options: ExportOptions) -> Checkpoint:
    if options.random_weights:
        return open_architecture(options.family)
    found = find_checkpoint(options.checkpoint, allow_pickle=options.allow_pickle)
    if found.is_file():
        return open_single_file(found, options.config)
    return open_checkpoint(found, allow_pickle=options.allow_pickle)


def _precision(checkpoint: Checkpoint, component: str, options: ExportOptions) -> str:
    if component == UNET:
        return options.precision
    precision = "fp16" if options.precision in QUANTIZED else options.precision
    if part_of(component) != "vae":
        return precision
    wide = checkpoint.family.wide_vae and checkpoint.parts["vae"].config.get("force_upcast", True)
    return options.vae_precision or ("fp32" if wide else precision)


def _check_disk(folder: Path, needed: int, setting: str) -> None:
    """Raise ExportError where the disk of `folder`, which `setting` names and may have to be made yet, is too full."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if free < needed:
        raise ExportError(
            f"{folder} has {free / 1e9:.2f} GB free, and the export needs {needed / 1e9:.2f} GB there; free some, or "
            f"name a folder on another disk by {setting}"
        )
