"""Contact sheets: every picture at its place, whatever the sizes and labels."""

from __future__ import annotations

import PIL.Image
import pytest

from diffuserve_client._studio.contact_sheet import LARGEST_SIDE, Cell, contact_sheet, flowing_sheet

COLOURS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#00ffff", "#ff00ff", "#808080"]


def cells(*sizes: tuple[int, int]) -> list[Cell]:
    return [Cell(PIL.Image.new("RGB", size, colour), f"{size}") for size, colour in zip(sizes, COLOURS, strict=False)]


def colours_at(sheet_image: PIL.Image.Image, box: tuple[int, int, int, int]) -> list[str]:
    crop = sheet_image.crop(box)
    found = crop.getcolors()
    assert found is not None
    return ["#{:02x}{:02x}{:02x}".format(*colour) for _, colour in found]  # type: ignore[misc]


def test_each_box_holds_its_picture_alone() -> None:
    pictures = cells((64, 64), (96, 64), (64, 96), (512, 256), (8, 8), (160, 160))
    sheet = contact_sheet(
        [pictures[:3], pictures[3:]], row_labels=["first", "second"], column_labels=["a", "b\nsecond line", "c" * 99]
    )
    boxes = [box for row in sheet.boxes for box in row]
    for colour, box in zip(COLOURS, boxes, strict=False):
        assert box is not None
        assert colours_at(sheet.image, box) == [colour]
    sizes = [(box[2] - box[0], box[3] - box[1]) for box in boxes if box]
    assert sizes == [(192, 192), (192, 128), (128, 192), (LARGEST_SIDE, 160), (160, 160), (160, 160)]


def test_a_failure_has_no_box_and_is_said() -> None:
    sheet = contact_sheet([[*cells((64, 64)), Cell(None, problem="Failed: " + "no such thing " * 200)]])
    assert sheet.boxes[0][1] is None
    plain = contact_sheet([[*cells((64, 64)), Cell(None)]])
    assert sheet.image.size == plain.image.size
    assert sheet.image.tobytes() != plain.image.tobytes()


def test_labels_make_no_difference_to_the_size_of_pictures_and_stay_within_the_sheet() -> None:
    long = "a very long prompt " * 400
    sheet = contact_sheet([cells((64, 64))], row_labels=[long], column_labels=[long])
    assert sheet.image.width < 600
    assert sheet.image.height < 400
    right_edge = sheet.image.crop((sheet.image.width - 4, 0, sheet.image.width, sheet.image.height))
    assert right_edge.getcolors() == [(4 * sheet.image.height, (255, 255, 255))]


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 5), (6, 3), (7, 4), (8, 4), (12, 4), (17, 6)]
)
def test_rows_flow(count: int, columns: int) -> None:
    sheet = flowing_sheet(cells(*[(16, 16)] * 7)[:1] * count)
    assert [len(row) for row in sheet.boxes[:1]] == [columns]
    assert sum(len(row) for row in sheet.boxes) == count


def test_columns_may_be_chosen() -> None:
    sheet = flowing_sheet(cells(*[(16, 16)] * 7), 3)
    assert [len(row) for row in sheet.boxes] == [3, 3, 1]
    assert [colours_at(sheet.image, box)[0] for row in sheet.boxes for box in row if box] == COLOURS
