"""The commands that make a picture from what is there already: img2img, inpaint, and --from-image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from diffuserve_client import GenerateRequest
from diffuserve_client._command import app
from unit.client.fake_triton import FakeTriton, picture


@pytest.fixture(autouse=True)
def _in_a_folder_with_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # the command sets it, and would leave it to later tests
    for name in ("init", "mask", "edges"):
        Path(f"{name}.png").write_bytes(name.encode())


def run(*arguments: str, url: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"DIFFUSERVE_URL": url} if url else None)


def made(fake: FakeTriton, *arguments: str) -> GenerateRequest:
    """The request that a command sends."""
    result = run(*arguments, url=fake.url)
    assert result.exit_code == 0, result.output
    return fake.requests[-1]


def test_img2img_and_inpaint(fake: FakeTriton) -> None:
    begun = GenerateRequest(prompt="a", init_image=b"init", strength=0.5, seed=3)
    assert made(fake, "img2img", "init.png", "a", "--strength", "0.5", "--seed", "3") == begun
    request = made(fake, "inpaint", "init.png", "mask.png", "a", "--strength", "0.5", "--seed", "3", "-o", "a.webp")
    assert request == replace(begun, mask_image=b"mask", image_format="webp")
    assert run("img2img", "none.png", "a").stderr == (
        "diffuserve: cannot read none.png: No such file or directory; give a picture's file\n"
    )
    assert run("img2img", "init.png").stderr == "diffuserve: no prompt is given; give one, or --from-image\n"


def test_a_picture_is_repeated_with_changes(fake: FakeTriton) -> None:
    options = ("--seed", "5", "--sampler", "euler", "--lora", "night:0.5", "-n", "2", "--prompt-syntax", "a1111")
    first = made(fake, "generate", "a (red:1.2) circle", "--negative-prompt", "blue", *options)
    again = replace(first, seed=8, num_images=1, sampler="ddim")  # of the second; the server tells the sampler
    assert made(fake, "generate", "--from-image", "out-1.png") == again
    changed = made(fake, "generate", "a square", "--from-image", "out-1.png", "--seed", "9", "--lora", "bar")
    assert changed == replace(again, prompt="a square", seed=9, loras=("bar",))
    drawn = made(fake, "generate", "--from-image", "out-1.png", "--seed=-1", "-o", "a.jpg")
    assert drawn == replace(again, seed=drawn.seed, image_format="jpeg")
    assert drawn.seed != 8
    begun = made(fake, "img2img", "init.png", "--from-image", "out-1.png")
    assert begun == replace(again, init_image=b"init")


def test_pictures_that_it_was_made_with_are_asked_for(fake: FakeTriton) -> None:
    first = made(fake, "inpaint", "init.png", "mask.png", "a", "--control", "edges.png", "--seed", "7")
    first = replace(first, sampler="ddim")
    result = run("img2img", "init.png", "--from-image", "out.png", url=fake.url)
    assert (result.exit_code, result.stderr) == (
        2,
        "diffuserve: out.png was made with a picture as mask_image, which is not in it; give it (inpaint, or --mask)\n",
    )
    rest = ("--mask", "mask.png", "--control", "edges.png", "--from-image", "out.png", "-o", "a.png")
    assert made(fake, "generate", "--init-image", "init.png", *rest) == first
    result = run("generate", "--init-image", "edges.png", *rest, url=fake.url)
    assert (result.exit_code, result.stderr) == (
        0,
        "diffuserve: note: out.png was made with another init_image, or none; the picture will differ\n",
    )
    assert fake.requests[-1] == replace(first, init_image=b"edges")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.png", "cannot read none.png: No such file or directory; give a picture's file"),
        ("init.png", "init.png cannot be used: it is no PNG, JPEG or WebP; give the file as it was written"),
        ("plain.png", "plain.png does not say how it was made; give a picture that diffuserve or a web UI"),
    ],
)
def test_files_that_do_not_say_how_they_were_made(name: str, said: str) -> None:
    Path("plain.png").write_bytes(picture())
    result = run("generate", "--from-image", name)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith(f"diffuserve: {said}")


def test_without_metadata_the_file_is_as_it_came(fake: FakeTriton) -> None:
    made(fake, "generate", "a", "--no-metadata")
    assert Path("out.png").read_bytes() == picture()
    made(fake, "generate", "a")
    assert Path("out.png").read_bytes() != picture()


def test_show_needs_a_terminal(fake: FakeTriton) -> None:
    result = run("generate", "a", "--show", url=fake.url)
    assert (result.exit_code, result.stderr) == (
        2,
        "diffuserve: --show is given, and stderr is no terminal; leave it out\n",
    )
    assert fake.requests == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("img", ["img2img"]),
        ("inpaint --tls-c", ["--tls-ca", "--tls-cert"]),
        ("generate --sampler dpmpp_2m", ["dpmpp_2m", "dpmpp_2m_sde"]),
        ("generate --sigma-schedule k", ["karras"]),
        ("img2img --format ", ["png", "jpeg", "webp"]),
    ],
)
def test_the_shell_completes(typed: str, offered: list[str]) -> None:
    words = f"diffuserve {typed}"
    environment = {"_DIFFUSERVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(app, [], prog_name="diffuserve", env=environment)
    assert result.stdout.split() == offered
