"""ControlNets at length: with adapters too, an engine of TensorRT-RTX, and random mixes that never bleed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CHECKPOINT, ROOT
from diffuserve.engine_files import ENGINE_FILE
from diffuserve.manifest import Deployment, Manifest
from diffuserve.sampling import SAMPLERS
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.spec import UNET
from diffuserve_client import Client
from diffuserve_export import ExportOptions, export_checkpoint
from diffuserve_export.engines import EngineOptions
from diffuserve_export.export import plan_export
from diffuserve_export.graphs import graph_from_component
from diffuserve_export.options import DECOMPOSED_ATTENTION
from integration.families import Families, exported_families
from integration.family_cases import difference
from integration.lora_cases import LoraCase, pictured
from integration.swapped import parsed_config
from shapes_recipe.control import posed, silhouette
from shapes_recipe.world import trained_scenes
from unit.export.conftest import Recorder, without_logs
from unit.export.controlnets import random_controlnet, with_middle
from unit.export.pipelines import random_pipeline
from unit.pictures import encoded

MIXES = 60
COMPANY = 11


@pytest.fixture(scope="module")
def engines() -> tuple[Path, Manifest]:
    """The shapes checkpoint with its ControlNet, in half precision, for a card of compute capability 8.9."""
    out = ROOT / "build" / "deployments" / "control-rtx"
    options = ExportOptions(
        checkpoint=str(CHECKPOINT),
        controlnet=str(CHECKPOINT.with_name("shapes-control")),
        out=out,
        name="rtx",
        target="tensorrt-rtx",
        precision="fp16",
        engine=EngineOptions(compute_capability="89"),
    )
    return out, export_checkpoint(options)


def test_tensorrt_rtx_builds_a_unet_with_its_controlnet(engines: tuple[Path, Manifest]) -> None:
    out, manifest = engines
    unet = manifest.components[UNET]
    assert manifest.conditioning.control
    assert unet.engine is not None
    found = {one.name: (one.datatype, one.shape) for one in unet.inputs}
    assert found["control"] == ("FP16", ("rows", 3, "height", "width"))
    assert found["control_scale"] == ("FP16", ("rows",))
    for profile in unet.engine.profiles:
        for side in ("height", "width"):
            pixels, latents = profile.sides[side], profile.sides[f"latent_{side}"]
            assert (pixels.min, pixels.opt, pixels.max) == (8 * latents.min, 8 * latents.opt, 8 * latents.max)
    assert unet.engine.max_rows(manifest.sides(64, 64)) == 64
    assert (out / "models" / unet.model / "1" / ENGINE_FILE).stat().st_size == unet.engine.bytes
    config = {one.name: list(one.dims) for one in parsed_config(out / "models" / unet.model).input}
    assert (config["control"], config["control_scale"]) == ([-1, 3, -1, -1], [-1])
    print(f"engine of {unet.engine.bytes / 1e6:.1f} MB, built in {unet.engine.build_seconds:.0f} s")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_with_adapters_and_a_controlnet_is_verified(tmp_path: Path, precision: str) -> None:
    """Of SDXL's layout, which is told most, with operators as an engine has them."""
    pipeline = random_pipeline("sdxl")
    pipeline.unet = with_middle(pipeline.unet)
    pipeline.save_pretrained(tmp_path / "sdxl")
    random_controlnet(pipeline.unet).save_pretrained(tmp_path / "controlnet")
    options = ExportOptions(
        checkpoint=str(tmp_path / "sdxl"), controlnet=str(tmp_path / "controlnet"), lora_rank=2, out=tmp_path / "out"
    )
    plan = plan_export(options)
    plan = replace(plan, precisions={**plan.precisions, UNET: precision}, opset=DECOMPOSED_ATTENTION)
    (tmp_path / "unet" / "1").mkdir(parents=True)
    with without_logs():
        graph = graph_from_component(plan, UNET, tmp_path / "unet" / "1" / "model.onnx", Recorder())
    datatype = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}[precision]
    found = {one.name: one.datatype for one in graph.ports[0]}
    assert found.pop("timestep") == found.pop("time_ids") == "FP32"
    assert found.pop("lora_index") == "INT64"
    assert set(found.values()) == {datatype}
    assert {"control", "control_scale", "lora"} <= set(found)


