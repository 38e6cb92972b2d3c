"""Sixteen requests at once: each is its own picture, and they share the UNet's calls."""

from __future__ import annotations

import json
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffuserve_client import Client
from shapes_recipe.oracle import judge
from shapes_recipe.world import trained_scenes

CONCURRENT = 16


def _executions(server: Any, model: str) -> int:
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/stats", timeout=10) as answer:
        return int(json.load(answer)["model_stats"][0]["execution_count"])


def test_sixteen_mixed_requests_are_each_as_if_alone(client: Client, server: Any) -> None:
    rng = random.Random(16)
    scenes = rng.sample(trained_scenes(), CONCURRENT)
    steps = [4, 6, 9, 12, 15, 18, *[20] * 4, 23, 27, 31, 36, 42, 50]
    requests: list[dict[str, Any]] = [
        {
            "prompt": scene.caption,
            "steps": steps[i],
            "sampler": ("ddim", "euler", "dpmpp_2m")[i % 3],
            "seed": 100 + i,
            "width": (64, 96)[i % 2],
            "height": (64, 96)[i % 2],
            "guidance_scale": (7.5, 4.0, 2.0, 1.0)[i % 4] if steps[i] < 20 else 2.0,
        }
        for i, scene in enumerate(scenes)
    ]
    before = _executions(server, "shapes_unet")
    with ThreadPoolExecutor(CONCURRENT) as pool:
        together = list(pool.map(lambda request: client.generate(**request), requests))
    executions = _executions(server, "shapes_unet") - before
    alone = [client.generate(**request) for request in requests]

    for request, one, other in zip(requests, together, alone, strict=True):
        difference = np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image).astype(int)).max()
        assert difference <= 1, f"{request}: {difference}/255 from the same request alone"
    wrong = [
        f"{scene.caption}: {judge(result.image)}"
        for scene, request, result in zip(scenes, requests, together, strict=True)
        if request["steps"] >= 20 and not judge(result.image).matches(scene)
    ]
    assert not wrong, wrong
    # Two sizes cannot share a call, so the longest request of each bounds the calls from below. How many share one is
    # the policy's choice, by what calls cost beside whatever else runs here.
    assert 50 <= executions < 0.9 * sum(steps), f"{executions} executions for {sum(steps)} steps"
