"""The sections of build/accept-tensorrt/report.md; with WRITE_DOCS=1 they go into docs/export.md as well."""

from __future__ import annotations

import os
from typing import Final

from conftest import ROOT
from simulator.report import write_section

__all__ = ["FOLDER", "publish"]

FOLDER: Final = ROOT / "build" / "accept-tensorrt"
_PAGE: Final = ROOT / "docs" / "export.md"


def publish(name: str, text: str, by: str = "make accept-tensorrt") -> None:
    """Write or replace one section, which the make target `by` measures.

    Each has a file, so that a run of one test keeps the others' sections.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name.replace(' ', '-')}.section.md").write_text(f"## {name}\n\n{text}\n", encoding="utf-8")
    sections = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.section.md"))]
    (FOLDER / "report.md").write_text(
        "# What acceptance tests measured of engines\n\n" + "\n".join(sections), encoding="utf-8"
    )
    if os.environ.get("WRITE_DOCS"):
        write_section(name, text, _PAGE, by=by)
