"""The shapes checkpoint's LoRAs through a real Triton: in one batch, as files come, and beside files that are bad."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
import urllib.error
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffuserve import __version__
from diffuserve.manifest import Deployment
from diffuserve.sampling.names import SAMPLER_NAMES
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.wire import WIRE_VERSION
from diffuserve_client import Client, DiffuserveError, GenerateRequest, InvalidArgumentError, NotFoundError, Retry
from integration.family_cases import difference
from integration.lora_cases import LoraCase, factors_of, kohya, named_by_diffusers, pictured, put_lora
from integration.test_telemetry import eventually, open_url
from shapes_recipe.oracle import agrees
from shapes_recipe.world import BAR, Scene, by_night

pytestmark = pytest.mark.usefixtures("one_thread")

#: By their seeds.
SCENES = {
    0: Scene("large", "red", "circle", "blue"),
    2: Scene("small", "white", "diamond", "purple"),
    3: Scene("large", "cyan", "ring", "red"),
}
#: One request of each mix, all of which fit one call.
MIXED = [
    LoraCase("sd15", loras, guidance=1.0, steps=12, prompt=SCENES[0].caption)
    for loras in (("night",), ("bar",), ("night:0.5", "bar:0.5"), (), ("night:-1", "random:0.5"), ("random",))
]


@pytest.fixture(scope="module")
def served(lora_deployment: Deployment, loras: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("served")
    options = ServerOptions(
        deployment=lora_deployment.root,
        loras=loras,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        environment={"DIFFUSERVE_CALL_LOG": str(folder / "calls.jsonl")},
    )
    with TritonServer(options) as server:
        server.wait_ready()
        with Client(server.grpc_url, retry=Retry(retries=0)) as client:
            yield server, client, folder / "calls.jsonl"


@pytest.fixture(scope="module")
def client_of_loras(served: Any) -> Client:
    client: Client = served[1]
    return client


def at_once(client: Client, cases: list[LoraCase]) -> list[Any]:
    with ThreadPoolExecutor(len(cases)) as pool:
        images = list(pool.map(lambda case: client.generate(case.request).image, cases))
    return [np.asarray(image) for image in images]


@pytest.fixture(scope="module")
def in_one_batch(served: Any, loras: Path, lora_deployment: Deployment) -> list[Any]:
    put_lora(loras, "random", kohya(factors_of(lora_deployment.manifest("sd15"), 1), alpha=3.0))
    return at_once(served[1], MIXED)


@pytest.mark.parametrize("number", range(len(MIXED)), ids=[" ".join(case.loras) or "none" for case in MIXED])
def test_it_is_diffusers_picture(in_one_batch: list[Any], pipeline: Any, loras: Path, number: int) -> None:
    files = {path.stem: path for path in loras.glob("*.safetensors")}
    assert difference(in_one_batch[number].astype(int), pictured(pipeline, MIXED[number], files)) <= 2


def test_the_oracle_sees_the_style_where_it_was_asked_for_and_nowhere_else(client_of_loras: Client) -> None:
    asked = [
        (LoraCase("sd15", loras, guidance=2.0, steps=12, seed=seed, prompt=said.caption), seen)
        for seed, scene in SCENES.items()
        for bar in [Scene(scene.size, scene.colour, BAR, scene.background)]
        for loras, said, seen in (((), scene, scene), (("night",), scene, by_night(scene)), (("bar",), bar, bar))
    ]
    pictures = at_once(client_of_loras, [case for case, _ in asked])
    for (case, seen), picture in zip(asked, pictures, strict=True):
        assert seen is not None
        assert agrees(picture, seen), case


def test_they_shared_calls(in_one_batch: list[Any], served: Any, lora_deployment: Deployment) -> None:
    """After those before, which sent many at once: on a busy machine a few come too far apart to meet."""
    unet = lora_deployment.manifest("sd15").components["unet"].model
    calls = [json.loads(line) for line in served[2].read_text().splitlines()]
    shapes = [call["shapes"] for call in calls if call["model"] == unet]
    # How many rows a call has is the policy's choice, by what calls cost here: in test_loras all six share one.
    assert any(shape["sample"][0] >= 3 and shape["lora"][0] >= 3 for shape in shapes), "two adapters and the zeros"


def test_a_file_that_is_dropped_is_usable_within_two_seconds(
    client_of_loras: Client, loras: Path, lora_deployment: Deployment
) -> None:
    factors = factors_of(lora_deployment.manifest("sd15"), 8)
    with pytest.raises(NotFoundError, match=r"there is no dropped\.safetensors in the folder of LoRAs"):
        client_of_loras.generate("a circle", loras=["dropped"])
    put_lora(loras, "dropped", named_by_diffusers(factors))
    begun = time.monotonic()
    events = client_of_loras.stream(GenerateRequest(prompt="a circle", loras=["dropped"], steps=2, progress_every=1))
    assert next(iter(events)).kind == "queued"
    assert time.monotonic() - begun < 2
    digest = [event.info["lora_files"][0]["digest"] for event in events if event.kind == "image"]
    put_lora(loras, "dropped", named_by_diffusers({key: (down, -up) for key, (down, up) in factors.items()}))
    again = client_of_loras.generate("a circle", loras=["dropped"], steps=1).images[0].info
    assert [again["lora_files"][0]["digest"]] != digest


def test_hits_misses_and_bytes_are_counted(served: Any, in_one_batch: list[Any]) -> None:
    """Triton's process is told every half second."""
    patience = time.monotonic() + 20
    while True:
        lines = open_url(served[0].metrics_url).splitlines()
        values = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("diffuserve_lora")}
        if (len(values) == 3 and all(values.values())) or time.monotonic() > patience:
            break
        time.sleep(0.1)
    assert all(values[f"diffuserve_lora_{name}"] > 0 for name in ("hits_total", "misses_total", "bytes"))


