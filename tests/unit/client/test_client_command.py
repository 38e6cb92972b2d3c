"""The `diffuserve` command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner, Result

import diffuserve
from diffuserve_client import (
    CancelledError,
    Client,
    ComponentFailedError,
    ConnectionFailedError,
    DeadlineError,
    DiffuserveError,
    DrainingError,
    GenerateRequest,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    QueueFullError,
    UnavailableError,
    UnsupportedError,
    _exits,
    _options,
)
from diffuserve_client._command import app
from diffuserve_client._exits import exit_code
from unit.client.fake_triton import FakeTriton, answer, failure, picture, silence

COMMAND = [sys.executable, "-m", "diffuserve_client"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFUSERVE_URL", raising=False)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # the command sets it, and would leave it to later tests


def run(*arguments: str, url: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"DIFFUSERVE_URL": url} if url else None)


def test_it_writes_the_picture_and_says_so(fake: FakeTriton, tmp_path: Path) -> None:
    result = run("generate", "a red circle", "-o", "circle.png", "--url", fake.url)
    assert (result.exit_code, result.stderr) == (0, "")
    path, seed, seconds = result.stdout.strip().split("  ")
    assert (path, seed) == ("circle.png", "seed 7")
    assert float(seconds.removesuffix(" s")) >= 0
    with PIL.Image.open(tmp_path / "circle.png") as opened:
        assert (opened.format, opened.getpixel((0, 0))) == ("PNG", (255, 0, 0))
    assert os.listdir(tmp_path) == ["circle.png"]  # noqa: PTH208
    (sent,) = fake.requests
    assert sent == GenerateRequest(prompt="a red circle", seed=sent.seed), "no progress where nobody looks"


def test_loras_are_as_many_options(fake: FakeTriton, tmp_path: Path) -> None:
    result = run("generate", "a", "--lora", "night:0.5", "--lora", "bar", "-o", "a.png", url=fake.url)
    assert result.exit_code == 0, result.output
    (sent,) = fake.requests
    assert sent == GenerateRequest(prompt="a", loras=("night:0.5", "bar"), seed=sent.seed)
    result = run("generate", "a", "--lora", "../night", "-o", "a.png", url=fake.url)
    assert (result.exit_code, "no path" in result.output) == (2, True)


def test_pictures_are_read_and_sent(fake: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(b"a picture")
    (tmp_path / "mask.png").write_bytes(b"a mask")
    (tmp_path / "edges.png").write_bytes(b"edges")
    options = ("--seed", "5", "--init-image", "in.png", "--mask", "mask.png", "--strength", "0.5")
    control = ("--control", "edges.png", "--control-scale", "0.75")
    result = run("generate", "a", *options, *control, "-o", "a.png", url=fake.url)
    assert result.exit_code == 0, result.output
    assert fake.requests == [
        GenerateRequest(
            prompt="a",
            seed=5,
            init_image=b"a picture",
            mask_image=b"a mask",
            strength=0.5,
            control_image=b"edges",
            control_scale=0.75,
        ),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--init-image", "no.png"),
            "diffuserve: cannot read no.png: No such file or directory; give a picture's file",
        ),
        (("--init-image", "."), "diffuserve: cannot read .: Is a directory"),
        (("--init-image", "empty.png"), "diffuserve: empty.png is empty; give a picture's file"),
        (
            ("--init-image", "/dev/zero"),
            "diffuserve: /dev/zero has more than 33554432 bytes; give a picture's file that is shorter",
        ),
        (("--mask", "mask.png"), "diffuserve: mask_image is given without init_image"),
        (("--control", "no.png"), "diffuserve: cannot read no.png: No such file"),
        (("--control-scale", "2.1"), "diffuserve: control_scale is 2.1, and must be from 0 to 2"),
    ],
)
def test_pictures_that_are_not_there_are_told(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"a mask")
    (tmp_path / "empty.png").touch()
    result = run("generate", "a", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(said)


def test_every_option_reaches_the_server(fake: FakeTriton) -> None:
    options = (
        "--negative-prompt blue --checkpoint shapes --width 96 --height 64 --steps 9 --guidance-scale 3.5 "
        "--sampler euler --seed 12 --num-images 2 --format webp --prompt-syntax a1111 --clip-skip 1"
    )
    result = run("generate", "a", *options.split(), "-o", "a.png", url=fake.url)
    assert result.exit_code == 0, result.output
    assert fake.requests == [
        GenerateRequest(
            prompt="a",
            negative_prompt="blue",
            prompt_syntax="a1111",
            clip_skip=1,
            checkpoint="shapes",
            width=96,
            height=64,
            steps=9,
            guidance_scale=3.5,
            sampler="euler",
            seed=12,
            num_images=2,
            image_format="webp",
        )
    ]


def test_previews_are_files_until_the_pictures_are_there(fake: FakeTriton, tmp_path: Path) -> None:
    seen = list[dict[str, bytes]]()

    def watched(server: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        *before, last = answer(server, request)
        yield from before
        # The client asks for nothing meanwhile, so its files are awaited.
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("*.preview.webp"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append({path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".webp"})
        yield last

    fake.script = watched
    result = run("generate", "a", "-n", "2", "-o", "a.webp", "--preview-every", "20", url=fake.url)
    assert (result.exit_code, fake.requests[0].preview_every) == (0, 20)
    assert seen == [dict.fromkeys(("a-0.preview.webp", "a-1.preview.webp"), picture("blue", "webp"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.webp", "a-1.webp"]


def test_several_images_are_numbered(fake: FakeTriton, tmp_path: Path) -> None:
    result = run("generate", "a", "-n", "3", "-o", "folder.d/out.png", url=fake.url)
    assert result.exit_code == 2, "the folder is not there"
    (tmp_path / "folder.d").mkdir()
    result = run("generate", "a", "-n", "3", "-o", "folder.d/out.png", url=fake.url)
    assert [line.split("  ")[:2] for line in result.stdout.splitlines()] == [
        ["folder.d/out-0.png", "seed 7"],
        ["folder.d/out-1.png", "seed 8"],
        ["folder.d/out-2.png", "seed 9"],
    ]
    assert sorted(path.name for path in (tmp_path / "folder.d").iterdir()) == ["out-0.png", "out-1.png", "out-2.png"]


@pytest.mark.parametrize(
    ("name", "image_format"), [("a.png", "png"), ("a.jpg", "jpeg"), ("a.JPEG", "jpeg"), ("a.webp", "webp")]
)
def test_the_suffix_says_the_format(fake: FakeTriton, tmp_path: Path, name: str, image_format: str) -> None:
    assert run("generate", "a", "-o", name, url=fake.url).exit_code == 0
    assert fake.requests[0].image_format == image_format
    with PIL.Image.open(tmp_path / name) as opened:
        assert opened.format == image_format.upper()


def test_json_is_one_object(fake: FakeTriton) -> None:
    result = run("generate", "a", "-n", "2", "--json", url=fake.url)
    parsed = json.loads(result.stdout)
    assert parsed["images"] == [
        {"path": "out-0.png", "index": 0, "seed": 7, "info": {"sampler": "ddim"}},
        {"path": "out-1.png", "index": 1, "seed": 8, "info": {"sampler": "ddim"}},
    ]
    assert parsed["seconds"] > 0
    assert GenerateRequest(**parsed["request"]) == fake.requests[0]


def complaint(result: Result) -> str:
    """The one line on stderr."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("diffuserve: ")
    return line.removeprefix("diffuserve: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "missing/a.png"), "the folder missing does not exist; create it"),
        (("-o", "a.gif"), "'a.gif' does not end in .png, .jpg, .jpeg, .webp; let it, or give --format"),
        (("-o", "."), "'' does not end in"),
        (("-o", "folder.png"), "folder.png is a folder; name a file in it"),
        (("-n", "2", "-o", "x/a.png"), "the folder x does not exist"),
        (("--format", "gif"), "image_format is 'gif', and must be one of png, jpeg, webp"),
        (("--steps", "0"), "steps is 0, and must be from 1 to 150"),
        (("--guidance-scale", "nan"), "guidance_scale is nan"),
        (("--seed", "-2"), "seed is -2"),
        (("--width", "4294967296"), "width is 4294967296"),
        (("--timeout", "0"), "the total timeout is 0.0 s, and must be above 0"),
        (("--url", "http://localhost"), "the address is 'http://localhost', and must be host:port"),
    ],
)
def test_mistakes_are_told_before_the_server_is_asked(
    fake: FakeTriton, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    result = run("generate", "a", *arguments, url=fake.url)
    assert result.exit_code == 2
    assert complaint(result).startswith(message)
    assert fake.requests == []


def test_a_prompt_that_is_not_utf_8(fake: FakeTriton) -> None:
    result = run("generate", os.fsdecode(b"caf\xe9"), url=fake.url)
    assert result.exit_code == 2
    assert "prompt cannot be UTF-8" in complaint(result)


def test_a_usage_error_is_2() -> None:
    assert run("generate").exit_code == 2
    assert run("generate", "a", "--nonsense").exit_code == 2
    assert run("generate", "a", "--steps", "many").exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgumentError, 2),
        (NotFoundError, 2),
        (UnsupportedError, 2),
        (ConnectionFailedError, 3),
        (UnavailableError, 4),
        (QueueFullError, 4),
        (DeadlineError, 4),
        (DrainingError, 4),
        (CancelledError, 1),
        (ComponentFailedError, 1),
        (InternalError, 1),
        (DiffuserveError, 1),
    ],
)
def test_exit_codes(error: type[DiffuserveError], code: int) -> None:
    assert exit_code(error("it is so")) == code


