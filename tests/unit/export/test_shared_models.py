"""Checkpoints with equal components name one model; whoever is exported again leaves the others theirs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from diffuserve.manifest import Deployment
from diffuserve_export.report import Report
from diffuserve_export.shared_models import share_components
from diffuserve_export.workspace import SUMS_FILE, Workspace, locked_workspace, model_name
from unit.export.conftest import Exported


@pytest.fixture
def deployment(exported: Exported, tmp_path: Path) -> Path:
    return shutil.copytree(exported.out, tmp_path / "deployment")


def export(workspace: Workspace, exported: Exported, name: str, changed: str = "", mark: str = "") -> None:
    """What an export of `name` does when the graphs are made, which are those of `tiny` but for one component."""
    with workspace.staging() as staging:
        folder = shutil.copytree(
            exported.out / "checkpoints" / "tiny",
            staging / "checkpoints" / name,
            ignore=shutil.ignore_patterns(SUMS_FILE),
        )
        components = {}
        for component, one in exported.manifest.components.items():
            model = shutil.copytree(
                exported.out / "models" / one.model, staging / "models" / model_name(name, component)
            )
            text = (model / "config.pbtxt").read_text().replace(f'"{one.model}"', f'"{model.name}"')
            (model / "config.pbtxt").write_text(text)
            components[component] = replace(one, model=model.name)
            if component == changed:
                (model / "1" / "mark").write_text(mark)
                components[component] = replace(components[component], sha256=f"{mark:0<64}")
        manifest = replace(exported.manifest, name=name, components=components)
        (folder / "manifest.json").write_text(manifest.to_json())
        share_components(workspace.root, staging, manifest)
        workspace.seal(staging, name)
        workspace.publish(staging, name)


def models(root: Path) -> dict[str, dict[str, str]]:
    opened = Deployment.load(root)
    named = {
        name: {component: one.model for component, one in opened.manifest(name).components.items()}
        for name in opened.checkpoints
    }
    there = {path.name for path in (root / "models").iterdir()}
    assert there == {model for of_one in named.values() for model in of_one.values()}, "all that is named, and no more"
    for name in there:
        assert f'name: "{name}"' in (root / "models" / name / "config.pbtxt").read_text()
    return named


def test_an_equal_component_is_there_once_and_the_other_is_its_own(exported: Exported, deployment: Path) -> None:
    with locked_workspace(deployment, Report()) as workspace:
        export(workspace, exported, "other", "unet", "beef")
        named = models(deployment)
        assert named["other"] == {**named["tiny"], "unet": "other_unet"}
        for name in ("tiny", "other"):
            assert workspace.current(name, exported.manifest.key) is not None
        (deployment / "models" / named["tiny"]["vae_decoder"] / "1" / "model.onnx").write_bytes(b"damaged")
        for name in ("tiny", "other"):
            assert workspace.current(name, exported.manifest.key) is None, "it is a part of both"


def test_a_new_version_takes_nothing_from_those_that_share_the_old_one(exported: Exported, deployment: Path) -> None:
    with locked_workspace(deployment, Report()) as workspace:
        export(workspace, exported, "other", "unet", "beef")
        export(workspace, exported, "tiny", "vae_decoder", "cafe")
        named = models(deployment)
        assert named["tiny"]["vae_decoder"] == "tiny_vae_decoder_cafe0000"
        assert named["other"]["vae_decoder"] == "tiny_vae_decoder"
        assert not (deployment / "models" / "tiny_vae_decoder" / "1" / "mark").exists()
        assert workspace.current("other", exported.manifest.key) is not None
        # When nobody names it any more, it goes.
        export(workspace, exported, "other", "vae_decoder", "feed")
        assert models(deployment)["other"]["vae_decoder"] == "other_vae_decoder"
        export(workspace, exported, "other")
        assert models(deployment)["other"]["vae_decoder"] == "other_vae_decoder"
        # Back to what it was: the own one goes, and the common one is found again.
        export(workspace, exported, "tiny")
        named = models(deployment)
        assert named["tiny"]["vae_decoder"] == named["other"]["vae_decoder"] == "other_vae_decoder"


def test_what_looks_equal_and_is_configured_otherwise_is_not_shared(exported: Exported, deployment: Path) -> None:
    config = deployment / "models" / "tiny_vae_decoder" / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "0"', 'string_value: "1"'))
    with locked_workspace(deployment, Report()) as workspace:
        export(workspace, exported, "other")
    assert models(deployment)["other"] == {**models(deployment)["tiny"], "vae_decoder": "other_vae_decoder"}
