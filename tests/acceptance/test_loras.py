"""A thousand random mixes on a real Triton: a picture is its own, whatever adapters share its calls."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuserve.manifest import Deployment
from diffuserve.sampling import SAMPLERS
from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client, GenerateRequest
from integration.lora_cases import factors_of, kohya, named_by_diffusers, put_lora
from shapes_recipe.world import trained_scenes

MIXES = 1000
REQUESTS = 120
COMPANY = 8
FILES = 12


@pytest.fixture(scope="module")
def client_of_loras(lora_deployment: Deployment, loras: Path) -> Iterator[Client]:
    """With a megabyte for LoRA files, which holds few of them, so that they come and go."""
    manifest = lora_deployment.manifest("sd15")
    for number in range(FILES):
        factors = factors_of(manifest, number, rank=1 + number % 4)
        put_lora(loras, f"n{number}", kohya(factors, 2.0) if number % 2 else named_by_diffusers(factors))
    options = ServerOptions(
        deployment=lora_deployment.root, loras=loras, lora_budget_mb=1, http_port=0, grpc_port=0, metrics_port=0
    )
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client:
            yield client


def _random_request(rng: random.Random) -> GenerateRequest:
    names = rng.sample(["night", "bar", *(f"n{number}" for number in range(FILES))], rng.choice([0, 1, 1, 2]))
    return GenerateRequest(
        prompt=rng.choice(trained_scenes()).caption,
        steps=rng.choice([1, 2, 3, 4]),
        sampler=rng.choice(list(SAMPLERS)),
        guidance_scale=rng.choice([1.0, 2.0, 7.5]),
        seed=rng.randrange(2**32),
        loras=tuple(f"{name}:{rng.choice([-1, 0.3, 0.5, 1, 1.5])}" for name in names),
    )


def test_a_thousand_mixes_do_not_bleed(client_of_loras: Client) -> None:
    rng, worst, identical, compared = random.Random(1000), 0, 0, 0

    def picture(request: GenerateRequest) -> Any:
        return np.asarray(client_of_loras.generate(request).image).astype(int)

    requests = [_random_request(rng) for _ in range(REQUESTS)]
    alone = [picture(request) for request in requests]
    with ThreadPoolExecutor(COMPANY) as pool:
        for _ in range(MIXES):
            chosen = rng.sample(range(REQUESTS), COMPANY)
            for number, mixed in zip(chosen, pool.map(lambda one: picture(requests[one]), chosen), strict=True):
                difference = int(np.abs(mixed - alone[number]).max())
                assert difference <= 1, f"{requests[number]}: {difference}/255 from the same request alone"
                worst, identical, compared = max(worst, difference), identical + (difference == 0), compared + 1
    print(f"{MIXES} mixes, {compared} pictures: {identical} identical, the others differ by {worst}/255")
