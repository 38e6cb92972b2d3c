"""Requests with a mask at real servers, against diffusers' own inpainting pipelines."""

from __future__ import annotations

import base64
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client, GenerateRequest, InvalidArgumentError
from integration.families import Families, exported_families
from integration.family_cases import Case, difference, expected
from unit.pictures import SVG, encoded, mask, png_of_size

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a small green ring on a white background"
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
#: What is asked for with a mask. Heun's and DPM2's two evaluations a step, noise on the way, history, noise alone.
CASES = [
    *(("euler_ancestral", strength) for strength in (0.3, 0.7, 1.0)),
    *(("heun", strength) for strength in (0.3, 0.7, 1.0)),
    ("dpm2", 0.7),
    ("pndm", 0.7),
    ("ddim", 1.0),
    ("dpmpp_2m", 0.3),
]
MASK = mask(box=(24, 0, 63, 39))


@pytest.fixture(scope="module")
def start(client: Client) -> Image.Image:
    image: Image.Image = client.generate("a large red circle on a blue background", seed=1).image
    return image.convert("RGB")


def values(sampler: str, start: Image.Image, **more: Any) -> dict[str, Any]:
    asked = {"init_image": encoded(start), "mask_image": encoded(MASK), "sampler": sampler, "steps": 10, "seed": 3}
    return {**asked, "guidance_scale": 5.0, **more}


def theirs(pipeline: Any, kind: str, sampler: str, **asked: Any) -> Any:
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipeline.scheduler.config)
    made = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
        **{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = made(PROMPT, num_inference_steps=10, guidance_scale=5.0, generator=generator, **asked).images
    return np.asarray(images[0]).astype(int)


def test_it_is_diffusers_picture_whatever_comes_beside_it(client: Client, pipeline: Any, start: Image.Image) -> None:
    image = {"image": start, "strength": 0.7}
    asked: list[tuple[dict[str, Any], Any]] = [
        (values(sampler, start, strength=strength), ("Inpaint", sampler, {"strength": strength}))
        for sampler, strength in CASES
    ]
    asked.append((values("ddim", start, strength=0.7, mask_image=b""), ("Img2Img", "ddim", image)))
    asked.append((values("heun", start, init_image=b"", mask_image=b""), ("", "heun", {"width": 64, "height": 64})))
    with ThreadPoolExecutor(len(asked)) as pool:
        served = list(pool.map(lambda one: client.generate(PROMPT, **one[0]).image, asked))
    for ours, (_, (kind, sampler, more)) in zip(served, asked, strict=True):
        if kind == "Inpaint":
            more |= {"image": start, "mask_image": MASK, "width": 64, "height": 64}
        found = difference(np.asarray(ours).astype(int), theirs(pipeline, kind, sampler, **more))
        assert found <= 2, (kind, sampler, more.get("strength"), found)


def test_each_image_of_a_request_has_the_noise_of_its_seed(client: Client, start: Image.Image) -> None:
    several = client.generate(PROMPT, **values("euler_ancestral", start, strength=0.7, num_images=2, steps=4))
    alone = client.generate(PROMPT, **values("euler_ancestral", start, strength=0.7, steps=4, seed=4))
    assert difference(np.asarray(several.images[1].image).astype(int), np.asarray(alone.image)) <= 1
    info = several.images[1].info
    assert (info["seed"], info["strength"], info["steps"], info["width"]) == (4, 0.7, 4, 64)


def test_a_unet_that_is_told_masks_makes_diffusers_pictures(
    deployment: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    families = Families(tmp_path_factory.mktemp("inpaint"))
    out = ROOT / "build" / "deployments" / "inpaint"  # made once, and again when the checkpoint or the export changes
    exported = exported_families(families, ["sd15-inpaint"], out, deployment)
    cases = [
        Case("sd15-inpaint", "Euler a", steps=10, strength=0.3, has_mask=True),
        Case("sd15-inpaint", "heun", guidance=3.0, strength=0.7, has_mask=True),
        Case("sd15-inpaint", strength=1.0, has_mask=True, width=96, height=48),
    ]
    options = ServerOptions(deployment=exported.root, http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client, ThreadPoolExecutor(len(cases)) as pool:
            results = list(pool.map(lambda case: client.generate(case.request), cases))
            with pytest.raises(
                InvalidArgumentError, match=r"sd15-inpaint makes anew .* give init_image and mask_image"
            ):
                client.generate(PROMPT)
    for case, result in zip(cases, results, strict=True):
        assert difference(np.asarray(result.image).astype(int), expected(families, case)) <= 2


def test_generate_takes_base64(server: Any, start: Image.Image) -> None:
    texts = {
        name: base64.b64encode(encoded(one)).decode() for name, one in {"init_image": start, "mask_image": MASK}.items()
    }
    body = {"prompt": PROMPT, "steps": 2, "strength": 1.0, "image_encoding": "base64", **texts}
    request = urllib.request.Request(f"{server.http_url}/v2/models/diffusion/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        image = Image.open(BytesIO(base64.b64decode(json.load(answer)["data"])))
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (png_of_size(30_000, 30_000), "mask_image has more pixels than the 16777216 in all that are taken"),
        (encoded(MASK)[:-40], "mask_image cannot be decoded .* send the whole file"),
        (SVG, "mask_image is no picture in PNG, JPEG, WEBP"),
        (encoded(mask(64, 32)), "has 64 x 32 pixels and init_image 64 x 64; give a mask of the picture's size"),
        (encoded(Image.new("L", (64, 64))), "mask_image is black"),
    ],
)
def test_bad_masks_are_refused_and_nothing_else_is_disturbed(
    client: Client, start: Image.Image, given: bytes, reason: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        client.generate(GenerateRequest(prompt=PROMPT, steps=2, init_image=encoded(start), mask_image=given))
    assert client.generate(PROMPT, steps=1).images
