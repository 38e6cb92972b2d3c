"""A picture's file makes the same picture again, on the real server."""

from __future__ import annotations

import io
from pathlib import Path

import PIL.Image
import pytest

from diffuserve_client import Client, GenerateRequest


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_the_same_picture_again(client: Client, tmp_path: Path, name: str) -> None:
    """Of the second of two images, with the checkpoint's own values for everything that is not said."""
    image_format = {"a.png": "png", "a.jpg": "jpeg", "a.webp": "webp"}[name]
    request = GenerateRequest(
        prompt='a "large": red, (round)\ncircle', steps=4, num_images=2, image_format=image_format, guidance_scale=3.4
    )
    first = client.generate(request)
    path = first.save(tmp_path / name)[1]
    with PIL.Image.open(path) as saved, PIL.Image.open(io.BytesIO(first.images[1].data)) as came:
        assert saved.tobytes() == came.tobytes()
    again = GenerateRequest.from_image(path)
    assert (again.seed, again.num_images, again.width) == (first.images[1].seed, 1, 64)
    assert client.generate(again).images[0].data == first.images[1].data


def test_the_same_picture_from_a_picture_again(client: Client, tmp_path: Path) -> None:
    begin = client.generate("a red circle", steps=3, seed=5)
    picture = begin.images[0].data
    first = client.generate("a blue circle", init_image=picture, strength=0.6, steps=5, seed=9)
    (path,) = first.save(tmp_path / "a.png")
    again = GenerateRequest.from_image(path, init_image=picture)
    assert client.generate(again).images[0].data == first.images[0].data
