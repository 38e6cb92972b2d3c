"""Two hundred random mixes on a real Triton: a request's picture is its own, whatever shares its calls."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffuserve.sampling import SAMPLERS
from diffuserve_client import Client
from shapes_recipe.world import trained_scenes

MIXES = 200
COMPANY = 15


def _random_request(rng: random.Random, samplers: list[str]) -> dict[str, Any]:
    return {
        "prompt": rng.choice(trained_scenes()).caption,
        "steps": rng.choice([2, 3, 4, 6, 8]),
        "sampler": rng.choice(samplers),
        "guidance_scale": rng.choice([1.0, 2.0, 7.5]),
        "guidance_rescale": rng.choice([0.0, 0.0, 0.5]),
        "seed": rng.randrange(2**32),
        "width": rng.choice([64, 64, 96]),
        "num_images": 1,
    }


def test_a_picture_is_the_same_alone_and_among_fifteen_others(client: Client) -> None:
    rng, samplers, differences = random.Random(200), list(SAMPLERS), list[int]()
    with ThreadPoolExecutor(COMPANY + 1) as pool:
        for _ in range(MIXES):
            requests = [_random_request(rng, samplers) for _ in range(COMPANY + 1)]
            together = list(pool.map(lambda request: client.generate(**request).image, requests))
            alone = client.generate(**requests[0]).image
            difference = np.abs(np.asarray(alone).astype(int) - np.asarray(together[0]).astype(int)).max()
            differences.append(int(difference))
            assert difference <= 1, f"{requests[0]}: {difference}/255 from the same request alone"
    identical = sum(difference == 0 for difference in differences)
    print(f"{identical} of {MIXES} identical, the others differ by 1/255 at most")
