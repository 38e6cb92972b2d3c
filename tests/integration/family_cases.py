"""Requests to small checkpoints of every family, all served at once, and diffusers' pictures for them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from PIL import Image

from diffuserve.components import InProcessRunner
from diffuserve.engine import StepCosts, StepPolicy
from diffuserve.manifest import Deployment
from diffuserve.request import GenerateRequest
from diffuserve.sampling import SAMPLERS
from diffuserve.service import DiffusionService
from diffuserve.spec import UNET
from integration.families import Families, Model, Models
from unit.fakes import Recorder
from unit.pictures import encoded, mask, picture

__all__ = ["CASES", "CONTROL", "NEGATIVE", "Case", "Served", "difference", "expected", "serve", "usual"]

PROMPT, NEGATIVE = "a large red circle on a blue background", "a small green ring"
#: Of another size and ratio than any picture that is asked for.
CONTROL = mask(100, 72, (20, 24, 70, 60)).convert("RGB")
#: Of samplers by other names than ours.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}


@dataclass(frozen=True)
class Case:
    """A request. None is what the checkpoint brings: its sampler, steps or guidance; of `control`, the scale, none."""

    family: str
    sampler: str | None = None
    steps: int | None = 6
    guidance: float | None = None
    negative: str = ""
    width: int = 64
    height: int = 64
    seed: int = 3
    strength: float | None = None
    has_mask: bool = False
    control: float | None = None

    @property
    def request(self) -> GenerateRequest:
        given: dict[str, Any] = {name: encoded(image) for name, image in self.pictures.items()}
        if self.strength is not None:
            given["strength"] = self.strength
        if self.control is not None:
            given |= {"control_image": encoded(CONTROL), "control_scale": self.control}
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
            **given,
        )

    @property
    def pictures(self) -> dict[str, Any]:
        """What it begins with."""
        if self.strength is None:
            return {}
        size = (self.width, self.height)
        given = {"init_image": picture(*size)}
        return {**given, "mask_image": mask(*size)} if self.has_mask else given

    def __str__(self) -> str:
        asked = (self.family, self.sampler, self.steps, self.guidance, self.negative and "negative", self.width)
        began = (self.strength, self.has_mask and "mask", self.control is not None and f"control {self.control}")
        return " ".join(str(one) for one in (*asked, *began) if one)


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
    Case("sdxl", strength=0.6),
    Case("sdxl", "heun", steps=10, negative=NEGATIVE, strength=0.3, has_mask=True),
    Case("sdxl", strength=0.7, has_mask=True),
    Case("sdxl", "Euler a", guidance=1.0, strength=1.0, has_mask=True, seed=11),
    Case("sdxl-inpaint", steps=10, negative=NEGATIVE, strength=0.3, has_mask=True),
    Case("sdxl-inpaint", "Euler a", guidance=3.0, strength=0.7, has_mask=True, seed=11),
    Case("sdxl-inpaint", "heun", strength=1.0, has_mask=True),
    Case("sd15-inpaint", steps=10, negative=NEGATIVE, strength=0.3, has_mask=True),
    Case("sd15-inpaint", "DPM++ 2M Karras", strength=0.7, has_mask=True, width=96, height=48),
    Case("sd15-inpaint", "heun", guidance=3.0, strength=0.7, has_mask=True, seed=11),
    Case("sd15-inpaint", "Euler a", guidance=1.0, strength=1.0, has_mask=True),
    Case("sd15-inpaint", strength=1.0, has_mask=True),
    Case("turbo", steps=None),
    Case("turbo", steps=2, guidance=0.0, negative=NEGATIVE, seed=5),
    Case("turbo", "ddim", guidance=3.0),
    Case("lcm", steps=None),
    Case("lcm", guidance=1.3, negative=NEGATIVE),
    Case("lcm", "tcd", guidance=8.5, negative=NEGATIVE),
    Case("lcm", "euler", width=96, height=48),
    Case("lcm", strength=0.7, has_mask=True),
    *usual("sdxl-half", "ddim", "Euler a"),
    Case("sdxl-control", negative=NEGATIVE, control=1.0),
    Case("sdxl-control", "Euler a", guidance=1.0, control=0.6, width=96, height=48),
    Case("sdxl-control", strength=0.7, control=1.5, seed=11),
    Case("sdxl-control", "heun", strength=0.7, has_mask=True, control=1.0),
    Case("sdxl-control"),
    Case("sdxl-control", control=0.0, seed=11),
    Case("sdxl-control-half", negative=NEGATIVE, control=1.0),
    Case("inpaint-control", strength=0.7, has_mask=True, control=1.0),
    Case("inpaint-control", "Euler a", strength=1.0, has_mask=True, control=0.5, seed=11),
    Case("inpaint-control", strength=0.7, has_mask=True),
    Case("sd15-control", negative=NEGATIVE, control=1.0),
    Case("sd15-control", "Euler a", guidance=1.0, control=0.6, width=96, height=48),
    Case("sd15-control", "heun", control=2.0, seed=11),
    Case("sd15-control", strength=0.6, control=1.0),
    Case("sd15-control", "DPM++ 2M Karras", strength=0.7, has_mask=True, control=0.8),
    Case("sd15-control", strength=1.0, has_mask=True, control=1.0, seed=5),
    Case("sd15-control"),
    Case("sd15-control", control=0.0, seed=11),
]


class Watched:
    """UNets whose calls wait until they may begin, and are written down."""

    def __init__(self, models: Models) -> None:
        #: By checkpoint: the rows of each call for 64 x 64 pixels, and the types of its inputs.
        self.rows: dict[str, list[int]] = {}
        self.types: dict[str, dict[str, torch.dtype]] = {}
        self.begin = threading.Event()
        self.models = {name: self._watched(name, model) for name, model in models.items()}

    def _watched(self, name: str, model: Model) -> Model:
        checkpoint = name.removesuffix(f"_{UNET}")

        def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            assert self.begin.wait(600)
            self.types[checkpoint] = {name: one.dtype for name, one in inputs.items()}
            if inputs["sample"].shape[2:] == (8, 8):
                self.rows.setdefault(checkpoint, []).append(len(inputs["sample"]))
            return model(inputs)

        return model if checkpoint == name else run


class Asked(Protocol):
    """A case: the checkpoint and what it is asked for. Hashable."""

    @property
    def family(self) -> str: ...

    @property
    def request(self) -> GenerateRequest: ...


@dataclass
class Served:
    """Pictures and what was told of them; and of each checkpoint's UNet the rows and types that it was called with."""

    rows: dict[str, list[int]]
    types: dict[str, dict[str, torch.dtype]]
    pictures: dict[Any, Any] = field(default_factory=dict)
    infos: dict[Any, dict[str, Any]] = field(default_factory=dict)


