"""What tests of several families share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, families: Any, one_thread: None) -> Any:
    """The cases of a module's `NAMES`, all served at once, with torch's modules in place of the graphs."""
    from integration.families import torch_families
    from integration.family_cases import serve

    return serve(*torch_families(families, request.module.NAMES, families.root / "deployment"))
