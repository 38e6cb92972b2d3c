"""Each family through the whole service, against diffusers' own pipeline on the same checkpoint and seed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from acceptance.families import FAMILIES, Families, export_families
from conftest import ROOT
from diffuserve.components import InProcessRunner
from diffuserve.engine import StepCosts, StepPolicy
from diffuserve.manifest import Deployment
from diffuserve.request import GenerateRequest
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.service import DiffusionService
from diffuserve.spec import UNET
from diffuserve_client import Client
from peers.serial import onnx_model
from unit.fakes import Recorder

PROMPT, NEGATIVE = "a large red circle on a blue background", "a small green ring"
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}


@dataclass(frozen=True)
class Case:
    """A request. None is what the checkpoint brings: its sampler, steps or guidance."""

    family: str
    sampler: str | None = None
    steps: int | None = 6
    guidance: float | None = None
    negative: str = ""
    width: int = 64
    height: int = 64
    seed: int = 3

    @property
    def request(self) -> GenerateRequest:
        return GenerateRequest(
            prompt=PROMPT,
            negative_prompt=self.negative,
            checkpoint=self.family,
            width=self.width,
            height=self.height,
            steps=self.steps,
            guidance_scale=self.guidance,
            sampler=self.sampler,
            seed=self.seed,
        )

    @property
    def rows(self) -> int:
        if self.family in ("lcm", "turbo") and self.guidance in (None, 8.5, 1.3, 0.0):
            return 1
        return 1 if self.guidance == 1.0 else 2

    def __str__(self) -> str:
        asked = (self.family, self.sampler, self.steps, self.guidance, self.negative and "negative", self.width)
        return " ".join(str(one) for one in asked if one)


def usual(family: str, *samplers: str) -> list[Case]:
    """What every family with guidance is asked for."""
    return [
        Case(family),
        Case(family, negative=NEGATIVE),
        Case(family, guidance=1.0, negative=NEGATIVE),
        Case(family, guidance=4.0, negative=NEGATIVE, width=96, height=48),
        *(Case(family, sampler, guidance=3.0, negative=NEGATIVE, seed=11) for sampler in samplers),
    ]


CASES = [
    *usual("sd15", "euler"),
    *usual("sd21", "euler", "DPM++ 2M Karras"),
    *usual("sdxl", "ddim", "Euler a", "heun"),
    Case("sdxl", guidance=3.0, seed=11),
    Case("turbo", steps=None),
    Case("turbo", steps=2, guidance=0.0, negative=NEGATIVE, seed=5),
    Case("turbo", "ddim", guidance=3.0),
    Case("lcm", steps=None),
    Case("lcm", guidance=1.3, negative=NEGATIVE),
    Case("lcm", "tcd", guidance=8.5, negative=NEGATIVE),
    Case("lcm", "euler", width=96, height=48),
    *usual("sdxl-half", "ddim", "Euler a"),
]


class Sessions:
    """Runs a deployment's graphs in ONNX Runtime here, and writes down what the UNets were called with."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        #: By model: the rows of each call, and the types of its inputs.
        self.rows: dict[str, list[int]] = {}
        self.types: dict[str, dict[str, torch.dtype]] = {}
        self.open = threading.Event()
        models = (one.name for one in deployment.models.iterdir())
        self.runner = InProcessRunner({name: self._model(name) for name in models})

    def _model(self, name: str) -> Any:
        session = cache(lambda: onnx_model(self.deployment.models / name / "1" / "model.onnx"))

        def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if name.endswith(UNET):
                assert self.open.wait(60)
                self.rows.setdefault(name, []).append(len(inputs["sample"]))
                self.types[name] = {name: one.dtype for name, one in inputs.items()}
            return session()(inputs)

        return run


@dataclass
class Served:
    sessions: Sessions
    pictures: dict[Case, Any]
    infos: dict[Case, dict[str, Any]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def exported(families: Families, deployment: Path) -> Deployment:
    """All of them in one deployment; made once, and again when a checkpoint or the export changes."""
    return export_families(families, tuple(FAMILIES), ROOT / "build" / "deployments" / "families", deployment)


@pytest.fixture(scope="module")
def served(exported: Deployment) -> Served:
    """Every case at once, through one service. The first UNet call waits until all have joined."""
    sessions = Sessions(exported)
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
    service = DiffusionService(exported, sessions.runner, policy=policy)
    replies = {case: Recorder() for case in CASES}
    for case, reply in replies.items():
        service.submit(case.request, reply)
    prepared = threading.Event()
    service._prepare.submit((1000.0,), prepared.set)
    assert prepared.wait(60)
    sessions.open.set()
    for reply in replies.values():
        assert reply.wait().error is None
    service.close()
    events = {case: reply.events[0] for case, reply in replies.items()}
    pictures = {case: np.asarray(Image.open(BytesIO(event.data))).astype(int) for case, event in events.items()}
    return Served(sessions, pictures, {case: event.info for case, event in events.items()})


def expected(families: Families, case: Case, **more: Any) -> Any:
    """diffusers' picture."""
    family = case.family.removesuffix("-half")
    class_name = "StableDiffusionXLPipeline" if family in ("sdxl", "turbo") else "StableDiffusionPipeline"
    if family == "lcm" and case.sampler is None:
        class_name = "LatentConsistencyModelPipeline"
    pipeline = families.pipeline(family, class_name)
    own = pipeline.scheduler
    defaults = {"sd15": (20, 2.0), "lcm": (4, 8.5), "turbo": (4, 0.0), "sdxl": (20, 5.0)}
    steps, guidance = defaults.get(family, (20, 7.5))
    asked = {
        "num_inference_steps": case.steps or steps,
        "guidance_scale": guidance if case.guidance is None else case.guidance,
        "width": case.width,
        "height": case.height,
        "generator": torch.Generator().manual_seed(case.seed),
        **more,
    }
    if class_name != "LatentConsistencyModelPipeline":
        asked["negative_prompt"] = case.negative or None
    if case.sampler:
        scheduler, options = SCHEDULERS[case.sampler]
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config, **options)
    try:
        return np.asarray(pipeline(PROMPT, **asked).images[0]).astype(int)
    finally:
        pipeline.scheduler = own


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_diffusers_picture(served: Served, families: Families, case: Case) -> None:
    assert np.abs(served.pictures[case] - expected(families, case)).max() <= 2


def test_a_real_triton_serves_several_in_one_deployment(exported: Deployment, families: Families) -> None:
    cases = [
        Case("sdxl", negative=NEGATIVE),
        Case("sdxl", "Euler a", guidance=3.0),
        Case("sd15"),
        Case("turbo", steps=2),
    ]
    options = ServerOptions(deployment=exported.root, http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client, ThreadPoolExecutor(len(cases)) as pool:
            results = list(pool.map(lambda case: client.generate(case.request), cases))
    for case, result in zip(cases, results, strict=True):
        assert result.images[0].info["checkpoint"] == case.family
        assert np.abs(np.asarray(result.image).astype(int) - expected(families, case)).max() <= 2
