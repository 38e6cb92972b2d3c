"""Each family's graphs through the whole service, in fp16 too, and three of them in one real Triton."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT
from diffuserve.checkpoint import Checkpoint
from diffuserve.components import InProcessRunner
from diffuserve.engine import Group
from diffuserve.manifest import Deployment
from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client
from integration.families import FAMILIES, Families, Model, Models, exported_families
from integration.family_cases import CASES, NEGATIVE, Case, Served, difference, expected, serve
from peers.serial import onnx_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def exported(families: Families, deployment: Path) -> Deployment:
    """All of them in one deployment; made once, and again when a checkpoint or the export changes."""
    return exported_families(families, tuple(FAMILIES), ROOT / "build" / "deployments" / "families", deployment)


@pytest.fixture(scope="module")
def models(exported: Deployment) -> Models:
    return {path.name: _onnx_model(path / "1" / "model.onnx") for path in exported.models.iterdir()}


def _onnx_model(graph: Path) -> Model:
    session = cache(lambda: onnx_model(graph))  # not every graph is needed
    return lambda inputs: session()(inputs)


@pytest.fixture(scope="module")
def served(exported: Deployment, models: Models, one_thread: None) -> Served:
    return serve(exported, models)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_diffusers_picture(served: Served, families: Families, case: Case) -> None:
    found = difference(served.pictures[case], expected(families, case))
    print(f"{case}: {found}/255")
    assert found <= 2


def test_half_precision_is_told_times_in_float32(served: Served) -> None:
    half, single = torch.float16, torch.float32
    assert served.types["sdxl-half"] == {
        "sample": half,
        "timestep": single,
        "encoder_hidden_states": half,
        "text_embeds": half,
        "time_ids": single,
    }
    assert set(served.types["sdxl"].values()) == {single}


@pytest.mark.parametrize("family", FAMILIES)
def test_trials_are_calls_that_the_engines_take(exported: Deployment, models: Models, family: str) -> None:
    checkpoint = Checkpoint(exported, family, InProcessRunner(models))
    outputs = checkpoint.trial(Group(family, height=48, width=96), rows=3)()
    assert isinstance(outputs, dict)
    assert outputs["model_output"].shape == (3, 4, 6, 12)


def test_a_real_triton_serves_several_in_one_deployment(exported: Deployment, families: Families) -> None:
    cases = [
        Case("sdxl", negative=NEGATIVE),
        Case("sdxl", "Euler a", guidance=3.0),
        Case("sd15"),
        Case("turbo", steps=2),
        Case("lcm", steps=None),
    ]
    options = ServerOptions(deployment=exported.root, http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client, ThreadPoolExecutor(len(cases)) as pool:
            results = list(pool.map(lambda case: client.generate(case.request), cases))
    for case, result in zip(cases, results, strict=True):
        assert result.images[0].info["checkpoint"] == case.family
        assert difference(np.asarray(result.image).astype(int), expected(families, case)) <= 2
