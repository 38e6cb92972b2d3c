"""Components that a deployment has already: a checkpoint names an equal one instead of bringing a copy of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from diffuserve.manifest import Component, Deployment, Manifest

__all__ = ["models_in_use", "share_components"]

_CONFIG_NAME: Final = re.compile(r'^name: ".*"$', re.MULTILINE)
_DIGITS: Final = 8


def share_components(root: Path, staging: Path, manifest: Manifest) -> Manifest:
    """The manifest of what is staged, with models of the deployment `root` in place of those that are equal to them.

    Equal are graphs with the same bytes, and engines that were built alike from such; their configurations too. What is
    left of the staged models gets another name where another checkpoint uses the one that it has.
    """
    others = [one for one in _manifests(root) if one.name != manifest.name]
    in_use = models_in_use(root, but=manifest.name)
    components: dict[str, Component] = {}
    for name, component in manifest.components.items():
        staged = staging / "models" / component.model
        known = (one for other in others if other.target == manifest.target for one in other.components.values())
        equal = next((one for one in known if _are_equal(component, one, staged, root / "models" / one.model)), None)
        if equal is not None:
            shutil.rmtree(staged)
            components[name] = replace(component, model=equal.model, engine=equal.engine, sha256=equal.sha256)
        elif component.model in in_use:
            components[name] = replace(component, model=_renamed(staged, component.sha256[:_DIGITS]))
        else:
            components[name] = component
    shared = replace(manifest, components=components)
    (staging / "checkpoints" / manifest.name / "manifest.json").write_text(shared.to_json(), encoding="utf-8")
    return shared


def models_in_use(root: Path, but: str = "") -> set[str]:
    """The models that manifests of a deployment name, those of the checkpoint `but` aside."""
    return {one.model for other in _manifests(root) if other.name != but for one in other.components.values()}


def _manifests(root: Path) -> Iterator[Manifest]:
    """Those that this version reads: of others no component can be shared."""
    for path in sorted((root / "checkpoints").glob("*/manifest.json")):
        try:
            yield Deployment(root, ()).manifest(path.parent.name)
        except (OSError, ValueError):
            continue


def _are_equal(one: Component, other: Component, folder: Path, other_folder: Path) -> bool:
    if _facts(one) != _facts(other):
        return False
    try:
        return _configs(folder) == _configs(other_folder)
    except OSError:  # it is not whole
        return False


def _facts(component: Component) -> tuple[Any, ...]:
    """What makes a component what it is. An engine's own bytes differ from build to build."""
    tensors = component.inputs, component.outputs, component.precision, component.float32
    engine = component.engine
    if engine is None:
        return *tensors, component.sha256, component.bytes
    profiles = tuple(one.sides for one in engine.profiles)
    return *tensors, engine.onnx_sha256, engine.builder, engine.version, engine.precision, engine.devices, profiles


def _configs(folder: Path) -> dict[str, str]:
    """The configurations of a model folder, without its name."""
    return {
        path.relative_to(folder).as_posix(): _CONFIG_NAME.sub("", path.read_text(encoding="utf-8"))
        for path in _config_files(folder)
    }


def _config_files(folder: Path) -> Iterable[Path]:
    return sorted(folder.rglob("*.pbtxt"))


def _renamed(folder: Path, suffix: str) -> str:
    name = f"{folder.name}_{suffix}"
    for path in _config_files(folder):
        path.write_text(_CONFIG_NAME.sub(f'name: "{name}"', path.read_text(encoding="utf-8")), encoding="utf-8")
    folder.rename(folder.with_name(name))
    return name
