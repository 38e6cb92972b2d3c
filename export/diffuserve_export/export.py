"""The whole way of one export, as a list of what happens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffuserve.manifest import Manifest, Range
from diffuserve_export.checkpoint import Checkpoint, part_of
from diffuserve_export.digests import export_key
from diffuserve_export.engines.device import builder_facts
from diffuserve_export.engines.options import EngineOptions
from diffuserve_export.errors import CheckpointError, ExportError
from diffuserve_export.hub import find_checkpoint
from diffuserve_export.options import TARGETS, ExportOptions
from diffuserve_export.ports import row_range, size_range
from diffuserve_export.report import Report
from diffuserve_export.sources import open_architecture, open_checkpoint, open_single_file
from diffuserve_export.workspace import locked_workspace

__all__ = ["Plan", "export_checkpoint", "plan_export"]

_SPARE_BYTES = 64 << 20
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


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
    rows: Range
    engine: EngineOptions
    #: What engines are built with and for; nothing where the target has none.
    builder: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """What enters the key besides the checkpoint's files."""
        options = {field: getattr(self, field) for field in ("name", "target", "precision", "opset")}
        ranges = {"size": str(self.size), "rows": str(self.rows), "precisions": dict(self.precisions)}
        engine = {"engine": self.engine.facts(), "builder": self.builder}
        weights = type(self.checkpoint.weights).__name__, getattr(self.checkpoint.weights, "seed", None)
        return {**options, **ranges, **engine, "family": self.checkpoint.family.name, "weights": weights}

    @property
    def bytes_needed(self) -> int:
        """On disk, while it is made: graphs, their engines, and the float32 copy that a bf16 graph is verified by."""
        counts = {name: self.checkpoint.parts[part_of(name)].parameters for name in self.precisions}
        kept = sum(counts[name] * _BYTES[precision] for name, precision in self.precisions.items())
        copies = [counts[name] * 4 for name, precision in self.precisions.items() if precision == "bf16"]
        return kept * (1 + len(self.builder.get("devices", ()))) + max(copies, default=0) + _SPARE_BYTES


def export_checkpoint(options: ExportOptions, report: Report | None = None) -> Manifest:
    """Export one checkpoint into `options.out`, or do nothing where that very export is there and whole.

    Every graph is verified against torch before anything is put in place; an export that fails leaves the
    deployment as it was. Raises OptionError, CheckpointError, VerificationError or ExportError.
    """
    report = report or Report()
    plan = plan_export(options)
    with locked_workspace(options.out, report) as workspace:
        key = export_key(plan.checkpoint.files, plan.facts(), workspace.hashes)
        if manifest := workspace.current(plan.name, key):
            report.note(f"{plan.name} is up to date in {options.out}")
            return manifest
        _check_disk(options.out, plan.bytes_needed)
        # Imported here because it brings torch: a run that is up to date takes no seconds.
        from diffuserve_export.assembly import assemble

        with workspace.staging() as staging:
            manifest = assemble(plan, key, staging, report)
            workspace.seal(staging, plan.name)
            workspace.publish(staging, plan.name)
        return manifest


def plan_export(options: ExportOptions) -> Plan:
    """Open the checkpoint and fill in what the options leave out."""
    checkpoint = _open(options)
    if options.family not in ("", checkpoint.family.name):
        raise CheckpointError(f"{checkpoint.label} is of family {checkpoint.family.name}, not {options.family}")
    return Plan(
        checkpoint=checkpoint,
        name=options.deployed_name,
        source=options.source,
        target=options.target,
        precision=options.precision,
        precisions={name: _precision(checkpoint, name, options) for name in checkpoint.family.components},
        opset=TARGETS[options.target].opset,
        size=size_range(checkpoint, options),
        rows=row_range(options),
        engine=options.engine,
        builder=builder_facts(options.target, options.engine),
    )


def _open(options: ExportOptions) -> Checkpoint:
    if options.random_weights:
        return open_architecture(options.family)
    found = find_checkpoint(options.checkpoint, allow_pickle=options.allow_pickle)
    if found.is_file():
        return open_single_file(found, options.config)
    return open_checkpoint(found, allow_pickle=options.allow_pickle)


def _precision(checkpoint: Checkpoint, component: str, options: ExportOptions) -> str:
    if part_of(component) != "vae":
        return options.precision
    wide = checkpoint.family.wide_vae and checkpoint.parts["vae"].config.get("force_upcast", True)
    return options.vae_precision or ("fp32" if wide else options.precision)


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(f"{folder} has {free / 1e9:.2f} GB free, and the export needs {needed / 1e9:.2f} GB")