def serve(deployment: Deployment, models: Models, cases: Sequence[Asked] = CASES) -> Served:
    """All cases of the deployment's checkpoints at once, through one service: they join before the second step."""
    watched = Watched(models)
    policy = StepPolicy(costs=StepCosts(), max_rows=lambda group: 64, efficiency=None, brisk=None)
    service = DiffusionService(deployment, InProcessRunner(watched.models), policy=policy)
    replies = {case: Recorder() for case in cases if case.family in deployment.checkpoints}
    for case, reply in replies.items():
        service.submit(case.request, reply)
    prepared = threading.Event()
    service._prepare.submit((1000.0,), prepared.set)
    assert prepared.wait(600)
    watched.begin.set()
    served = Served(watched.rows, watched.types)
    for case, reply in replies.items():
        assert reply.ended.wait(600)
        assert reply.error is None, f"{case}: {reply.error}"
        (event,) = reply.events
        served.pictures[case] = np.asarray(Image.open(BytesIO(event.data))).astype(int)
        served.infos[case] = event.info
    service.close()
    return served


def expected(families: Families, case: Case, **more: Any) -> Any:
    """diffusers' picture, with some of the pipeline's arguments changed."""
    family = case.family.removesuffix("-half")
    kind = "XL" if family in ("sdxl", "sdxl-inpaint", "sdxl-control", "turbo") else ""
    begun = "" if case.strength is None else "Inpaint" if case.has_mask else "Img2Img"
    controlled = "" if case.control is None else "ControlNet"
    class_name = f"StableDiffusion{kind}{controlled}{begun}Pipeline"
    if family == "lcm" and case.sampler is None and not begun:
        class_name = "LatentConsistencyModelPipeline"
    pipeline = families.pipeline(family, class_name)
    own = pipeline.scheduler
    defaults = {"sd15": (20, 2.0), "lcm": (4, 8.5), "turbo": (4, 0.0), "sdxl": (20, 5.0), "sdxl-inpaint": (20, 5.0)}
    defaults |= {"sd15-control": (20, 2.0), "sdxl-control": (20, 5.0)}
    steps, guidance = defaults.get(family, (20, 7.5))
    asked = {
        "num_inference_steps": case.steps or steps,
        "guidance_scale": guidance if case.guidance is None else case.guidance,
        "generator": torch.Generator().manual_seed(case.seed),
        **({} if begun == "Img2Img" and not controlled else {"width": case.width, "height": case.height}),
    }
    if begun:
        given = case.pictures
        asked |= {"image": given.pop("init_image"), "strength": case.strength, **given}
    if case.control is not None:
        asked |= {"control_image" if begun else "image": CONTROL, "controlnet_conditioning_scale": case.control}
    if class_name != "LatentConsistencyModelPipeline":
        asked["negative_prompt"] = case.negative or None
    if case.sampler:
        known = SAMPLERS.get(case.sampler)
        scheduler, options = (known.scheduler_class, known.config) if known else SCHEDULERS[case.sampler]
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config, **options)
    try:
        return np.asarray(pipeline(PROMPT, **{**asked, **more}).images[0]).astype(int)
    finally:
        pipeline.scheduler = own


def difference(first: Any, second: Any) -> int:
    """Of two pictures, the largest of any value."""
    return int(np.abs(first - second).max())
