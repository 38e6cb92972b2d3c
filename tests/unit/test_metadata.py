"""How a picture was made, in its file: what we write others read, what they write we read, and no file does harm."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import piexif
import piexif.helper
import PIL.Image
import PIL.PngImagePlugin
import pytest
import sd_parsers
from hypothesis import given
from hypothesis import strategies as st

from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.metadata import Record, read_record, with_record
from diffuserve.metadata.infotext import infotext, parameters_from_infotext
from diffuserve.prompts.syntax import parse_a1111
from diffuserve.request import GenerateRequest
from diffuserve.sampling.names import SAMPLER_NAMES, SCHEDULE_NAMES, resolve_names
from unit.metadata_cases import REQUEST, encoded, record, written

FORMATS = ("png", "jpeg", "webp")
TEXT = """a \\(red\\) circle <lora:night:0.5> <lora:bar:1>
Negative prompt: blue: "dark", green
and more
Steps: 9, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 12, Size: 96x64, Model: shapes, \
Clip skip: 2, RNG: CPU, Version: diffuserve 0.1.0"""


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("png", "RGB", {}),
        ("png", "RGBA", {"optimize": True}),
        ("jpeg", "RGB", {"quality": 95, "subsampling": 0}),
        ("jpeg", "RGB", {"progressive": True, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", "comment": b"old"}),
        ("webp", "RGB", {"quality": 95}),
        ("webp", "RGB", {"lossless": True}),
        ("webp", "RGBA", {"lossless": True}),
        ("webp", "RGBA", {"quality": 80, "exif": b"MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
    ],
)
def test_the_pixels_stay_and_the_request_comes_back(
    image_format: str, mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    before = encoded(image_format, mode, **options)
    after = with_record(before, image_format, record(image_format))
    with PIL.Image.open(io.BytesIO(before)) as old, PIL.Image.open(io.BytesIO(after)) as new:
        assert (new.format, new.mode, new.size) == (old.format, old.mode, old.size)
        assert np.array_equal(np.asarray(new), np.asarray(old))
    path = written(tmp_path, after)
    assert GenerateRequest.from_image(path) == GenerateRequest(
        **{**REQUEST.parameters(), "image_format": image_format, "loras": ("night:0.5", "bar")}
    )
    assert read_record(written(tmp_path, with_record(after, image_format, record(image_format)))).pictures == {}


@pytest.mark.parametrize("image_format", FORMATS)
def test_pillow_and_the_web_uis_own_library_see_the_text(image_format: str) -> None:
    data = with_record(encoded(image_format), image_format, record(image_format))
    with PIL.Image.open(io.BytesIO(data)) as opened:
        if image_format == "png":
            assert opened.info["parameters"] == TEXT  # what the web UIs look at
            assert json.loads(opened.info["diffuserve"])["parameters"]["prompt"] == REQUEST.prompt
            return
        comment = piexif.load(opened.info["exif"])["Exif"][piexif.ExifIFD.UserComment]
        assert piexif.helper.UserComment.load(comment) == TEXT
        assert opened.getexif().get_ifd(0x8769)[0x9286] == comment


@pytest.fixture(scope="module")
def kept_open() -> Iterator[list[PIL.Image.Image]]:
    """Pictures that stay open: sd_parsers keeps the last one's text by its `id`, which a later picture may have."""
    pictures: list[PIL.Image.Image] = []
    yield pictures
    for picture in pictures:
        picture.close()


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("prompt", ["a red circle", "ein grüner Kreis", "紅い円 🔴"])
def test_a_program_that_others_wrote_reads_it(image_format: str, prompt: str, kept_open: list[PIL.Image.Image]) -> None:
    request = GenerateRequest(prompt=prompt, negative_prompt="blue", steps=9, seed=5, sampler="euler", checkpoint="c")
    data = with_record(encoded(image_format), image_format, Record.of(request, image_format, 5, {}))
    kept_open.append(PIL.Image.open(io.BytesIO(data)))
    told = sd_parsers.ParserManager().parse(kept_open[-1])
    assert told is not None
    assert told.generator is sd_parsers.data.Generators.AUTOMATIC1111
    assert [(one.value) for one in told.prompts] == [prompt]
    assert [(one.value) for one in told.negative_prompts] == ["blue"]
    (sampler,) = told.samplers
    assert (sampler.name, sampler.parameters["seed"], sampler.parameters["steps"]) == ("Euler", "5", "9")
    assert [one.name for one in told.models] == ["c"]


