"""The shapes checkpoint through every GPU target, and each deployment served by a real Triton.

TensorRT-RTX's engines are really built. TensorRT is on no machine without a GPU, so a file stands for its engines.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CHECKPOINT, ROOT
from diffuserve.engine_files import ENGINE_FILE, FACTS_FILE, read_facts
from diffuserve.manifest import Deployment
from diffuserve.profiles import EngineFacts
from diffuserve.request import GenerateRequest
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.spec import UNET, VAE_DECODER
from diffuserve_client import Client
from diffuserve_export import ExportOptions, assembly, export_checkpoint
from diffuserve_export.digests import FileHashes
from diffuserve_export.engines import EngineOptions, EngineRequest, device
from diffuserve_export.engines import model as engine_model
from diffuserve_export.graphs import Graph
from integration.swapped import parsed_config, swap_engines
from unit.export.conftest import float32_graph

REQUEST = GenerateRequest(prompt="a large red circle on a blue background", seed=4, steps=4)


@pytest.fixture(scope="module")
def rtx_deployment() -> Path:
    """Made once, and again when the checkpoint or the export changes."""
    out = ROOT / "build" / "deployments" / "shapes-rtx"
    engine = EngineOptions(compute_capability="89")
    export_checkpoint(
        ExportOptions(checkpoint=str(CHECKPOINT), out=out, name="rtx", target="tensorrt-rtx", engine=engine)
    )
    return out


def test_text_encoders_are_built_with_their_own_layers_and_vectors(rtx_deployment: Path) -> None:
    manifest = Deployment.load(rtx_deployment).manifest("rtx")
    encoder = manifest.components["text_encoder"]
    assert [one.name for one in encoder.inputs] == ["input_ids", "clip_skip", "embeddings"]
    assert encoder.engine is not None
    (profile,) = encoder.engine.profiles
    assert {name: side.max for name, side in profile.sides.items()} == {"rows": 64, "vectors": 64 * 75}
    unet = manifest.components[UNET].engine
    assert unet is not None
    assert {one.sides["tokens"].max for one in unet.profiles} == {6 * 77}


def graphs(deployment: Path) -> dict[str, Path]:
    components = Deployment.load(deployment).manifest("shapes").components
    return {name: deployment / "models" / one.model / "1" / "model.onnx" for name, one in components.items()}


@pytest.fixture(scope="module")
def every_target(rtx_deployment: Path, deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One deployment with a checkpoint for each GPU target."""
    out = shutil.copytree(rtx_deployment, tmp_path_factory.mktemp("targets") / "deployment")
    with pytest.MonkeyPatch.context() as patched:
        known = graphs(deployment)

        def copy(plan: Any, component: str, path: Path, report: Any) -> Graph:
            shutil.copyfile(known[component], path)
            return float32_graph(plan.checkpoint, component, path)

        patched.setattr(assembly, "graph_from_component", copy)
        for module in (device, engine_model):
            patched.setattr(module, "engine_devices", lambda *_: (("8.0",), "NVIDIA A100-SXM4-80GB"))
            patched.setattr(module, "builder_version", lambda *_: "10.13.3")
        patched.setattr(engine_model, "engine_from_onnx", stand_in(out.parent))
        for target, name in (("tensorrt", "plan"), ("onnxruntime", "ort")):
            export_checkpoint(ExportOptions(checkpoint=str(CHECKPOINT), out=out, name=name, target=target))
    return out


def stand_in(root: Path) -> Any:
    """Instead of `engine_from_onnx`: a folder as it makes them, with a file that is no engine."""

    def engine_from_onnx(onnx: Path, request: EngineRequest, cache: Path, note: Any) -> Path:
        folder = root / "engines" / onnx.parents[1].name
        folder.mkdir(parents=True)
        (folder / ENGINE_FILE).write_bytes(b"plan")
        facts = EngineFacts(
            builder=request.target,
            version=request.version,
            precision=request.precision,
            devices=request.capabilities,
            profiles=request.profiles,
            onnx_sha256="0",
            sha256=FileHashes(folder / "hashes").sha256(folder / ENGINE_FILE),
            bytes=4,
        )
        (folder / FACTS_FILE).write_text(json.dumps(dataclasses.asdict(facts)))
        return folder

    return engine_from_onnx


def test_rtx_engines_are_built_and_described(rtx_deployment: Path) -> None:
    manifest = Deployment.load(rtx_deployment).manifest("rtx")
    for described in manifest.components.values():
        folder = rtx_deployment / "models" / described.model / "1"
        facts = read_facts(folder)
        assert described.engine == facts
        assert facts.devices == ("8.9",)
        assert facts.bytes == described.bytes == (folder / ENGINE_FILE).stat().st_size
        assert all(one.activation_bytes > 0 for one in facts.profiles)
        assert not (folder / "model.onnx").exists()
    assert manifest.max_rows(UNET, 64, 64) == 64
    assert manifest.max_rows(VAE_DECODER, 128, 128) == 4
    assert manifest.max_rows(VAE_DECODER, 192, 192) == 0, "those are decoded in tiles"


def test_the_second_export_does_nothing(rtx_deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "assemble", lambda *_: pytest.fail("it was exported again"))
    engine = EngineOptions(compute_capability="8.9")
    options = {"checkpoint": str(CHECKPOINT), "name": "rtx", "target": "tensorrt-rtx", "engine": engine}
    export_checkpoint(ExportOptions(out=rtx_deployment, **options))  # type: ignore[arg-type]


def test_every_target_has_the_same_names_and_shapes(every_target: Path, deployment: Path) -> None:
    opened = Deployment.load(every_target)
    assert opened.checkpoints == ("rtx", "plan", "ort")
    reference = Deployment.load(deployment).manifest("shapes").components
    for name in opened.checkpoints:
        for component, described in opened.manifest(name).components.items():
            assert described.model == f"{name}_{component}"
            assert (described.inputs, described.outputs) == (reference[component].inputs, reference[component].outputs)
            config, expected = (
                parsed_config(root / "models" / model)
                for root, model in ((every_target, described.model), (deployment, reference[component].model))
            )
            assert list(config.input) == list(expected.input)
            assert list(config.output) == list(expected.output)


@pytest.fixture(scope="module")
def swapped_server(
    every_target: Path, deployment: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    root = shutil.copytree(every_target, tmp_path_factory.mktemp("swapped") / "deployment")
    swap_engines(root, graphs(deployment))
    log = root.parent / "triton.log"
    # The public model as on a GPU: its tensors may stay where they are.
    options = ServerOptions(
        deployment=root,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=log,
        triton_arguments=("--model-config-name=gpu",),
    )
    with TritonServer(options) as server:
        server.wait_ready()
        yield server


@pytest.mark.parametrize("name", ["rtx", "plan", "ort"])
def test_every_deployment_makes_the_same_picture(swapped_server: TritonServer, client: Client, name: str) -> None:
    expected = np.asarray(client.generate(REQUEST).image)
    with Client(swapped_server.grpc_url) as swapped:
        found = np.asarray(swapped.generate(dataclasses.replace(REQUEST, checkpoint=name)).image)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
