"""How close previews and tiled decoding come, over many pictures of the shapes checkpoint. Prints what it measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from conftest import CHECKPOINT
from diffuserve.checkpoint import Checkpoint
from diffuserve.components import InProcessRunner
from diffuserve.images import image_from_pixels
from diffuserve.manifest import Deployment, Range
from diffuserve.onnx_session import open_session
from diffuserve.sampling import SAMPLERS
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.spec import PREVIEW_DECODER, VAE_DECODER, VAE_ENCODER
from diffuserve.tiles import Side
from diffuserve_client import Client, GenerateRequest, PictureEvent
from diffuserve_export import ExportOptions, export_checkpoint
from diffuserve_export.colours import patchwork
from integration.test_large_pictures import seams
from integration.test_previews import previews_of, psnr
from shapes_recipe.world import Scene

SCENES = [
    Scene(size, colour, shape, background).caption
    for size, (colour, shape, background) in itertools.product(
        ("large", "small"),
        (
            ("red", "circle", "blue"),
            ("green", "ring", "white"),
            ("yellow", "diamond", "black"),
            ("white", "square", "red"),
            ("blue", "triangle", "yellow"),
            ("black", "circle", "green"),
        ),
    )
]


@pytest.fixture(scope="module")
def shapes(deployment: Path) -> Checkpoint:
    """The checkpoint over its own graphs, in process."""
    loaded = Deployment.load(deployment)
    components = loaded.manifest("shapes").components
    models = {
        component.model: _graph(deployment / "models" / component.model / "1" / "model.onnx", component.outputs[0].name)
        for name, component in components.items()
        if name in (VAE_DECODER, VAE_ENCODER)
    }
    return Checkpoint(loaded, "shapes", InProcessRunner(models))


def _graph(path: Path, output: str) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    session: Any = open_session(path, 2)

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (array,) = session.run([output], {name: tensor.numpy() for name, tensor in inputs.items()})
        return {output: torch.from_numpy(array)}

    return run


def streams(client: Client, seeds: int = 1, **values: Any) -> list[list[Any]]:
    """The events of every scene from some seeds."""

    def ask(case: tuple[str, int]) -> list[Any]:
        return list(client.stream(GenerateRequest(prompt=case[0], seed=case[1], **values)))

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, itertools.product(SCENES, range(seeds))))


def told(name: str, values: list[float]) -> str:
    return f"{name}: mean {np.mean(values):.1f} dB, lowest {min(values):.1f}, of {len(values)}"


def test_previews_at_the_last_step_are_close_to_the_picture(client: Client) -> None:
    small, large = list[float](), list[float]()
    for events in streams(client, seeds=4, steps=20, preview_every=20):
        picture = events[-1].image
        for preview in previews_of(events):
            small.append(psnr(preview.image, picture.resize((8, 8), Image.Resampling.BOX)))
            large.append(psnr(preview.image.resize((64, 64), Image.Resampling.BILINEAR), picture))
    print(told("\npreview against the picture of its size", small))
    print(told("preview enlarged against the picture", large))
    assert len(small) >= 2 * len(SCENES), "half of them came in time"
    assert np.mean(small) > 22
    assert np.mean(large) > 19


@pytest.mark.parametrize(("side", "longest"), [(128, 64), (128, 96), (192, 64), (192, 96), (192, 128)])
def test_tiles_against_one_piece(shapes: Checkpoint, pipeline: Any, side: int, longest: int) -> None:
    own = shapes.manifest
    images = pipeline(
        SCENES,
        width=side,
        height=side,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(SCENES))],
        output_type="latent",
    ).images
    differences, apart, together = list[Any](), list[float](), list[float]()
    for latents in images:
        decoded = []
        for most in (side, longest):
            shapes.manifest = replace(own, vae_size=Range(32, min(64, most), most, 16))
            decoded.append(np.asarray(image_from_pixels(shapes.decode(latents))).astype(float))
        shapes.manifest = own
        differences.append(np.abs(decoded[0] - decoded[1]))
        tiles = Side.of(side // 8, longest // 8)
        for axis in (0, 1):
            together.append(seams(decoded[0], tiles, axis))
            apart.append(seams(decoded[1], tiles, axis))
    every = np.stack(differences)
    print(
        f"\n{side} x {side} in tiles of {longest}: mean {every.mean():.2f}/255, 99.9 % within "
        f"{np.quantile(every, 0.999):.0f}, largest {every.max():.0f}; steps at borders over steps elsewhere: "
        f"{np.mean(apart):.3f} in tiles, {np.mean(together):.3f} in one piece"
    )
    assert every.mean() <= 5
    assert np.mean(apart) <= np.mean(together) + 0.1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, pipeline: Any, one_thread: None) -> Path:
    """An AutoencoderTiny whose decoder was taught by the checkpoint's own autoencoder for some seconds."""
    torch.manual_seed(0)
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 1, 1, 1),
    )
    optimizer, vae = torch.optim.Adam(model.decoder.parameters(), lr=4e-3), pipeline.vae
    shown = torch.cat([patchwork(64, 64).roll(by, dims=(1,)) for by in range(3)])
    with torch.no_grad():
        latents = vae.encode(shown).latent_dist.mean * vae.config.scaling_factor
        wanted = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    for step in range(200):
        chosen = torch.randint(len(latents), (8,), generator=torch.Generator().manual_seed(step))
        loss = (model.decode(latents[chosen]).sample - wanted[chosen]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"\ntaught to {float(loss.detach()):.3f}")
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_client(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    out = tmp_path_factory.mktemp("with-tiny") / "deployment"
    manifest = export_checkpoint(ExportOptions(checkpoint=str(CHECKPOINT), out=out, preview_vae=tiny))
    assert PREVIEW_DECODER in manifest.components
    with TritonServer(ServerOptions(deployment=out, http_port=0, grpc_port=0, metrics_port=0)) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client:
            yield client


def test_a_tiny_autoencoder_makes_previews(tiny_client: Client) -> None:
    """It was taught for seconds, and for less than what it could be; latents in another scale would give 8 dB."""
    close = []
    for events in streams(tiny_client, seeds=2, steps=20, preview_every=20):
        picture = events[-1].image
        for preview in previews_of(events):
            assert preview.image.size == picture.size
            close.append(psnr(preview.image, picture))
    print(told("\npreviews by a tiny autoencoder", close))
    assert len(close) >= len(SCENES), "half of them came in time"
    assert np.mean(close) > 15


def test_large_pictures_have_tiny_previews_in_tiles(tiny_client: Client) -> None:
    request = GenerateRequest(prompt=SCENES[0], width=192, height=160, steps=6, preview_every=2, seed=1)
    previews = [event for event in tiny_client.stream(request) if event.kind == "preview"]
    assert {one.image.size for one in previews if isinstance(one, PictureEvent)} == {(192, 160)}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_kind_of_request(client: Client, sampler: str) -> None:
    start = client.generate(SCENES[0], steps=8, seed=1).images[0].data
    for more in ({}, {"num_images": 3}, {"init_image": start, "strength": 0.6}, {"width": 96}, {"guidance_scale": 1.0}):
        asked: dict[str, Any] = {"prompt": SCENES[1], "seed": 5, "steps": 10, "sampler": sampler, **more}
        plain = [event for event in client.stream(GenerateRequest(**asked)) if event.kind == "image"]
        watched = list(client.stream(GenerateRequest(**asked, preview_every=1)))
        for image in plain:
            assert previews_of(watched, image.index)
            (same,) = (one for one in watched if (one.kind, one.index) == ("image", image.index))
            assert same.data == image.data
