"""Pictures with masks: what is refused before anything is decoded, and in which order noise is drawn."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffuserve.checkpoint import Checkpoint
from diffuserve.errors import InvalidArgumentError
from diffuserve.first_latents import Given, begun
from diffuserve.images import mask_from_image, resized
from diffuserve.manifest import Conditioning, Deployment
from diffuserve.request import GenerateRequest
from diffuserve.sampling import TrajectoryCompiler
from diffuserve.sampling.matrix import REFERENCE
from diffuserve.service import DiffusionService
from diffuserve.snapshot import ImageState
from diffuserve.spec import SAMPLE_INPAINT
from unit.fakes import FakeModels, Recorder, write_deployment
from unit.pictures import SVG, encoded, mask, picture, png_of_size

TELLS_MASKS = Conditioning(sample=SAMPLE_INPAINT)
PICTURE, MASK = encoded(picture()), encoded(mask())


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return write_deployment(tmp_path / "one", "fake")


@pytest.fixture
def checkpoint(deployment: Deployment) -> Checkpoint:
    return Checkpoint(deployment, "fake", FakeModels().runner())


def asked(**values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a ring", "seed": 1, "steps": 5, "init_image": PICTURE, **values})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"mask_image": MASK, "init_image": b""}, "mask_image is given without init_image"),
        ({"mask_image": encoded(mask(32, 64))}, "has 32 x 64 pixels and init_image 64 x 64; give a mask of the pict"),
        ({"mask_image": encoded(Image.new("L", (64, 64)))}, "mask_image is black, .* paint what is to be made anew"),
        ({"mask_image": encoded(Image.new("L", (64, 64), 127))}, "mask_image is black"),
        ({"mask_image": encoded(mask(box=(9, 9, 15, 15)))}, "white only in specks of less than 8 pixels at 64 x 64"),
        ({"mask_image": SVG}, "mask_image is no picture in PNG, JPEG, WEBP"),
        ({"mask_image": MASK[:-30]}, "mask_image cannot be decoded .* send the whole file"),
        ({"mask_image": b"\0" * (33 << 20)}, "mask_image has 34603008 bytes, and at most 33554432"),
        ({"mask_image": png_of_size(5_000, 5_000)}, "mask_image has 5000 x 5000 pixels, and at most 16777216"),
        ({"mask_image": png_of_size(30_000, 30_000)}, "mask_image has more pixels than the 16777216 in all"),
    ],
)
def test_bad_masks_are_refused(checkpoint: Checkpoint, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason):
        checkpoint.resolve(asked(**values))


def test_a_checkpoint_that_is_told_masks_needs_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_deployment(tmp_path, "fake", conditioning=TELLS_MASKS), "fake", FakeModels().runner())
    for values in ({}, {"init_image": b""}):
        with pytest.raises(
            InvalidArgumentError, match=r"fake makes anew .* mask_image is not given; give init_image and"
        ):
            checkpoint.resolve(asked(**values))
    assert checkpoint.resolve(asked(mask_image=MASK)).mask is not None


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(64, 64), (96, 48), (100, 37)])
def test_a_mask_is_read_as_diffusers_reads_it(mode: str, size: tuple[int, int]) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (37, 100, 3), dtype=np.uint8)
    image = Image.fromarray(levels).convert(mode)
    processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    expected = processor.preprocess(image, width=size[0], height=size[1])[0]
    assert torch.equal(mask_from_image(resized(image.convert("RGB"), *size)).float(), expected)


def test_base64_and_other_formats_and_sizes(checkpoint: Checkpoint) -> None:
    for values in (
        {"mask_image": base64.b64encode(MASK), "init_image": base64.b64encode(PICTURE)},
        {"mask_image": encoded(mask().convert("RGB"), "WEBP")},
    ):
        resolved = checkpoint.resolve(asked(**values))
        assert (resolved.width, resolved.height, resolved.image.size, resolved.mask.size) == (
            64,
            64,
            (64, 64),
            (64, 64),
        )
    larger = asked(init_image=encoded(picture(100, 70)), mask_image=encoded(mask(100, 70)))
    resolved = checkpoint.resolve(larger)
    assert (resolved.width, resolved.height, resolved.image.size, resolved.mask.size) == (96, 64, (96, 64), (96, 64))


def test_sixteen_bits_of_grey_are_scaled(checkpoint: Checkpoint) -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    deep, usual = (encoded(Image.fromarray(one)) for one in (levels.astype(np.uint16), (levels / 257).astype(np.uint8)))
    resolved = [checkpoint.resolve(asked(init_image=one, mask_image=one)) for one in (deep, usual)]
    for name in ("image", "mask"):
        found, expected = (np.asarray(getattr(one, name)).astype(int) for one in resolved)
        assert np.abs(found - expected).max() <= 1


def _drawing(given: Given, strength: float | None) -> ImageState:
    """First latents whose draws of noise are 1, 2, 3 and so on."""
    drawn = iter(range(1, 9))
    trajectory = TrajectoryCompiler(REFERENCE)("ddim", 10, strength=strength)
    return begun(ImageState.new(0), trajectory, given, lambda: torch.full((4, 2, 2), float(next(drawn))))


def test_noise_is_drawn_in_diffusers_order() -> None:
    moments, covered = torch.stack([torch.zeros(4, 2, 2), torch.ones(4, 2, 2)]), torch.ones(1, 2, 2) > 0
    scale = TrajectoryCompiler(REFERENCE)("ddim", 10, strength=0.5)
    plain = _drawing(Given(), None)
    assert (plain.draws, plain.latents[0, 0, 0].item(), plain.masked) == (1, 1.0, None)
    image = _drawing(Given(moments), 0.5)
    assert (image.draws, image.masked) == (2, None)
    assert image.latents[0, 0, 0] == pytest.approx(2 * scale.initial_scale + scale.image_scale)
    kept = _drawing(Given(moments, covered), 0.5)
    assert kept.draws == 3, "diffusers draws for the masked picture, which it does not use here"
    assert torch.equal(kept.latents, image.latents)
    assert kept.masked is not None
    assert kept.masked.noise is not None
    assert (kept.masked.latents[0, 0, 0].item(), kept.masked.noise[0, 0, 0].item()) == (1.0, 2.0)
    for picture_, draws in ((moments, 3), (None, 2)):
        told = _drawing(Given(picture_, covered, moments), 0.5 if draws == 3 else None)
        assert (told.draws, told.masked is not None) == (draws, True)
        assert told.masked is not None
        assert told.masked.noise is None
        assert told.masked.latents[0, 0, 0].item() == float(draws)


@pytest.fixture
def both(tmp_path: Path) -> Iterator[DiffusionService]:
    service = DiffusionService(write_deployment(tmp_path / "both", "fake"), FakeModels().runner())
    yield service
    service.close()


def test_what_a_mask_keeps_comes_back_and_the_rest_is_new(both: DiffusionService) -> None:
    """The fakes' autoencoder makes each 8 x 8 pixels of one colour."""
    replies = {}
    for name, values in {
        "plain": {},
        "image": {"init_image": PICTURE},
        "mask": {"init_image": PICTURE, "mask_image": MASK},
    }.items():
        replies[name] = Recorder()
        both.submit(asked(**{"init_image": b"", **values}), replies[name])
    pictures = {
        name: np.asarray(Image.open(BytesIO(reply.wait().events[0].data))).astype(int)
        for name, reply in replies.items()
    }
    assert not np.array_equal(pictures["image"], pictures["plain"])
    assert np.abs(pictures["mask"] - pictures["image"])[16:40, 8:48].max() <= 1, "as image-to-image does it"
    assert np.abs(pictures["mask"] - pictures["image"])[48:].max() > 10
