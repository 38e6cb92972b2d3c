"""Pictures side by side in one picture, with labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

__all__ = ["Box", "Cell", "Sheet", "contact_sheet", "flowing_sheet"]

#: Left, top, right and bottom in pixels, as PIL's crop takes them.
Box = tuple[int, int, int, int]

LARGEST_SIDE: Final = 320  # larger pictures are shrunk to it
SMALLEST_SIDE: Final = 160  # smaller ones are enlarged by a whole number to it, or a little beyond
_MARGIN: Final = 24
_GAP: Final = 16
_ROW_LABEL: Final = 190
_TEXT_SIZE: Final = 14
_LINE: Final = 19
_MOST_LINES: Final = 4
_WIDE: Final = 1.5  # columns for each row, where they are free
_PAPER: Final = "#ffffff"
_INK: Final = "#1d2430"
_FAINT: Final = "#667085"
_EDGE: Final = "#d5dae3"
_FAILED: Final = "#fdecec"
_FAILED_INK: Final = "#a61b1b"


@dataclass(frozen=True)
class Cell:
    """A picture with a line or two below it; or, where there is none, why."""

    picture: PIL.Image.Image | None
    caption: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Sheet:
    """`boxes[row][column]` is where that cell's picture is; None where it has none."""

    image: PIL.Image.Image
    boxes: tuple[tuple[Box | None, ...], ...]


def contact_sheet(
    rows: Sequence[Sequence[Cell]], *, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> Sheet:
    """Rows of cells, each row as long as the first or shorter, every picture in a frame of the same size."""
    import PIL.Image
    import PIL.ImageDraw

    frame = _frame(rows)
    pen = _Pen()
    width, height = frame
    left = _MARGIN + (_ROW_LABEL + _GAP if any(row_labels) else 0)
    heads = [pen.wrapped(label, width) for label in column_labels]
    top = _MARGIN + (_LINE * max(map(len, heads)) + _GAP // 2 if any(heads) else 0)
    captions = [[pen.wrapped(cell.caption, width) for cell in row] for row in rows]
    below = [_LINE * max((len(lines) for lines in row), default=0) for row in captions]
    tops = [top + sum(height + text + _GAP for text in below[:row]) for row in range(len(rows))]
    size = (
        left + max(map(len, rows)) * (width + _GAP) - _GAP + _MARGIN,
        tops[-1] + height + below[-1] + _MARGIN,
    )
    image = PIL.Image.new("RGB", size, _PAPER)
    pen.draw = PIL.ImageDraw.Draw(image)
    lefts = [left + column * (width + _GAP) for column in range(max(map(len, rows)))]
    for x, lines in zip(lefts, heads, strict=False):
        pen.write(lines, x, top - _GAP // 2 - _LINE * len(lines), _INK)
    boxes = []
    for y, row, texts, label in zip(tops, rows, captions, [*row_labels, *[""] * len(rows)], strict=False):
        pen.write(pen.wrapped(label, _ROW_LABEL, height // _LINE), _MARGIN, y, _INK)
        boxes.append(tuple(_put(image, pen, cell, (x, y), frame) for x, cell in zip(lefts, row, strict=False)))
        for x, lines in zip(lefts, texts, strict=False):
            pen.write(lines, x, y + height + 3, _FAINT)
    return Sheet(image, tuple(boxes))


def flowing_sheet(cells: Sequence[Cell], columns: int | None = None) -> Sheet:
    """Cells in their order, in rows of `columns`; without, somewhat wider than high, the last row as full as can be."""
    width = columns or _columns(len(cells))
    return contact_sheet([cells[start : start + width] for start in range(0, len(cells), width)])


def _columns(count: int) -> int:
    near = range(math.ceil(math.sqrt(count)), math.ceil(math.sqrt(2 * count)) + 2)
    return min(near, key=lambda width: (-count % width, abs(width / math.ceil(count / width) - _WIDE)))


def _frame(rows: Sequence[Sequence[Cell]]) -> tuple[int, int]:
    """Width and height that hold each picture as it is shown."""
    sizes = [_shown(cell.picture.size) for row in rows for cell in row if cell.picture is not None]
    if not sizes:
        return SMALLEST_SIDE, SMALLEST_SIDE
    return max(SMALLEST_SIDE, *(width for width, _ in sizes)), max(height for _, height in sizes)


def _shown(size: tuple[int, int]) -> tuple[int, int]:
    longer = max(size)
    if longer < SMALLEST_SIDE:
        factor: float = math.ceil(SMALLEST_SIDE / longer)
    else:
        factor = min(1.0, LARGEST_SIDE / longer)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _put(image: PIL.Image.Image, pen: _Pen, cell: Cell, corner: tuple[int, int], frame: tuple[int, int]) -> Box | None:
    import PIL.Image

    x, y = corner
    width, height = frame
    if cell.picture is None:
        pen.draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 6, fill=_FAILED, outline=_FAILED_INK)
        pen.write(pen.wrapped(cell.problem, width - 20, height // _LINE - 1), x + 10, y + 10, _FAILED_INK)
        return None
    shown = _shown(cell.picture.size)
    # Whole factors keep the pixels of a small picture what they are.
    how = PIL.Image.Resampling.NEAREST if shown[0] > cell.picture.width else PIL.Image.Resampling.LANCZOS
    x, y = x + (width - shown[0]) // 2, y + (height - shown[1]) // 2
    image.paste(cell.picture.convert("RGB").resize(shown, how), (x, y))
    pen.draw.rectangle((x - 1, y - 1, x + shown[0], y + shown[1]), outline=_EDGE)
    return x, y, x + shown[0], y + shown[1]


class _Pen:
    """Text in the font that Pillow brings, wrapped at words."""

    draw: PIL.ImageDraw.ImageDraw

    def __init__(self) -> None:
        import PIL.ImageFont

        self.font = PIL.ImageFont.load_default(_TEXT_SIZE)

    def write(self, lines: Sequence[str], x: int, y: int, colour: str) -> None:
        for number, line in enumerate(lines):
            self.draw.text((x, y + number * _LINE), line, fill=colour, font=self.font)

    def wrapped(self, text: str, width: int, most: int = _MOST_LINES) -> list[str]:
        """Lines no wider than `width` pixels, at most `most`, the last with an ellipsis where more would follow."""
        lines = [line for part in text.splitlines() for line in self._lines(part, width)]
        if len(lines) > most:
            lines = [*lines[: most - 1], self._cut(f"{lines[most - 1]}…", width)]
        return lines

    def _lines(self, text: str, width: int) -> list[str]:
        lines: list[str] = []
        for word in text.split():
            joined = f"{lines[-1]} {word}" if lines else word
            if lines and self.font.getlength(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(self._cut(word, width))
        return lines

    def _cut(self, word: str, width: int) -> str:
        if self.font.getlength(word) <= width:
            return word
        bare = word.rstrip("…")
        while bare and self.font.getlength(f"{bare}…") > width:
            bare = bare[:-1]
        return f"{bare}…"
