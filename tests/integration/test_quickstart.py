"""The quickstart notebook is run as people run it: by a Jupyter kernel, cell by cell, on the real server."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import PIL.Image
import pytest
from nbclient import NotebookClient

from shapes_recipe.oracle import judge
from shapes_recipe.world import Scene

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def written() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs(written: Any) -> None:
    nbformat.validate(written)
    for cell in written.cells:
        assert cell.cell_type != "code" or (cell.outputs, cell.execution_count) == ([], None)


def test_every_cell_does_what_it_says(server: Any, written: Any, tmp_path: Path) -> None:
    for cell in written.cells:
        cell.source = cell.source.replace("localhost:8001", server.grpc_url)
    ran = NotebookClient(written, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [one for cell in ran.cells if cell.cell_type == "code" for one in cell.outputs]
    assert [one for one in outputs if one.get("name") == "stderr"] == []

    told = "".join(one.text for one in outputs if one.output_type == "stream")
    assert told.startswith("shapes resident ")
    assert [told.count(f"step {step} of 20") for step in (5, 10, 15)] == [1, 2, 1]
    assert "accepted; expected in " in told
    assert "[invalid_argument] width is 100" in told

    shown = [one.data for one in outputs if "data" in one]
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(one["image/png"]))) for one in shown if "image/png" in one]
    widths = [one.width for one in pictures]
    # Previews are made where the server has the time: of two that are asked for, one at least.
    assert widths in ([256, *[128] * previews, 128, 512] for previews in (1, 2)), widths
    assert judge(pictures[0].resize((64, 64))).matches(Scene("large", "red", "circle", "blue"))
    for index, colour in enumerate(("red", "green", "blue", "yellow")):
        one = pictures[-1].crop((128 * index, 0, 128 * (index + 1), 128)).resize((64, 64))
        assert judge(one).matches(Scene("large", colour, "circle", "black"))
    assert "True" in [one.get("text/plain") for one in shown], "the picture of the file was not made again"
    assert (tmp_path / "circle.png").is_file()
