"""The service's pictures against diffusers' own pipeline on the same checkpoint and seed."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffuserve_client import Client
from shapes_recipe.world import Scene

PROMPT = Scene("large", "red", "circle", "blue").caption
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
}
SIZES = ((64, 64), (96, 96))
SEEDS = (0, 1234, 2**53 + 1)


def check_same_pictures(client: Client, pipeline: Any, sampler: str, steps: int) -> None:
    """All sizes and seeds, with guidance and without, at once: no pixel differs by more than two levels."""
    class_name, options = SCHEDULERS[sampler]
    own = pipeline.scheduler
    scheduler = getattr(diffusers, class_name).from_config(own.config, **options)
    cases = list(itertools.product(SIZES, (1.0, 7.5), SEEDS))

    def ours(case: tuple[tuple[int, int], float, int]) -> Any:
        (width, height), guidance, seed = case
        result = client.generate(
            PROMPT, width=width, height=height, steps=steps, sampler=sampler, guidance_scale=guidance, seed=seed
        )
        return np.asarray(result.image).astype(int)

    with ThreadPoolExecutor(len(cases)) as pool:
        served = dict(zip(cases, pool.map(ours, cases), strict=True))

    for size, guidance in itertools.product(SIZES, (1.0, 7.5)):
        expected = diffusers.StableDiffusionPipeline(
            **{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
        )
        expected.set_progress_bar_config(disable=True)
        images = expected(
            [PROMPT] * len(SEEDS),
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        ).images
        for seed, image in zip(SEEDS, images, strict=True):
            difference = np.abs(served[size, guidance, seed] - np.asarray(image).astype(int)).max()
            assert difference <= 2, f"{sampler} {steps} steps {size} guidance {guidance} seed {seed}: {difference}/255"


# The other samplers' 50 steps are in tests/acceptance/test_fifty_steps.py.
@pytest.mark.parametrize(("sampler", "steps"), [*itertools.product(SCHEDULERS, (4, 20)), ("dpmpp_2m", 50)])
def test_no_pixel_differs_by_more_than_two_levels(client: Client, pipeline: Any, sampler: str, steps: int) -> None:
    check_same_pictures(client, pipeline, sampler, steps)


#: What is asked for, and diffusers' scheduler and options for it. One size and seed each.
OTHERS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "ddim eta": ({"sampler": "ddim", "eta": 0.5}, "DDIMScheduler", {}),
    "ddpm": ({"sampler": "ddpm"}, "DDPMScheduler", {}),
    "euler karras": (
        {"sampler": "EulerDiscreteScheduler", "sigma_schedule": "karras"},
        "EulerDiscreteScheduler",
        {"use_karras_sigmas": True},
    ),
    "euler a": ({"sampler": "Euler a"}, "EulerAncestralDiscreteScheduler", {}),
    "heun": ({"sampler": "heun"}, "HeunDiscreteScheduler", {}),
    "dpm2": ({"sampler": "DPM2"}, "KDPM2DiscreteScheduler", {}),
    "dpm2 a karras": (
        {"sampler": "DPM2 a Karras"},
        "KDPM2AncestralDiscreteScheduler",
        {"use_karras_sigmas": True},
    ),
    "lms": ({"sampler": "lms"}, "LMSDiscreteScheduler", {}),
    "dpmpp_2m sgm_uniform": (
        {"sampler": "dpmpp_2m", "sigma_schedule": "sgm_uniform"},
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "trailing"},
    ),
    "dpmpp_3m beta": (
        {"sampler": "dpmpp_3m", "sigma_schedule": "beta"},
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "use_beta_sigmas": True, "timestep_spacing": "linspace"},
    ),
    "dpmpp_2m_sde karras": (
        {"sampler": "DPM++ 2M SDE Karras"},
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2s": ({"sampler": "dpmpp_2s"}, "DPMSolverSinglestepScheduler", {}),
    "unipc": ({"sampler": "UniPC"}, "UniPCMultistepScheduler", {}),
    "unipc exponential": (
        {"sampler": "unipc", "sigma_schedule": "exponential"},
        "UniPCMultistepScheduler",
        {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    ),
    "deis": ({"sampler": "deis"}, "DEISMultistepScheduler", {}),
    "lcm": ({"sampler": "lcm"}, "LCMScheduler", {}),
    "tcd eta": ({"sampler": "tcd", "eta": 0.3}, "TCDScheduler", {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_sampler_makes_diffusers_picture(client: Client, pipeline: Any, name: str) -> None:
    asked, class_name, options = OTHERS[name]
    served = client.generate(PROMPT, steps=20, guidance_scale=4.0, seed=77, **asked).image
    expected = diffusers.StableDiffusionPipeline(
        **{
            **pipeline.components,
            "scheduler": getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **options),
        },
        requires_safety_checker=False,
    )
    expected.set_progress_bar_config(disable=True)
    (image,) = expected(
        PROMPT,
        num_inference_steps=20,
        guidance_scale=4.0,
        eta=asked.get("eta", 0.0),
        generator=torch.Generator().manual_seed(77),
    ).images
    difference = np.abs(np.asarray(served).astype(int) - np.asarray(image).astype(int)).max()
    assert difference <= 2, f"{name}: {difference}/255"


def test_a_negative_prompt_is_diffusers_negative_prompt(client: Client, pipeline: Any) -> None:
    negative = Scene("small", "green", "ring", "white").caption
    served = client.generate(PROMPT, negative_prompt=negative, steps=8, guidance_scale=4.0, seed=5).image
    (expected,) = pipeline(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
    ).images
    assert np.abs(np.asarray(served).astype(int) - np.asarray(expected).astype(int)).max() <= 2
