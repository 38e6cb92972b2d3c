"""A deployment with no weights: the real service over component functions whose answers can be computed by hand."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffuserve.components import InProcessRunner
from diffuserve.errors import DiffuserveError
from diffuserve.manifest import Component, Deployment, LatentColours, Manifest, Range, TensorShape
from diffuserve.request import Event
from diffuserve.sampling.matrix import REFERENCE

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "shapes" / "tokenizer" / "tokenizer.json"
Model = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


UNET_INPUTS = (
    TensorShape("sample", "FP32", ("rows", 4, "latent_height", "latent_width")),
    TensorShape("timestep", "FP32", ("rows",)),
    TensorShape("encoder_hidden_states", "FP32", ("rows", "tokens", 1)),
)

CONTROL_INPUTS = (
    TensorShape("control", "FP32", ("rows", 3, "height", "width")),
    TensorShape("control_scale", "FP32", ("rows",)),
)


ENCODER_INPUTS = (
    TensorShape("input_ids", "INT32", ("rows", 77)),
    TensorShape("clip_skip", "INT32", ("rows",)),
    TensorShape("embeddings", "FP32", ("vectors", 1)),
)


def component(name: str) -> Component:
    inputs = UNET_INPUTS if name == "unet" else ENCODER_INPUTS if name.startswith("text_encoder") else ()
    return Component(model=name, inputs=inputs, outputs=(), sha256="0" * 64, bytes=0)


def write_deployment(root: Path, *names: str, max_rows: int = 64, **values: Any) -> Deployment:
    """A deployment of fakes. `values` are of their manifests, beside what is usual."""
    deployment = Deployment(root, names)
    for name in names:
        manifest = Manifest(
            name=name,
            family="sd15",
            target="fake",
            precision="fp32",
            source="nowhere",
            key="0",
            size=Range(32, 64, 192, 16),
            vae_size=Range(32, 64, 192, 16),
            rows=Range(1, min(4, max_rows), max_rows),
            latent_channels=4,
            latent_scale=8,
            guidance_scale=7.5,
            token_limit=77,
            scheduler=REFERENCE,
            # The first three channels are the colour, as FakeModels.decode has it but for the tanh.
            colours=LatentColours(((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)), (0.0, 0.0, 0.0)),
            components={one: component(one) for one in ("text_encoder", "unet", "vae_decoder", "vae_encoder")},
        )
        manifest = replace(manifest, **values)
        if manifest.conditioning.control:
            unet = replace(manifest.components["unet"], inputs=(*UNET_INPUTS, *CONTROL_INPUTS))
            manifest = replace(manifest, components={**manifest.components, "unet": unet})
        deployment.folder(name).mkdir(parents=True)
        (deployment.folder(name) / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
        shutil.copy(TOKENIZER, deployment.folder(name) / "tokenizer.json")
    (root / Deployment.FILE).write_text(deployment.to_json(), encoding="utf-8")
    return Deployment.load(root)


class FakeModels:
    """Component models as functions. `rows` lists the UNet's rows call by call; `before_unet` may block or raise."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.timesteps: list[list[float]] = []
        self.before_unet: Callable[[int], None] = lambda call: None
        self.before_decode: Callable[[], None] = lambda: None

    def runner(self) -> InProcessRunner:
        return InProcessRunner(
            {"text_encoder": self.text, "unet": self.unet, "vae_decoder": self.decode, "vae_encoder": self.encode}
        )

    @staticmethod
    def text(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"hidden_states": inputs["input_ids"].float()[:, :, None] / 49408}

    def unet(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.rows.append(len(inputs["sample"]))
        self.timesteps.append([float(t) for t in inputs["timestep"]])
        self.before_unet(len(self.rows))
        told = inputs["encoder_hidden_states"].mean(dim=(1, 2)) + inputs["timestep"] / 1000
        if "control" in inputs:
            told = told + inputs["control_scale"] * inputs["control"].mean(dim=(1, 2, 3))
        latents, further = inputs["sample"][:, :4], inputs["sample"][:, 4:]  # a mask and a masked picture, if any
        return {"model_output": latents * 0.1 + further.sum(dim=1, keepdim=True) / 9 + told[:, None, None, None]}

    def decode(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.before_decode()
        pixels = inputs["latents"][:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
        return {"pixels": pixels.tanh()}

    @staticmethod
    def encode(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pixels = inputs["pixels"][:, [0, 1, 2, 0], ::8, ::8]
        return {"moments": torch.cat([pixels, 0.1 + pixels.abs()], dim=1)}


class Recorder:
    """A Reply that keeps what it is given, and can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.finals = 0
        self.error: DiffuserveError | None = None
        self.ended = threading.Event()
        self.cancelled = False
        self.on_event: Callable[[Event], None] = lambda event: None

    def send(self, event: Event, *, final: bool) -> None:
        assert not self.ended.is_set(), "an event after the end"
        self.events.append(event)
        self.on_event(event)
        if final:
            self.finals += 1
            self.ended.set()

    def fail(self, error: DiffuserveError) -> None:
        assert not self.ended.is_set(), "an error after the end"
        self.error = error
        self.finals += 1
        self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def wait(self) -> Any:
        assert self.ended.wait(20), "the request never ended"
        return self


class Unreachable(Recorder):
    """A Reply whose client can be told nothing: where memory is short, both answers and errors are refused."""

    def send(self, event: Event, *, final: bool) -> None:
        raise RuntimeError("Failed to increase the shared memory pool size")

    def fail(self, error: DiffuserveError) -> None:
        super().fail(error)
        raise RuntimeError("Failed to increase the shared memory pool size")
