"""The comparison, its numbers and its page, from pictures that were made up."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import PIL.Image
import pytest

from diffuserve.request import Event
from diffuserve_client import DiffuserveError, GenerateRequest, GenerateResult, NotFoundError
from diffuserve_client._results import result_from
from diffuserve_client._studio.comparison import Comparison, compared
from diffuserve_client._studio.report import LARGEST_SIDE, report_html
from diffuserve_client._studio.variants import Plan

NASTY = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"


def made(level: int, size: tuple[int, int] = (64, 64)) -> GenerateResult:
    """A grey picture as a server would send it."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((size[1], size[0], 3), level, np.uint8)).save(file, "png")
    event = Event(kind="image", data=file.getvalue(), info={})
    return result_from(GenerateRequest(prompt="a"), [event])


def comparison(outcomes: list[GenerateResult | DiffuserveError], seeds: int = 1, prompt: str = "a") -> Comparison:
    count = len(outcomes) // seeds
    plan = Plan.of({"prompt": [prompt], "sampler": [f"s{number}" for number in range(count)]}, range(seeds))
    return compared(plan, outcomes, [f"{number}.png" for number in range(len(outcomes))])


def numbers(found: Comparison) -> dict[str, Any]:
    """As they are in the file."""
    told: dict[str, Any] = json.loads(json.dumps(found.as_json(found.sheet()), allow_nan=False))
    return told


class Page(HTMLParser):
    """What a browser would see of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._is_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_style = tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._is_style else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_each_picture_is_measured_against_the_baseline_of_its_seed() -> None:
    found = comparison([made(100), made(50), made(110), made(50)], seeds=2)
    first, second = found.of_variant(1)
    assert first.similarity is not None
    assert second.similarity is not None
    assert (first.similarity.mse, second.similarity.mse, second.similarity.is_identical) == (100, 0, True)
    told = numbers(found)
    assert [one.get("is_baseline", False) for one in told["pictures"]] == [True, True, False, False]
    assert told["pictures"][3]["psnr_db"] == "Infinity"
    average = told["variants"][1]["average"]
    assert (average["mse"], average["psnr_db"]) == (50, "Infinity")
    assert told["variants"][0]["average"] is None


def test_failures_and_other_sizes_are_said_and_not_measured() -> None:
    found = comparison([made(9), NotFoundError("no LoRA night"), made(9, (96, 64)), made(9)])
    told = numbers(found)
    assert told["failed"] == 1
    assert told["pictures"][1] == {
        "variant": 2,
        "seed": 0,
        "file": None,
        "error": {"code": "not_found", "message": "no LoRA night"},
    }
    assert told["pictures"][2]["not_measured"] == "96x64 is not the baseline's size, 64x64"
    assert told["pictures"][3]["mse"] == 0
    page = Page(report_html(found, {}))
    assert "no LoRA night" in page.text
    assert "Not measured: 96x64 is not the baseline's size, 64x64." in page.text
    assert "1 of 4 pictures failed." in page.text
    assert len(page.all("img")) == 3


def test_where_the_baseline_failed_nothing_is_measured() -> None:
    told = numbers(comparison([NotFoundError("gone"), made(9)]))
    assert told["pictures"][1]["not_measured"] == "the baseline failed"


def test_the_page_is_whole_without_a_network_and_escapes_what_was_said() -> None:
    html = report_html(comparison([made(1), made(2)], prompt=NASTY), {"negative_prompt": NASTY})
    page = Page(html)
    assert page.all("script") == page.all("link") == []
    assert "49" not in page.text
    assert page.text.count(NASTY) == 2
    assert not re.search(r"https?://|url\(|@import", html)
    sources = [one["src"] or "" for one in page.all("img")]
    for source, level in zip(sources, (1, 2), strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.getpixel((0, 0)) == (level,) * 3


def test_large_pictures_are_shrunk_in_the_page_alone() -> None:
    found = comparison([made(1, (1024, 512)), made(200, (1024, 512))])
    sources = [one["src"] or "" for one in Page(report_html(found, {})).all("img")]
    assert all(one.startswith("data:image/webp;base64,") for one in sources)
    with PIL.Image.open(io.BytesIO(base64.b64decode(sources[1].partition(",")[2]))) as picture:
        assert picture.size == (LARGEST_SIDE, LARGEST_SIDE // 2)
    assert numbers(found)["pictures"][0]["width"] == 1024


@pytest.mark.parametrize(
    ("prompts", "samplers", "shape"), [(1, 3, (2, 3)), (2, 2, (4, 2)), (3, 1, (2, 3)), (1, 12, (12, 2))]
)
def test_every_picture_is_at_its_place_of_the_sheet(prompts: int, samplers: int, shape: tuple[int, int]) -> None:
    plan = Plan.of({"prompt": [f"p{n}" for n in range(prompts)], "sampler": [f"s{n}" for n in range(samplers)]}, [3, 4])
    count = prompts * samplers * 2
    found = compared(plan, [made(9 * place) for place in range(count)], [""] * count)
    sheet = found.sheet()
    assert (len(sheet.boxes), len(sheet.boxes[0])) == shape
    for place, told in enumerate(found.as_json(sheet)["pictures"]):
        assert sheet.image.crop(told["sheet_box"]).getcolors() == [(192 * 192, (9 * place,) * 3)]
