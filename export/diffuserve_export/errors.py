"""What can go wrong in an export. Each message is one line with the value, the limit and the remedy.

ExportError                   the root: also what the machine lacks, such as disk; the command ends with exit_code
├── OptionError               an option's value is not accepted
├── CheckpointError           the checkpoint is missing, damaged, or of a kind that is not exported
├── VerificationError         a graph does not compute what torch computes
└── QualityError              a quantized graph makes other pictures than float32
"""

from __future__ import annotations

from typing import ClassVar

__all__ = ["CheckpointError", "ExportError", "OptionError", "QualityError", "VerificationError"]


class ExportError(Exception):
    exit_code: ClassVar[int] = 2


class OptionError(ExportError):
    pass


class CheckpointError(ExportError):
    pass


class VerificationError(ExportError):
    exit_code = 1


class QualityError(ExportError):
    exit_code = 1
