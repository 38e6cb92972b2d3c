"""The set of checkpoints changes while requests come: nobody finds half of it, and a name never means two exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffuserve.checkpoint import Checkpoint
from diffuserve.errors import NotFoundError
from diffuserve.registry import CheckpointRegistry
from unit.fakes import FakeModels, write_deployment


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Checkpoint]:
    deployment = write_deployment(tmp_path, "first", "second", "third")
    return [Checkpoint(deployment, name, FakeModels().runner()) for name in deployment.checkpoints]


def test_what_is_added_is_found_and_what_is_removed_only_by_those_that_know_it(checkpoints: list[Checkpoint]) -> None:
    registry, told = CheckpointRegistry(checkpoints[:2]), list[tuple[str, bool]]()
    registry.listeners.append(lambda one, is_there: told.append((one.name, is_there)))
    with pytest.raises(NotFoundError, match="'third' is not deployed; deployed are first, second"):
        registry.find("third")
    registry.add(checkpoints[2])
    assert registry.find("third") is checkpoints[2]
    assert registry.find(None) is registry.find("") is checkpoints[0]
    registry.remove("first")
    assert (list(registry), registry.default, len(registry)) == (["second", "third"], "second", 2)
    with pytest.raises(NotFoundError, match="'first' is not deployed"):
        registry.find("first")
    assert registry["first"] is checkpoints[0], "requests under way end with it"
    registry.make_default("third")
    assert registry.default == "third"
    assert told == [("third", True), ("first", False)]


def test_what_is_forgotten_leaves_its_name_to_another_export(checkpoints: list[Checkpoint]) -> None:
    registry, told = CheckpointRegistry(checkpoints[:1]), list[tuple[str, bool]]()
    registry.listeners.append(lambda one, is_there: told.append((one.name, is_there)))
    registry.add(checkpoints[1])
    registry.forget("second")
    assert "second" not in registry
    assert registry["second"] is checkpoints[1], "requests that came meanwhile end with it"
    other = Checkpoint.__new__(Checkpoint)
    other.name, other.manifest = "second", replace(checkpoints[1].manifest, key="another")
    registry.add(other)
    assert registry.find("second") is other
    assert told == [("second", True), ("second", False), ("second", True)]


def test_whoever_is_told_of_one_that_comes_is_told_before_anybody_can_ask_for_it(checkpoints: list[Checkpoint]) -> None:
    registry, seen = CheckpointRegistry(checkpoints[:2]), list[bool]()
    registry.listeners.append(lambda one, _: seen.append(one.name in registry))
    registry.add(checkpoints[2])
    registry.remove("first")
    registry.forget("third")
    assert seen == [False, False, False]


def test_the_last_one_stays_and_a_name_keeps_its_export(checkpoints: list[Checkpoint]) -> None:
    registry = CheckpointRegistry(checkpoints[:2])
    registry.remove("first")
    with pytest.raises(ValueError, match="second is the only checkpoint"):
        registry.remove("second")
    registry.add(checkpoints[0])
    other = Checkpoint.__new__(Checkpoint)
    other.name, other.manifest = "first", replace(checkpoints[0].manifest, key="another")
    with pytest.raises(ValueError, match="first is another export's name here"):
        registry.add(other)
