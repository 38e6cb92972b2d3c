"""Turn a Stable Diffusion checkpoint into graphs, component models for Triton, and a manifest.

Runs offline, before a server starts. Importing this package loads no torch: an export that is up to date
answers without it.
"""

from __future__ import annotations

from diffuserve_export.errors import CheckpointError, ExportError, OptionError, QualityError, VerificationError
from diffuserve_export.export import export_checkpoint
from diffuserve_export.options import ExportOptions
from diffuserve_export.report import Report

__all__ = [
    "CheckpointError",
    "ExportError",
    "ExportOptions",
    "OptionError",
    "QualityError",
    "Report",
    "VerificationError",
    "export_checkpoint",
]