@pytest.mark.parametrize("is_latin", [True, False])
def test_what_the_web_uis_write_is_read(is_latin: bool, tmp_path: Path) -> None:
    text = TEXT.replace("Karras", "Automatic") + ', Hires upscale: 2, Lora hashes: "night: 12, bar: 34"'
    text = text if is_latin else text.replace("green", "緑")
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    info.add_itxt("Comment", "x" * 100, zip=True)
    comment = piexif.helper.UserComment.dump(text, encoding="unicode")
    exif = piexif.dump({"Exif": {piexif.ExifIFD.UserComment: comment}})
    options: dict[str, dict[str, Any]] = {"png": {"pnginfo": info}, "jpeg": {"exif": exif}, "webp": {"exif": exif}}
    for image_format in FORMATS:
        path = written(tmp_path, encoded(image_format, **options[image_format]))
        assert GenerateRequest.from_image(path) == GenerateRequest(
            prompt=r"a \(red\) circle",
            negative_prompt=REQUEST.negative_prompt if is_latin else REQUEST.negative_prompt.replace("green", "緑"),
            prompt_syntax="a1111",
            checkpoint="shapes",
            width=96,
            height=64,
            steps=9,
            guidance_scale=7.5,
            sampler="DPM++ 2M",
            sigma_schedule="karras",  # which the web UI chooses for this sampler
            seed=12,
            clip_skip=1,
            loras=("night:0.5", "bar:1"),
        )