#: LoRAs alone, a control alone, both, neither; and a control that has no part in it.
MIXED = [
    LoraCase("sd15-control", loras, negative, guidance, seed, steps=12, control=control)
    for loras, negative, guidance, seed, control in (
        (("night",), "", 1.0, 3, None),
        ((), "", 1.0, 3, 1.0),
        (("night",), "", 1.0, 3, 1.0),
        ((), "", 1.0, 3, None),
        (("night:0.5", "bar:0.5"), "", 1.0, 5, 1.0),
        (("bar",), "", 1.0, 5, 0.0),
        (("bar:-0.7",), "a small green ring", 4.0, 11, 0.6),
        (("night:0.8",), "a small green ring", 4.0, 11, 2.0),
    )
]


def test_loras_and_controls_share_calls_on_a_real_triton(
    deployment: Path, loras: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every one is diffusers' picture, by a pipeline with the same ControlNet, adapters and weights."""
    families, calls = Families(tmp_path_factory.mktemp("adapted")), tmp_path_factory.mktemp("calls") / "calls.jsonl"
    out = ROOT / "build" / "deployments" / "control-lora"
    exported = exported_families(families, ["sd15-control"], out, deployment, lora_rank=8)
    environment = {"DIFFUSERVE_CALL_LOG": str(calls)}
    options = ServerOptions(
        deployment=exported.root, loras=loras, http_port=0, grpc_port=0, metrics_port=0, environment=environment
    )
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client, ThreadPoolExecutor(len(MIXED)) as pool:
            together = list(pool.map(lambda case: client.generate(case.request).image, MIXED))
    files = {path.stem: path for path in loras.glob("*.safetensors")}
    found = []
    for case, picture in zip(MIXED, together, strict=True):
        kind = "StableDiffusionPipeline" if case.control is None else "StableDiffusionControlNetPipeline"
        expected = pictured(families.pipeline(case.family, kind), case, files)
        found.append(difference(np.asarray(picture).astype(int), expected))
        assert found[-1] <= 2, case
    unet = exported.manifest("sd15-control").components[UNET].model
    shapes = [call["shapes"] for call in map(json.loads, calls.read_text().splitlines()) if call["model"] == unet]
    most = max(shapes, key=lambda shape: int(shape["sample"][0]))
    assert most["lora"][0] >= 3, "two adapters and the zeros"
    assert most["control"][0] == most["sample"][0] >= 4
    print(f"differences {found}; the fullest call had {most['sample'][0]} rows, {most['lora'][0]} adapters")


@pytest.fixture(scope="module")
def client_of_control(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    families = Families(tmp_path_factory.mktemp("controlled"))
    out = ROOT / "build" / "deployments" / "control"
    exported: Deployment = exported_families(families, ["sd15-control"], out, deployment)
    with TritonServer(ServerOptions(deployment=exported.root, http_port=0, grpc_port=0, metrics_port=0)) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client:
            yield client


def _random_request(rng: random.Random) -> dict[str, Any]:
    request = {
        "prompt": rng.choice(trained_scenes()).caption,
        "steps": rng.choice([2, 3, 4, 6, 8]),
        "sampler": rng.choice(list(SAMPLERS)),
        "guidance_scale": rng.choice([1.0, 2.0, 7.5]),
        "seed": rng.randrange(2**32),
        "width": rng.choice([64, 64, 96]),
        "height": 64,
    }
    if rng.random() < 0.6:
        scene = posed(np.random.default_rng(rng.randrange(2**32)))
        request |= {"control_image": encoded(silhouette(scene)), "control_scale": rng.choice([0.0, 0.4, 1.0, 2.0])}
    return request


def test_a_picture_is_the_same_alone_and_among_others(client_of_control: Client) -> None:
    rng, differences = random.Random(300), list[int]()
    with ThreadPoolExecutor(COMPANY + 1) as pool:
        for _ in range(MIXES):
            requests = [_random_request(rng) for _ in range(COMPANY + 1)]
            together = list(pool.map(lambda one: client_of_control.generate(**one).image, requests))
            chosen = rng.randrange(len(requests))
            alone = np.asarray(client_of_control.generate(**requests[chosen]).image).astype(int)
            differences.append(int(np.abs(alone - np.asarray(together[chosen]).astype(int)).max()))
            assert differences[-1] <= 1, requests[chosen]
    identical = sum(one == 0 for one in differences)
    print(f"{identical} of {MIXES} identical, the others differ by 1/255")
