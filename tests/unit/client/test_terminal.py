"""What a terminal shows while pictures are made."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from rich.console import Console

from diffuserve_client._terminal import Screen, blocks, iterm2, kitty, protocol_of
from unit.client.fake_triton import FakeTriton, picture

COMMAND = [sys.executable, "-m", "diffuserve_client"]
KITTY = re.compile(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\")


@pytest.mark.parametrize(
    ("environment", "colours", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "truecolor", "kitty"),
        ({"TERM": "xterm-ghostty"}, "truecolor", "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "256", "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "256", "iterm2"),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "tmux", "KITTY_WINDOW_ID": "1"}, "256", "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, "truecolor", "blocks"),
        ({"TERM": "xterm-256color"}, "256", "blocks"),
        ({"TERM": "xterm"}, "standard", None),
        ({"TERM": "dumb"}, None, None),
    ],
)
def test_the_terminal_is_told_by_its_environment(
    environment: dict[str, str], colours: str | None, protocol: str | None
) -> None:
    assert protocol_of(environment, colours) == protocol


def gradient() -> PIL.Image.Image:
    return PIL.Image.linear_gradient("L").convert("RGB")


def decoded(data: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.standard_b64decode(data)))


def test_kitty_gets_the_picture_in_chunks() -> None:
    noise = PIL.Image.effect_noise((100, 100), 90).convert("RGB")
    parts = KITTY.findall(kitty(noise, 40, 20, 3))
    assert len(parts) > 2
    assert parts[0][0] == "a=T,f=100,i=3,p=1,q=2,C=1,c=40,r=20,m=1"
    assert [told for told, _ in parts[1:]] == ["m=1"] * (len(parts) - 2) + ["m=0"]
    assert all(len(data) <= 4096 for _, data in parts)
    assert decoded("".join(data for _, data in parts)).tobytes() == noise.tobytes()


def test_iterm2_gets_the_picture_whole() -> None:
    match = re.fullmatch(r"\x1b\]1337;File=([^:]*):(.*)\a", iterm2(gradient(), 40, 20))
    assert match is not None
    assert decoded(match[2]).tobytes() == gradient().tobytes()
    fields = dict(field.split("=") for field in match[1].split(";"))
    assert (fields["width"], fields["height"], fields["inline"]) == ("40", "20", "1")
    assert int(fields["size"]) == len(base64.standard_b64decode(match[2]))


def test_blocks_are_two_pixels_each() -> None:
    image = PIL.Image.new("RGB", (2, 4))
    pixels = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)]
    image.putdata(pixels)
    found = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", blocks(image, 2, 2, 0, "truecolor"))
    assert [(tuple(map(int, one[:3])), tuple(map(int, one[3:]))) for one in found] == [
        (pixels[0], pixels[2]),
        (pixels[1], pixels[3]),
        (pixels[4], pixels[6]),
        (pixels[5], pixels[7]),
    ]
    assert "38;5;" in blocks(image, 2, 2, 0, "256")


def screen(**options: Any) -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=50, height=30, **options)
    return Screen(console, "kitty"), file


def test_pictures_are_drawn_over_one_another_and_beside_each_other() -> None:
    drawn, file = screen()
    drawn.draw(0, picture("red"))
    assert file.getvalue().startswith("\n" * 20 + "\x1b7\x1b[20A\r\x1b_Ga=T,f=100,i=1,")
    assert file.getvalue().endswith("\x1b\\\x1b8")
    file.truncate(0)
    file.seek(0)
    drawn.draw(0, picture("blue", "webp"))
    drawn.draw(0, b"no picture")
    assert file.getvalue().startswith("\x1b7\x1b[20A\r\x1b_G"), "no more room is made"
    file.truncate(0)
    file.seek(0)
    drawn.draw(1, picture("green"))
    assert file.getvalue() == "", "41 to 81 of 50 columns"


def test_a_terminal_too_small_for_pictures_shows_none() -> None:
    file = io.StringIO()
    Screen(Console(file=file, force_terminal=True, width=50, height=5), "blocks").draw(0, picture())
    assert file.getvalue() == ""


def seen(command: list[str], environment: dict[str, str]) -> tuple[bytes, str]:
    """What a command writes to a terminal on its stderr, and to its stdout. It must succeed."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "LINES": "40", "COLUMNS": "100", **environment}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = b""
        # Linux ends a terminal that nobody holds any more with an error.
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:
            pass
        finally:
            os.close(ours)
        stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return shown, stdout


def test_a_terminal_shows_progress(fake: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "generate", "a [red] circle", "--steps", "3"]
    shown, stdout = seen(command, {"DIFFUSERVE_URL": fake.url, "TERM": "xterm"})
    assert stdout.startswith("out.png  seed 7  ")
    assert (fake.requests[0].progress_every, fake.requests[0].preview_every) == (1, 0)
    assert b"a [red] circle" in shown
    assert b"3/3" in shown


@pytest.mark.parametrize("options", [(), ("--no-show",)])
def test_previews_and_then_the_picture_are_shown(
    fake: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "generate", "a", "--steps", "10", *options]
    shown, _ = seen(command, {"DIFFUSERVE_URL": fake.url, "TERM": "xterm-kitty"})
    colours = [decoded(data).getpixel((0, 0)) for _, data in KITTY.findall(shown.decode())]
    assert colours == ([] if options else [(0, 0, 255), (0, 0, 255), (255, 0, 0)])
    assert fake.requests[0].preview_every == (0 if options else 5)
    assert b"10/10" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