@pytest.mark.parametrize(
    ("packed", "prefix"),
    [
        ("utf-16-le", b"UNICODE\0"),
        ("utf-16", b"UNICODE\0"),
        ("ascii", b"ASCII\0\0\0"),
        ("utf-8", b"\0\0\0\0\0\0\0\0"),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_comments_in_other_encodings(packed: str, prefix: bytes, order: str, tmp_path: Path) -> None:
    comment = prefix + b"a red circle\nSteps: 9, Seed: 5, Size: 64x64".decode().encode(packed)
    block = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    block += struct.pack(f"{order}HHHIII", 1, 0x8769, 4, 1, 26, 0)
    block += struct.pack(f"{order}HHHIII", 1, 0x9286, 7, len(comment), 44, 0) + comment
    request = GenerateRequest.from_image(written(tmp_path, encoded("webp", exif=block)))
    assert (request.prompt, request.steps, request.seed, request.width) == ("a red circle", 9, 5, 64)


def test_the_record_is_what_the_server_told() -> None:
    told = {
        "checkpoint": "shapes-v2",
        "alias": "shapes",
        "sampler": "ddim",
        "seed": 14,
        "num_images": 1,
        "embeddings": ["mark:12ab"],
        "run_s": 0.5,
    }
    request = GenerateRequest(prompt="a", checkpoint="shapes", num_images=3, client_tag="me", priority=3, seed=12)
    one = Record.of(request, "png", 14, told)
    assert {name: one.parameters[name] for name in ("checkpoint", "alias", "sampler", "seed", "num_images")} == {
        "checkpoint": "shapes-v2",
        "alias": "shapes",
        "sampler": "ddim",
        "seed": 14,
        "num_images": 1,
    }
    # Not who asked, nor what differs from one time to the next: the same request makes the same file.
    assert not {"client_tag", "priority", "run_s"} & one.parameters.keys()
    again = Record.from_json(one.to_json()).request()
    assert again == GenerateRequest(prompt="a", checkpoint="shapes-v2", sampler="ddim", seed=14)


def test_what_a_server_tells_wrongly_is_as_it_was_asked_for() -> None:
    told = {"steps": "many", "sampler": None, "loras": [3], "seed": 14, "checkpoint": ["a"], "width": True}
    one = Record.of(GenerateRequest(prompt="a", steps=3, sampler="ddim", width=64), "png", 14, told)
    assert Record.from_json(one.to_json()).request() == GenerateRequest(prompt="a", steps=3, width=64, seed=14)
    assert one.to_infotext().startswith("a\nSteps: 3, Seed: 14, RNG: CPU")


def test_input_pictures_are_asked_for_and_checked(tmp_path: Path) -> None:
    request = GenerateRequest(prompt="a", init_image=b"init", control_image=b"edges", strength=0.5, seed=3)
    path = written(tmp_path, with_record(encoded("png"), "png", Record.of(request, "png", 3, {})))
    assert GenerateRequest.from_image(path, init_image=b"init", control_image=b"edges") == request
    digest = hashlib.sha256(b"init").hexdigest()
    with pytest.raises(InvalidArgumentError, match=f"made with init_image, a picture that is not in .* {digest}"):
        GenerateRequest.from_image(path, control_image=b"edges")
    with pytest.raises(InvalidArgumentError, match="control_image is not the picture that it was made with"):
        GenerateRequest.from_image(path, init_image=b"init", control_image=b"others")
    with pytest.raises(InvalidArgumentError, match="mask_image is not the picture"):
        GenerateRequest.from_image(path, init_image=b"init", control_image=b"edges", mask_image=b"mask")
    assert "Denoising strength: 0.5" in read_record(path).to_infotext()


def test_of_a_resumed_request_the_pictures_are_not_known(tmp_path: Path) -> None:
    told = {"prompt": "a", "seed": 3, "strength": 0.5}
    one = Record.of(GenerateRequest(prompt="", resume=b"snapshot"), "png", 3, told)
    path = written(tmp_path, with_record(encoded("png"), "png", one))
    assert GenerateRequest.from_image(path, init_image=b"any").init_image == b"any"
    assert GenerateRequest.from_image(path).prompt == "a"


# What a web UI's text can hold: lines without spaces around them, none of them the negative prompt's beginning.
lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=40).map(str.strip)
odd_prompts = (
    st.lists(lines.filter(lambda line: not line.startswith("Negative prompt:")), max_size=4)
    .map("\n".join)
    .map(str.strip)
    .filter(lambda text: "<lora:" not in text)
)


@given(
    prompt=odd_prompts,
    negative=odd_prompts,
    syntax=st.sampled_from(["plain", "a1111"]),
    sampler=st.sampled_from(SAMPLER_NAMES),
    schedule=st.sampled_from([None, *SCHEDULE_NAMES]),
    checkpoint=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).map(str.strip).filter(bool),
    guidance=st.integers(0, 500).map(lambda tenths: tenths / 10),
)
def test_the_text_says_what_it_can_of_any_request(
    prompt: str,
    negative: str,
    syntax: str,
    sampler: str,
    schedule: str | None,
    checkpoint: str,
    guidance: float,
) -> None:
    told = {
        "prompt": prompt,
        "negative_prompt": negative,
        "prompt_syntax": syntax,
        "sampler": sampler,
        "sigma_schedule": schedule,
        "checkpoint": checkpoint,
        "guidance_scale": guidance,
        "steps": 20,
        "seed": 2**63 - 1,
        "width": 64,
        "height": 96,
        "loras": ("night:-0.25",),
    }
    read = parameters_from_infotext(infotext(told))
    names = resolve_names(read.pop("sampler"), read.pop("sigma_schedule", None))
    assert names == (told.pop("sampler"), told.pop("sigma_schedule"))
    assert read.pop("prompt_syntax") == "a1111"
    for name in ("prompt", "negative_prompt"):
        text, meant = read.pop(name), told.pop(name)
        if syntax == "plain":
            with suppress(UnsupportedError):  # <networks:1> and AND are words here, and cannot be there
                parts = parse_a1111(text, name)
                if None not in parts:  # as BREAK would be
                    assert [one.weight for one in parts if one is not None] == [1] * len(parts)
                    assert "".join(one.text for one in parts if one is not None) == meant
            text = re.sub(r"\\([()\[\]\\])", r"\1", text)
        assert text == meant
    del told["prompt_syntax"]
    assert read == {**told, "loras": ["night:-0.25"]}


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parameters_from_infotext(text)
    except ValueError:
        return
    assert isinstance(found["prompt"], str)


def test_a_record_too_long_for_a_jpeg_goes_without_the_text(tmp_path: Path) -> None:
    request = GenerateRequest(prompt="\x01" * 8192, negative_prompt="é(" * 2700, seed=3)
    files = [{"name": f"{n}", "digest": hashlib.sha256(bytes([n])).hexdigest()} for n in range(8)]
    path = written(tmp_path, with_record(encoded("jpeg"), "jpeg", Record.of(request, "jpeg", 3, {"lora_files": files})))
    again = GenerateRequest.from_image(path)
    assert (again.prompt, again.negative_prompt) == (request.prompt, request.negative_prompt)
