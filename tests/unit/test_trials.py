"""Trial calls of a checkpoint that comes and goes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffuserve.errors import ComponentFailedError
from diffuserve.manifest import Manifest
from diffuserve.trials import trials
from unit.fakes import write_deployment


class Leaving:
    """A keeper whose checkpoint is there when it is asked about, and held or not when it is to be called."""

    def __init__(self) -> None:
        self.is_held = False
        self.log: list[str] = []

    def is_there(self, name: str) -> bool:
        return name == "fake"

    def hold(self, name: str) -> bool:
        self.log += [f"hold {name}"] * self.is_held
        return self.is_held

    def let_go(self, name: str) -> None:
        self.log.append(f"let go of {name}")


def test_a_trial_of_what_has_left_is_not_measured(tmp_path: Path) -> None:
    deployment, keeper = write_deployment(tmp_path, "fake"), Leaving()
    manifest = Manifest.from_json((deployment.folder("fake") / "manifest.json").read_text())
    checkpoint = SimpleNamespace(
        name="fake", manifest=manifest, trial=lambda group, rows: lambda: keeper.log.append(f"{rows} rows")
    )
    registry: Any = {"fake": checkpoint}
    first = next(trials(registry, keeper))  # type: ignore[arg-type]
    assert first.is_possible()
    with pytest.raises(ComponentFailedError, match="fake is not in memory"):
        first.run()
    keeper.is_held = True
    first.run()
    assert keeper.log == ["hold fake", "1 rows", "let go of fake"]
