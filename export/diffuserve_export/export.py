"""The whole way of one export, as a list of what happens."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffuserve.manifest import Manifest, Range
from diffuserve_export.checkpoint import Checkpoint, open_checkpoint
from diffuserve_export.digests import export_key
from diffuserve_export.engines.device import builder_facts
from diffuserve_export.engines.options import EngineOptions
from diffuserve_export.errors import ExportError
from diffuserve_export.hub import find_checkpoint
from diffuserve_export.options import TARGETS, ExportOptions
from diffuserve_export.ports import PART_OF, row_range, size_range
from diffuserve_export.report import Report
from diffuserve_export.workspace import locked_workspace

__all__ = ["Plan", "export_checkpoint"]

_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made: the checkpoint, the options with every default filled in, and the key of it all."""

    checkpoint: Checkpoint
    name: str
    source: str
    target: str
    precision: str
    opset: int
    size: Range
    rows: Range
    engine: EngineOptions
    #: What engines are built with and for; nothing where the target has none.
    builder: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """What enters the key besides the checkpoint's files."""
        options = {field: getattr(self, field) for field in ("name", "target", "precision", "opset")}
        engine = {"engine": self.engine.facts(), "builder": self.builder}
        ranges = {"size": str(self.size), "rows": str(self.rows)}
        return {**options, **ranges, **engine, "family": self.checkpoint.family.name}

    @property
    def bytes_needed(self) -> int:
        parts = [self.checkpoint.parts[PART_OF[component]] for component in self.checkpoint.family.components]
        copies = 1 + len(self.builder.get("devices", ()))
        return sum(part.parameters for part in parts) * 4 * copies + _SPARE_BYTES


def export_checkpoint(options: ExportOptions, report: Report | None = None) -> Manifest:
    """Export one checkpoint into `options.out`, or do nothing where that very export is there and whole.

    Every graph is verified against torch before anything is put in place; an export that fails leaves the
    deployment as it was. Raises OptionError, CheckpointError, VerificationError or ExportError.
    """
    report = report or Report()
    plan = _plan(options)
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


def _plan(options: ExportOptions) -> Plan:
    checkpoint = open_checkpoint(find_checkpoint(options.checkpoint))
    return Plan(
        checkpoint=checkpoint,
        name=options.deployed_name,
        source=options.checkpoint,
        target=options.target,
        precision=options.precision,
        opset=TARGETS[options.target].opset,
        size=size_range(checkpoint, options),
        rows=row_range(options),
        engine=options.engine,
        builder=builder_facts(options.target, options.engine),
    )


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(f"{folder} has {free / 1e9:.2f} GB free, and the export needs {needed / 1e9:.2f} GB")