def test_the_servers_error_is_one_line(fake: FakeTriton, tmp_path: Path) -> None:
    def full(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield failure(QueueFullError("the queue is full;\ntry again", eta_ms=10**7))  # no use to wait for it

    fake.script = full
    result = run("generate", "a", url=fake.url)
    assert (result.exit_code, complaint(result)) == (4, "the queue is full; try again")
    assert list(tmp_path.iterdir()) == []


def test_what_a_terminal_would_obey_is_not_passed_on(fake: FakeTriton) -> None:
    fake.script = lambda *_: iter([failure(InvalidArgumentError("no \x1b]0;title\x07 such sampler"))])
    assert complaint(run("generate", "a", url=fake.url)) == "no ?]0;title? such sampler"


def test_a_person_is_told_what_is_tried_again(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [QueueFullError("the queue is full", eta_ms=1)]

    def full_once(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield from [failure(left.pop())] if left else answer(fake, request)

    fake.script = full_once
    monkeypatch.setattr(_exits, "_is_watched", lambda: True)
    result = run("generate", "a", url=fake.url)
    assert result.exit_code == 0
    assert re.search(r"^diffuserve: the queue is full; trying again in 0\.1 s$", result.stderr, re.MULTILINE)
    left.append(QueueFullError("the queue is full", eta_ms=1))
    monkeypatch.setattr(_exits, "_is_watched", lambda: False)
    assert run("generate", "a", url=fake.url).stderr == ""


def test_the_deadline_is_4(fake: FakeTriton) -> None:
    fake.script = silence
    result = run("generate", "a", "--timeout", "0.3", url=fake.url)
    assert result.exit_code == 4
    assert "not done within 0.3 s" in complaint(result)
    assert fake.over.wait(10)


def test_ctrl_c_is_130_and_cancels(fake: FakeTriton) -> None:
    def interrupted(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        yield from silence(fake, request)

    fake.script = interrupted
    result = run("generate", "a", url=fake.url)
    assert (result.exit_code, complaint(result)) == (130, "interrupted")
    assert fake.over.wait(10)


def test_ctrl_c_while_grpc_is_imported_waits_for_the_import(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []

    def slow_client(*arguments: Any, **options: Any) -> Client:
        os.kill(os.getpid(), signal.SIGINT)
        imported.append(True)
        return Client(*arguments, **options)

    monkeypatch.setattr(_options, "Client", slow_client)
    result = run("generate", "a", url=fake.url)
    assert (result.exit_code, complaint(result)) == (130, "interrupted")
    assert imported
    assert fake.requests == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_that_cannot_be_written(fake: FakeTriton, tmp_path: Path) -> None:
    def in_the_way(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        (tmp_path / "out.png").mkdir()  # after the command looked
        yield from answer(fake, request)

    fake.script = in_the_way
    result = run("generate", "a", url=fake.url)
    assert (result.exit_code, complaint(result)) == (
        1,
        "cannot write out.png: Is a directory; choose another place with --output",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_file_that_is_there_is_replaced_whole_or_not_at_all(fake: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"old")
    fake.script = lambda fake, request: iter([failure(InternalError("no"))])
    assert run("generate", "a", url=fake.url).exit_code == 1
    assert (tmp_path / "out.png").read_bytes() == b"old"
    fake.script = answer
    assert run("generate", "a", url=fake.url).exit_code == 0
    assert (tmp_path / "out.png").read_bytes() != b"old"


def test_version_and_help() -> None:
    assert run("--version").stdout == f"diffuserve {diffuserve.__version__}\n"
    for arguments in (("--help",), ("generate", "--help")):
        text = " ".join(run(*arguments).stdout.split())
        assert "Exit codes: 0 done; 1 any" in text
        assert "130 Ctrl-C" in text


def test_as_a_process(fake: FakeTriton, tmp_path: Path) -> None:
    environment = {**os.environ, "DIFFUSERVE_URL": fake.url}
    environment.pop("GRPC_VERBOSITY")
    command = [*COMMAND, "generate", "a red circle", "-o", "a.png"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("a.png  seed 7  ")
    assert (tmp_path / "a.png").stat().st_mode & 0o077 == 0o077 & ~_umask() & 0o666
    fake.stop()
    environment["DIFFUSERVE_RETRIES"] = "0"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"diffuserve: cannot reach a server at {fake.url} (")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
