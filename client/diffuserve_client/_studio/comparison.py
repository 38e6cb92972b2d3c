"""What `compare` found: each picture with its similarity to the baseline's, as JSON and as a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from diffuserve import __version__
from diffuserve.errors import DiffuserveError
from diffuserve_client._studio.contact_sheet import Box, Cell, Sheet, contact_sheet
from diffuserve_client._studio.similarity import IncomparableError, Similarity, similarity_of
from diffuserve_client._studio.variants import Plan, Variant

if TYPE_CHECKING:
    import PIL.Image

    from diffuserve_client._results import GenerateResult

__all__ = ["AXIS_TITLES", "Comparison", "Picture", "axis_text", "compared"]

AXIS_TITLES: Final[Mapping[str, str]] = {
    "prompt": "Prompt",
    "checkpoint": "Checkpoint",
    "sampler": "Sampler",
    "lora": "LoRA",
    "steps": "Steps",
    "guidance_scale": "Guidance",
}
_WIDEST_SHEET: Final = 8  # columns; beyond, rows and columns change places where that makes it narrower


@dataclass(frozen=True)
class Picture:
    """One variant's picture of one seed, or the error; `variant` and `baseline` are places in the plan.

    Without a similarity, `not_measured` says why; it is empty where the picture is the baseline's own or failed.
    """

    variant: int
    baseline: int
    seed: int
    outcome: GenerateResult | DiffuserveError
    file: str
    similarity: Similarity | None = None
    not_measured: str = ""

    @property
    def is_baseline(self) -> bool:
        return self.variant == self.baseline

    @property
    def image(self) -> PIL.Image.Image | None:
        return None if isinstance(self.outcome, DiffuserveError) else self.outcome.image

    @property
    def problem(self) -> str:
        return self.outcome.message if isinstance(self.outcome, DiffuserveError) else ""


_Key = tuple[Any, ...]  # an axis's values, and of rows the seed


@dataclass(frozen=True)
class _Grid:
    """The pictures as they are on the sheet."""

    row_labels: list[str]
    column_labels: list[str]
    cells: list[list[Picture]]


@dataclass(frozen=True)
class Comparison:
    """Every picture: all seeds of the first variant, then of the next."""

    plan: Plan
    pictures: tuple[Picture, ...]

    def of_variant(self, place: int) -> tuple[Picture, ...]:
        return tuple(one for one in self.pictures if one.variant == place)

    def average(self, place: int) -> Similarity | None:
        """The mean of each number over a variant's seeds; None where one of them was not measured."""
        found = [one.similarity for one in self.of_variant(place)]
        known = [one for one in found if one is not None]
        if not known or len(known) < len(found):
            return None
        return Similarity(*(fmean(getattr(one, name) for one in known) for name in ("mse", "psnr_db", "ssim")))

    def sheet(self) -> Sheet:
        """Rows of prompts and seeds, columns of everything else; each picture with what was measured."""
        grid = self._grid()
        cells = [[self._cell(one) for one in row] for row in grid.cells]
        return contact_sheet(cells, row_labels=grid.row_labels, column_labels=grid.column_labels)

    def as_json(self, sheet: Sheet) -> dict[str, Any]:
        """The content of report.json. PSNR is the text Infinity where pictures are identical."""
        plan = self.plan
        boxes = self._boxes(sheet)
        return {
            "diffuserve": __version__,
            "seeds": list(plan.seeds),
            "axes": {name: list(values) for name, values in plan.axes.items() if values != (None,)},
            "variants": [
                {
                    "number": place + 1,
                    "baseline": plan.baselines[place] + 1,
                    **{name: getattr(variant, name) for name in AXIS_TITLES},
                    "average": None if (average := self.average(place)) is None else average.as_json(),
                }
                for place, variant in enumerate(plan.variants)
            ],
            "pictures": [_picture_json(one, boxes.get((one.variant, one.seed))) for one in self.pictures],
            "failed": sum(1 for one in self.pictures if one.problem),
        }

    def _grid(self) -> _Grid:
        varying = self.plan.varying
        column_axes = tuple(name for name in varying if name != "prompt") or varying
        row_axes = tuple(name for name in varying if name not in column_axes)
        places: dict[tuple[_Key, _Key], Picture] = {}
        rows: dict[_Key, str] = {}
        columns: dict[_Key, str] = {}
        for one in self.pictures:
            variant = self.plan.variants[one.variant]
            row = (*(getattr(variant, name) for name in row_axes), one.seed)
            column = tuple(getattr(variant, name) for name in column_axes)
            rows[row] = "\n".join([*_texts(variant, row_axes), f"seed {one.seed}"])
            columns[column] = "\n".join(_texts(variant, column_axes))
            places[row, column] = one
        cells = [[places[row, column] for column in columns] for row in rows]
        if len(columns) > max(_WIDEST_SHEET, len(rows)):
            return _Grid(list(columns.values()), list(rows.values()), [list(one) for one in zip(*cells, strict=True)])
        return _Grid(list(rows.values()), list(columns.values()), cells)

    def _cell(self, one: Picture) -> Cell:
        number = one.variant + 1
        if one.is_baseline:
            said = "baseline"
        elif one.similarity is not None:
            said = one.similarity.as_text()
        else:
            said = f"not measured: {one.not_measured}" if one.not_measured else ""
        return Cell(one.image, f"{number} · {said}" if said else str(number), f"Failed: {one.problem}")

    def _boxes(self, sheet: Sheet) -> dict[tuple[int, int], Box]:
        return {
            (one.variant, one.seed): box
            for row, boxes in zip(self._grid().cells, sheet.boxes, strict=True)
            for one, box in zip(row, boxes, strict=True)
            if box is not None
        }


