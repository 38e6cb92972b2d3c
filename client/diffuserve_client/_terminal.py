"""What a terminal shows while pictures are made: a bar, and the pictures themselves where it can.

Pictures are drawn by kitty's graphics protocol or iTerm2's inline images where the terminal is known to have one of
them, else with half blocks, two pixels to a character, where it has enough colours. Nothing is asked of the terminal:
an answer could come late, and be taken for what somebody typed.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._events import decoded

if TYPE_CHECKING:
    import PIL.Image
    from rich.console import Console

__all__ = ["Watcher", "protocol_of", "watching"]

Protocol = Literal["kitty", "iterm2", "blocks"]

_MOST_ROWS: Final = 20
_KEPT_ROWS: Final = 4  # for the bar, and what the command says at the end
_MOST_PIXELS: Final = 512  # a side: enough for 20 rows, little enough for a slow line
_KITTY_CHUNK: Final = 4096
_KITTY: Final = ("xterm-kitty", "xterm-ghostty")
_ITERM2: Final = ("iTerm.app", "WezTerm", "mintty")
_ESC: Final = "\x1b"


def protocol_of(environment: Mapping[str, str], colours: str | None) -> Protocol | None:
    """How a terminal shows pictures; None where it does not. `colours` is rich's word for how many it has."""
    term = environment.get("TERM", "")
    if "TMUX" not in environment and not term.startswith(("screen", "tmux")):  # which keep such pictures to themselves
        if term in _KITTY or "KITTY_WINDOW_ID" in environment:
            return "kitty"
        if environment.get("TERM_PROGRAM") in _ITERM2:
            return "iterm2"
    return "blocks" if colours in ("256", "truecolor") else None


class Watcher:
    """What is told to whoever looks: nothing, unless it is told otherwise.

    `on_progress` is None where nobody looks, so that no progress is asked of the server. `shows`: whether `show` does
    anything.
    """

    def __init__(self, on_progress: Callable[[Event], None] | None = None, screen: Screen | None = None) -> None:
        self.on_progress = on_progress
        self._screen = screen

    @property
    def shows(self) -> bool:
        return self._screen is not None

    def show(self, index: int, data: bytes) -> None:
        """The newest of image `index`, encoded; in place of the one before."""
        if self._screen is not None:
            self._screen.draw(index, data)


@contextmanager
def watching(request: GenerateRequest, *, show: bool | None) -> Iterator[Watcher]:
    """A bar on stderr, gone when done, and the pictures above it, which stay. `show`: None is where it can.

    Raises InvalidArgumentError where pictures are to be shown and stderr is no terminal.
    """
    if not sys.stderr.isatty():
        if show:
            raise InvalidArgumentError("--show is given, and stderr is no terminal; leave it out", input="show")
        yield Watcher()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    protocol = protocol_of(os.environ, console.color_system)
    if show and protocol is None:
        protocol = "blocks"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    label = " ".join(request.prompt.split())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(escape(label if len(label) <= 40 else f"{label[:39]}…"), total=None)
        screen = None if protocol is None or show is False else Screen(console, protocol)
        yield Watcher(lambda event: progress.update(task, completed=event.step, total=event.steps), screen)


class Screen:
    """A strip of rows above the bar, in which pictures are drawn over one another. The bar has one row."""

    def __init__(self, console: Console, protocol: Protocol) -> None:
        self._console = console
        self._protocol = protocol
        self._rows = 0  # until the first picture makes room for itself

    def draw(self, index: int, data: bytes) -> None:
        """Raises nothing: what cannot be decoded, or does not fit beside the others, is left out."""
        try:
            image = decoded(data).convert("RGB")
        except (OSError, ValueError):
            return
        rows = self._rows or min(_MOST_ROWS, self._console.height - _KEPT_ROWS)
        columns = max(1, round(2 * rows * image.width / image.height))  # a character is twice as high as wide
        left = index * (columns + 1)
        if rows < 2 or left + columns > self._console.width:
            return
        if not self._rows:
            self._rows = rows
            self._console.print("\n" * (rows - 1))
        image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
        picture = self._encoded(image, columns, rows, left)
        move = f"{_ESC}[{rows}A\r" + (f"{_ESC}[{left}C" if left else "")
        self._write(f"{_ESC}7{move}{picture}{_ESC}8")

    def _encoded(self, image: PIL.Image.Image, columns: int, rows: int, left: int) -> str:
        if self._protocol == "kitty":
            return kitty(image, columns, rows, 1 + left)
        if self._protocol == "iterm2":
            return iterm2(image, columns, rows)
        return blocks(image, columns, rows, left, self._console.color_system)

    def _write(self, text: str) -> None:
        from rich.control import Control
        from rich.segment import ControlType, Segment

        # As a control code it goes out at once, between two drawings of the bar, which stays where it is.
        control = Control()
        control.segment = Segment(text, None, [(ControlType.CARRIAGE_RETURN,)])
        self._console.control(control)


def kitty(image: PIL.Image.Image, columns: int, rows: int, number: int) -> str:
    """The picture by kitty's graphics protocol: PNG in chunks, drawn where the cursor is, which stays.

    Pictures of the same number are in place of one another. https://sw.kovidgoyal.net/kitty/graphics-protocol/
    """
    data = base64.standard_b64encode(_png(image)).decode()
    chunks = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    first = f"a=T,f=100,i={number},p=1,q=2,C=1,c={columns},r={rows},"
    return "".join(
        f"{_ESC}_G{first if place == 0 else ''}m={int(place < len(chunks) - 1)};{chunk}{_ESC}\\"
        for place, chunk in enumerate(chunks)
    )


def iterm2(image: PIL.Image.Image, columns: int, rows: int) -> str:
    """The picture as one of iTerm2's inline images. https://iterm2.com/documentation-images.html"""
    data = _png(image)
    fields = f"inline=1;size={len(data)};width={columns};height={rows};preserveAspectRatio=1;doNotMoveCursor=1"
    return f"{_ESC}]1337;File={fields}:{base64.standard_b64encode(data).decode()}\a"


def blocks(image: PIL.Image.Image, columns: int, rows: int, left: int, colours: str | None) -> str:
    """The picture in half blocks: their own colour is the upper pixel's, that behind them the lower one's."""
    from rich.color import Color, ColorSystem
    from rich.style import Style

    system = {"256": ColorSystem.EIGHT_BIT, "standard": ColorSystem.STANDARD}.get(colours or "", ColorSystem.TRUECOLOR)
    small = image.resize((columns, 2 * rows))

    def style(column: int, row: int) -> Style:
        upper, lower = (small.getpixel((column, 2 * row + half)) for half in (0, 1))
        return Style(color=Color.from_rgb(*_levels(upper)), bgcolor=Color.from_rgb(*_levels(lower)))

    lines = (
        "".join(style(column, row).render("▀", color_system=system) for column in range(columns)) for row in range(rows)
    )
    return (f"{_ESC}[B\r" + (f"{_ESC}[{left}C" if left else "")).join(lines)


def _levels(pixel: Any) -> tuple[int, int, int]:
    red, green, blue = pixel
    return red, green, blue


def _png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