def _bad_files(folder: Path, deployment: Deployment) -> None:
    manifest = deployment.manifest("sd15")
    good = named_by_diffusers(factors_of(manifest, 3))
    put_lora(folder, "bad-nan", {**good, next(iter(good)): next(iter(good.values())) * math.nan})
    wide = {key: torch.cat([one, one], dim=1) if "lora_A" in key else one for key, one in good.items()}
    put_lora(folder, "bad-family", wide)
    put_lora(folder, "bad-xl", {key.replace("text_encoder.", "text_encoder_2."): one for key, one in good.items()})
    put_lora(
        folder,
        "bad-conv",
        {"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 1, 1, 1)},
    )
    put_lora(folder, "bad-rank", named_by_diffusers(factors_of(manifest, 3, rank=16)))
    (folder / "bad-bomb.safetensors").write_bytes(b"PK\x03\x04" + bytes(4096))
    (folder / "bad-half.safetensors").write_bytes((folder / "bad-rank.safetensors").read_bytes()[:-100])
    (folder / "bad-pickle.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "bad-large.safetensors").touch()
    os.truncate(folder / "bad-large.safetensors", 5 << 30)
    outside = put_lora(folder.parent / "elsewhere", "secret", good)
    (folder / "bad-link.safetensors").unlink(missing_ok=True)
    (folder / "bad-link.safetensors").symlink_to(outside)


BAD: Mapping[str, tuple[type[DiffuserveError], str]] = {
    "bad-nan": (InvalidArgumentError, "values that are not finite, or beyond 10000, for (unet|text_encoder)"),
    "bad-family": (InvalidArgumentError, r"does not fit sd15: .*of other widths: \S+ \(\d+ to \d+, and not"),
    "bad-xl": (InvalidArgumentError, r"does not fit sd15: .*layers that no adapter .*text_encoder_2\.encoder"),
    "bad-conv": (InvalidArgumentError, r"\(LoCon\).*conv_in"),
    "bad-rank": (InvalidArgumentError, "need a rank of 16 together, and .* was exported with 8; .*bad-rank:1:truncate"),
    "bad-bomb": (InvalidArgumentError, "is no safetensors file"),
    "bad-half": (InvalidArgumentError, "is no safetensors file, or not whole"),
    "bad-pickle": (InvalidArgumentError, "is pickled, which can run code"),
    "bad-large": (InvalidArgumentError, "has 5368709120 bytes, and at most 1073741824 are read"),
    "bad-link": (InvalidArgumentError, "is a link out of the folder"),
    "secret": (NotFoundError, r"there is no secret\.safetensors"),
    "bad-nan:11": (InvalidArgumentError, "a weight that is not from -10 to 10"),
    "../elsewhere/secret": (InvalidArgumentError, "no such form"),
    "/etc/passwd": (InvalidArgumentError, "no such form"),
}


def test_bad_files_and_names_are_refused_and_nothing_else_is_disturbed(
    client_of_loras: Client, served: Any, loras: Path, lora_deployment: Deployment
) -> None:
    _bad_files(loras, lora_deployment)
    beside = LoraCase("sd15", ("night",), guidance=1.0, steps=20, prompt=SCENES[2].caption)
    (alone,) = at_once(client_of_loras, [beside])
    reached, refused = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        reached.set()
        assert refused.wait(60)

    def ask() -> Any:
        return client_of_loras.generate(beside.request, on_progress=hold).image

    with ThreadPoolExecutor(1) as pool:
        picture = pool.submit(ask)
        assert reached.wait(60)
        for lora, (kind, said) in BAD.items():
            _refused_over_http(served[0], lora, said)
            if "/" not in lora:
                with pytest.raises(kind, match=said):
                    client_of_loras.generate("a circle", loras=[lora], steps=1)
        refused.set()
        assert difference(np.asarray(picture.result(60)).astype(int), alone.astype(int)) <= 1


def test_status_tells_what_may_be_asked(
    client_of_loras: Client, served: Any, loras: Path, lora_deployment: Deployment
) -> None:
    _bad_files(loras, lora_deployment)
    status = eventually(lambda: _told_of_bad_files(client_of_loras))
    assert (status["version"], status["wire_version"]) == (__version__, WIRE_VERSION)
    told = status["checkpoints"]["sd15"]
    usable = {one for one in told["loras"] if one.startswith("bad-")}
    assert usable == {"bad-nan", "bad-rank:truncate"}, "what only the numbers tell is found when it is asked for"
    assert {"night", "bar"} < set(told["loras"])
    assert told["limits"]["lora_rank"] == 8
    assert told["limits"]["width"] == {"minimum": 32, "default": 64, "maximum": 192, "step": 16}
    assert set(told["samplers"]) == set(SAMPLER_NAMES)
    begun = time.monotonic()
    assert served[0].status() is not None
    assert time.monotonic() - begun < 1, "it is what tells that the server lives"


def _told_of_bad_files(client: Client) -> Any:
    status = client.status()
    told = status["checkpoints"]["sd15"]
    return status if "bad-rank:truncate" in told["loras"] and not told["loras_not_looked_at"] else None


def _refused_over_http(server: TritonServer, lora: str, said: str) -> None:
    """Past this project's own client, which refuses some itself."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        open_url(f"{server.http_url}/v2/models/diffusion/generate", {"prompt": "a", "steps": 1, "loras": [lora]})
    body = json.loads(caught.value.read())["error"]
    assert "[invalid_argument]" in body or "[not_found]" in body
    assert re.search(said, body), body


def test_truncation_is_asked_for_and_tells_its_error(
    client_of_loras: Client, loras: Path, lora_deployment: Deployment
) -> None:
    put_lora(loras, "long", named_by_diffusers(factors_of(lora_deployment.manifest("sd15"), 4, rank=16)))
    info = client_of_loras.generate("a circle", loras=["long:truncate", "night:0.5"], steps=1).images[0].info
    (long, night) = info["lora_files"]
    assert (long["rank"], night["rank"]) == (16, 4)
    assert 0.1 < long["truncation_error"] < 1
    assert "truncation_error" not in night