def compared(plan: Plan, outcomes: Sequence[GenerateResult | DiffuserveError], files: Sequence[str]) -> Comparison:
    """Measure what came of the plan: `outcomes` and `files` hold all seeds of the first variant, then of the next."""
    seeds = len(plan.seeds)
    pictures = []
    for place, (outcome, file) in enumerate(zip(outcomes, files, strict=True)):
        variant, seed = divmod(place, seeds)
        baseline = plan.baselines[variant]
        similarity, why = _measured(outcome, outcomes[baseline * seeds + seed]) if baseline != variant else (None, "")
        pictures.append(Picture(variant, baseline, plan.seeds[seed], outcome, file, similarity, why))
    return Comparison(plan, tuple(pictures))


def axis_text(name: str, value: Any) -> str:
    """A value of an axis as people read it, beside values of other axes."""
    if value is None:
        return "default"
    if name == "prompt":
        return value or "(an empty prompt)"
    if name == "steps":
        return f"{value} steps"
    if name == "guidance_scale":
        return f"guidance {value}"
    return "no LoRA" if name == "lora" and value == "none" else str(value)


def _texts(variant: Variant, axes: Sequence[str]) -> list[str]:
    return [axis_text(name, getattr(variant, name)) for name in axes]


def _measured(
    outcome: GenerateResult | DiffuserveError, baseline: GenerateResult | DiffuserveError
) -> tuple[Similarity | None, str]:
    if isinstance(outcome, DiffuserveError):
        return None, ""
    if isinstance(baseline, DiffuserveError):
        return None, "the baseline failed"
    try:
        return similarity_of(outcome.image, baseline.image), ""
    except IncomparableError as error:
        return None, str(error)


def _picture_json(one: Picture, box: Box | None) -> dict[str, Any]:
    told: dict[str, Any] = {"variant": one.variant + 1, "seed": one.seed}
    if isinstance(one.outcome, DiffuserveError):
        return told | {"file": None, "error": {"code": one.outcome.code, "message": one.outcome.message}}
    width, height = one.outcome.image.size
    told |= {"file": one.file, "width": width, "height": height, "sheet_box": box}
    if one.similarity is not None:
        return told | one.similarity.as_json()
    return told | ({"is_baseline": True} if one.is_baseline else {"not_measured": one.not_measured})
