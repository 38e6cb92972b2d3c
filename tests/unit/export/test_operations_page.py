from __future__ import annotations

from pathlib import Path

import pytest
import typer

from diffuserve.metrics import METRICS
from diffuserve_export.operations_page import main, metrics_table, with_table

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"


def test_the_committed_page_is_current() -> None:
    main(PAGE, check=True)


def test_every_metric_has_a_row_of_five_cells() -> None:
    rows = metrics_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [metric.name for metric in METRICS]
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}


def test_queries_of_the_page_name_metrics_that_exist() -> None:
    words = set(PAGE.read_text(encoding="utf-8").replace("{", " ").replace("`", " ").replace("[", " ").split())
    words = {word.split("(")[-1] for word in words}
    names = {metric.name for metric in METRICS}
    histograms = {f"{one.name}{end}" for one in METRICS if one.bounds for end in ("_bucket", "_sum", "_count")}
    assert {word for word in words if word.startswith("diffuserve_")} - {"diffuserve_export.operations_page"} <= (
        names | histograms
    )


def test_a_changed_page_is_found_and_the_rest_of_it_kept(tmp_path: Path) -> None:
    path = tmp_path / "operations.md"
    path.write_text(PAGE.read_text(encoding="utf-8").replace("gauge", "counter") + "\nThe end.\n", encoding="utf-8")
    with pytest.raises(typer.Exit):
        main(path, check=True)
    main(path, check=False)
    assert path.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8") + "\nThe end.\n"


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the line"):
        with_table("# Operations\n")
