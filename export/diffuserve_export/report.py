"""What an export tells whoever watches it. The base class is silent."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffuserve_export.verify import Verified

__all__ = ["Report"]


class Report:
    """Called as an export goes on; override what is of interest."""

    def started(self, name: str, components: int) -> None:
        """The export is not up to date and begins."""

    def stage(self, component: str, stage: str) -> None:
        """`component` is being loaded, exported or verified."""

    def verified(self, results: list[Verified]) -> None:
        """A component's graph agrees with torch."""

    def note(self, text: str) -> None:
        """Anything else: up to date, waiting for another export, what an earlier run left behind."""
