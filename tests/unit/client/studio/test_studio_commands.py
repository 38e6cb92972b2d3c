"""`compare`, `storyboard` and `angles` against a server that answers by a script."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import PIL.Image
import pytest
from typer.testing import CliRunner, Result

from diffuserve.errors import NotFoundError, QueueFullError
from diffuserve_client import GenerateRequest
from diffuserve_client._command import app
from diffuserve_client._studio.folder import filled_folder
from unit.client.fake_triton import FakeTriton, failure, image, response

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFUSERVE_URL", raising=False)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")


def png(colour: str, size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, COLOURS[colour]).save(file, "png")
    return file.getvalue()


def paint(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
    """A picture of the colour that the prompt names, of the width that is asked for."""
    if request.loras:
        yield failure(NotFoundError(f"there is no LoRA {request.loras[0]}"))
        return
    colour = next((one for one in COLOURS if one in request.prompt), None)
    if colour is None:
        yield failure(NotFoundError("there is no such colour"))
        return
    yield response(image(0, png(colour, (request.width or 64, 64)), seed=request.seed), final=True)


@pytest.fixture
def painter(fake: FakeTriton) -> FakeTriton:
    fake.script = paint
    return fake


def run(fake: FakeTriton, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--url", fake.url])


def colours(path: str | Path) -> tuple[int, ...]:
    with PIL.Image.open(path) as picture:
        found = picture.convert("RGB").getpixel((9, 9))
    assert isinstance(found, tuple)
    return tuple(map(int, found))


def test_compare_fills_a_folder(painter: FakeTriton, tmp_path: Path) -> None:
    result = run(painter, "compare", "--prompt", "red", "--prompt", "blue", "--seed", "7", "--seeds", "2", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    folder = tmp_path / "compare"
    assert {path.name for path in folder.iterdir()} == {
        "01-seed-7.png",
        "01-seed-8.png",
        "02-seed-7.png",
        "02-seed-8.png",
        "contact-sheet.png",
        "report.html",
        "report.json",
    }
    assert json.loads((folder / "report.json").read_text()).items() <= told.items()
    assert [(one["variant"], one["seed"]) for one in told["pictures"]] == [(1, 7), (1, 8), (2, 7), (2, 8)]
    assert told["pictures"][2]["mse"] == pytest.approx(2 * 255**2 / 3)
    assert [colours(folder / one["file"]) for one in told["pictures"]] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
    assert sorted(one.seed for one in painter.requests) == [7, 7, 8, 8]
    assert all(one.progress_every == 0 for one in painter.requests), "no progress where nobody looks"


def test_a_variant_that_fails_leaves_the_others(painter: FakeTriton, tmp_path: Path) -> None:
    result = run(painter, "compare", "--prompt", "red", "--lora", "none", "--lora", "night:0.5", "--sampler", "ddim")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "diffuserve: 1 of 2 pictures failed; the first, of variant 2 and seed 0: there is no LoRA night:0.5"
    ]
    assert "2  night:0.5  failed" in result.stdout
    assert "there is no LoRA night:0.5" in (tmp_path / "compare/report.html").read_text()
    assert not (tmp_path / "compare/02-seed-0.png").exists()


@pytest.mark.parametrize(
    "command", [("compare", "--prompt", "red", "--lora", "x"), ("angles", "in.png", "--lora", "x")]
)
def test_where_all_fail_nothing_is_left(painter: FakeTriton, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "in.png").write_bytes(png("red"))
    result = run(painter, *command, "-o", "new")
    assert (result.exit_code, result.stderr) == (2, "diffuserve: there is no LoRA x\n")
    assert not (tmp_path / "new").exists()


def test_a_folder_is_one_commands_at_a_time(painter: FakeTriton, tmp_path: Path) -> None:
    command = ("compare", "--prompt", "red", "-o", "new")
    first = filled_folder(tmp_path / "new", overwrite=False)
    first.__enter__()
    result = run(painter, *command)
    assert (result.exit_code, painter.requests) == (2, [])
    assert result.stderr.startswith(
        "diffuserve: the folder new is being filled by another command; choose another with "
    )
    assert run(painter, *command, "--overwrite").exit_code == 0, "as after one that was killed"
    first.__exit__(None, None, None)
    assert (tmp_path / "new/report.html").exists(), "what the other made is left"
    assert [path for path in (tmp_path / "new").iterdir() if path.name.startswith(".")] == []


def test_other_sizes_are_said(fake: FakeTriton, tmp_path: Path) -> None:
    def by_checkpoint(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(image(0, png("red", (96 if request.checkpoint == "wide" else 64, 64))), final=True)

    fake.script = by_checkpoint
    result = run(fake, "compare", "--prompt", "red", "--checkpoint", "square", "--checkpoint", "wide")
    assert result.exit_code == 0
    assert "2  wide  not measured" in result.stdout
    assert "96x64 is not the baseline&#39;s size, 64x64" in (tmp_path / "compare/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sampler", "x", "--sampler", "y", "--seeds", "129"), "are 258 pictures, and at most 256 are compared"),
        (("--baseline", "7"), "must be a variant's number, from 1 to 1"),
        (("--steps", "0"), "steps is 0, and must be from 1 to 150"),
        (("-o", "full"), "the folder full has files already; choose another with --output, or give --overwrite"),
        (("-o", "full/file"), "the folder full/file cannot be written to: File exists"),
        (("-o", "/proc/here"), "the folder /proc/here cannot be written to"),
        (("--seed", str(2**63 - 1), "--seeds", "2"), "the last seed must not exceed"),
    ],
)
def test_refused_before_any_picture_is_made(
    painter: FakeTriton, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    result = run(painter, "compare", "--prompt", "red", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert painter.requests == []


def test_overwrite_writes_into_a_folder_that_has_files(painter: FakeTriton, tmp_path: Path) -> None:
    for _ in range(2):
        result = run(painter, "compare", "--prompt", "red", "--overwrite")
        assert result.exit_code == 0, result.output


def test_no_server_is_told_once(tmp_path: Path) -> None:
    arguments = ["compare", "--prompt", "red", "--seeds", "40", "--url", "localhost:9", "--retries", "0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "compare").exists()


def test_a_storyboard_becomes_a_film_of_its_frames(painter: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(
        "style: '{scene}, plain'\nseed: 5\nduration: 0.5\nscenes: [red, {prompt: green, duration: 1.2}, blue]\n"
    )
    result = run(painter, "storyboard", "story.yaml", "-o", "film.mp4", "--fps", "10", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert (told["output"], told["seconds"], told["fps"], told["frames"]) == ("film.mp4", 2.2, 10, 22)
    assert iio.imread(tmp_path / "film.mp4", plugin="pyav").shape == (22, 64, 64, 3)
    assert [one["path"] for one in told["scenes"]] == [f"film-frames/00{number}.png" for number in (1, 2, 3)]
    assert [one["frames"] for one in told["scenes"]] == [5, 12, 5]
    assert {(one.seed, one.prompt.endswith(", plain")) for one in painter.requests} == {(5, True)}


def test_scenes_begin_with_the_picture_before_them(painter: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "init: previous\nstrength: 0.5\nscenes: [red, blue, green, {prompt: white, init: none}]\n"
    )
    result = run(painter, "storyboard", "s.yaml", "-o", "s.gif")
    assert result.exit_code == 0, result.output
    inits = {one.prompt: one.init_image for one in painter.requests}
    assert inits == {"red": b"", "white": b"", "blue": png("red"), "green": png("blue")}
    assert [one.prompt for one in painter.requests[2:]] == ["blue", "green"]


def test_what_follows_a_scene_that_failed_is_not_made(painter: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "scenes: [red, {prompt: blue, init: previous, loras: [x]}, {prompt: green, init: previous}, white]\n"
    )
    result = run(painter, "storyboard", "s.yaml", "-o", "s.gif")
    assert result.exit_code == 2
    assert result.stderr == "diffuserve: 2 of 4 pictures failed; the first, of scene 2: there is no LoRA x\n"
    assert sorted(path.name for path in (tmp_path / "s-frames").iterdir()) == ["001.png", "004.png"]
    assert not (tmp_path / "s.gif").exists()


def test_frames_of_other_sizes_make_no_film_and_are_kept(fake: FakeTriton, tmp_path: Path) -> None:
    def by_checkpoint(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(image(0, png("red", (96 if request.checkpoint else 64, 64))), final=True)

    fake.script = by_checkpoint
    (tmp_path / "s.yaml").write_text("scenes: [red, {prompt: red, checkpoint: wide}]\n")
    result = run(fake, "storyboard", "s.yaml", "-o", "s.gif")
    assert result.exit_code == 2
    assert "scene 2 is 96x64 and scene 1 64x64" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["s-frames", "s.yaml"]  # noqa: PTH208
    assert run(fake, "storyboard", "s.yaml", "-o", "s.png", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no.txt",), "cannot read no.txt: No such file or directory"),
        (("bad.yaml",), "bad.yaml: the file has the unknown key 'sceens'; known are style"),
        (("s.txt", "-o", "film.avi"), "'film.avi' does not end in .gif, .mp4, .png"),
        (("s.txt", "-o", "no/film.gif"), "the folder no does not exist; create it first"),
        (("s.txt", "-o", "a.gif", "--fps", "9"), "fps is given, and a.gif is no .mp4; leave it out"),
        (("s.txt", "-o", "a.png", "--duration", "2"), "duration is given, and a.png is no film; leave it out"),
        (("s.txt", "--strength", "0.5"), "s.txt: strength is given, and no scene begins with the picture before"),
        (("s.txt", "--frames", "full"), "the folder full has files already; choose another with --frames"),
    ],
)
def test_storyboards_that_cannot_be_meant(
    painter: FakeTriton, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "bad.yaml").write_text("sceens: [a]")
    (tmp_path / "s.txt").write_text("red\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    result = run(painter, "storyboard", *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert said in result.stderr
    assert painter.requests == []


def test_angles_makes_the_views_in_their_order(painter: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(png("red"))
    views = ("--view", "white", "--view", "the green/side", "--view", "blue")
    options = ("--strength", "0.4", "--json")
    result = run(painter, "angles", "in.png", "--prompt", "a {view} thing", *views, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert [Path(one["path"]).name for one in told["views"]] == ["01-white.png", "02-the-green-side.png", "03-blue.png"]
    assert {(one.seed, one.strength, one.init_image) for one in painter.requests} == {(0, 0.4, png("red"))}
    with PIL.Image.open(told["contact_sheet"]) as sheet:
        cells = [told["reference"], *told["views"]]
        found = [sheet.crop(one["sheet_box"]).getpixel((9, 9)) for one in cells]
    assert found == [COLOURS[name] for name in ("red", "white", "green", "blue")]


def test_a_view_that_fails_leaves_the_others(painter: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(png("red"))
    views = ("--view", "red", "--view", "mauve", "--view", "blue")
    result = run(painter, "angles", "in.png", "--prompt", "{view}", *views, "--json")
    assert result.exit_code == 2
    assert result.stderr == "diffuserve: 1 of 3 pictures failed; the first, of 'mauve': there is no such colour\n"
    told = json.loads(result.stdout)["views"]
    assert told[1] == {"view": "mauve", "error": {"code": "not_found", "message": "there is no such colour"}}
    assert [Path(told[place]["path"]).name for place in (0, 2)] == ["01-red.png", "03-blue.png"]


def test_angles_may_give_the_picture_to_the_controlnet(painter: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(png("red"))
    options = ("--method", "control", "--control-scale", "0.5", "--prompt", "red {view}", "--steps", "3")
    result = run(painter, "angles", "in.png", *options)
    assert result.exit_code == 0, result.output
    assert len(painter.requests) == 7
    assert {(one.init_image, one.control_image, one.control_scale, one.steps) for one in painter.requests} == {
        (b"", png("red"), 0.5, 3)
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no.png",), "cannot read no.png: No such file or directory; give a picture's file"),
        (("text.png",), "text.png is no picture; give a picture's file"),
        (("in.png", "--prompt", "red"), "the prompt 'red' has no {view}"),
        (("in.png", "--view", "a", "--view", "a"), "the view 'a' is given twice"),
        (("in.png", "--strength", "0"), "strength is 0"),
        (("in.png", "--control-scale", "1"), "control_scale is given, and method is img2img; leave one out"),
        (("in.png", "--method", "control", "--strength", "1"), "strength is given, and method is control"),
    ],
)
def test_angles_that_cannot_be_meant(
    painter: FakeTriton, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "in.png").write_bytes(png("red"))
    (tmp_path / "text.png").write_text("text")
    result = run(painter, "angles", *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert said in result.stderr
    assert painter.requests == []


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.01)


def test_ctrl_c_cancels_and_keeps_what_is_done(fake: FakeTriton, tmp_path: Path) -> None:
    stuck = threading.Event()

    def one_and_then_silence(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        if request.seed == 0:
            yield response(image(0, png("red"), seed=0), final=True)
        else:
            stuck.wait(60)

    fake.script = one_and_then_silence
    command = [
        sys.executable,
        "-m",
        "diffuserve_client",
        "compare",
        "--prompt",
        "red",
        "--seeds",
        "3",
        "--url",
        fake.url,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "compare/01-seed-0.png")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    stuck.set()
    assert (process.returncode, said) == (130, "diffuserve: interrupted\n")
    told = json.loads((tmp_path / "compare/report.json").read_text())
    assert [one.get("file") for one in told["pictures"]] == ["01-seed-0.png", None, None]
    assert told["pictures"][1]["error"]["code"] == "cancelled"


def test_a_full_server_is_told_with_its_exit_code(fake: FakeTriton) -> None:
    def full(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield (
            failure(QueueFullError("the queue is full")) if request.seed else response(image(0, png("red")), final=True)
        )

    fake.script = full
    result = run(fake, "compare", "--prompt", "red", "--seeds", "2", "--retries", "0")
    assert result.exit_code == 4
    assert "1 of 2 pictures failed; the first, of variant 1 and seed 1: the queue is full" in result.stderr
