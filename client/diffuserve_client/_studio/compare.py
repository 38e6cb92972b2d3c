"""`diffuserve compare`: A/B of prompts, checkpoints, samplers, LoRAs, steps and guidance, with the same seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import MAX_SEED
from diffuserve_client._exits import errors_as_exit_codes
from diffuserve_client._extras import require
from diffuserve_client._options import AsJson, ConnectionOptions, open_client, with_options
from diffuserve_client._studio.folder import Folder, encoded, filled_folder
from diffuserve_client._studio.options import Concurrency, Overwrite
from diffuserve_client._studio.variants import MAX_PICTURES, Plan

if TYPE_CHECKING:
    from diffuserve_client._studio.comparison import Comparison

__all__ = ["compare"]

SHEET: Final = "contact-sheet.png"
PAGE: Final = "report.html"
NUMBERS: Final = "report.json"


@with_options
def compare(
    connection: ConnectionOptions,
    prompt: Annotated[list[str], typer.Option(help="What the pictures should show. Each option: as often as needed.")],
    checkpoint: Annotated[list[str] | None, typer.Option(help="A deployed checkpoint.")] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="Such as euler, unipc, 'DPM++ 2M Karras'.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="One or several LoRAs at once, as in night:0.8+bar:0.5, or none.")
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[list[float] | None, typer.Option(help="How closely to follow the prompt.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The first seed, the same for all variants.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, max=MAX_PICTURES, help="How many seeds: SEED, SEED + 1 and so on.")] = 1,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="What is measured against: a variant's number, or as in sampler=ddim, once for each axis, the variant "
            "that differs in those alone.",
            show_default="the first of each prompt",
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the pictures should not show.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to fill.")] = Path("compare"),
    overwrite: Overwrite = False,
    concurrency: Concurrency = 16,
    as_json: AsJson = False,
) -> None:
    """Make every combination of the values at once, and measure each against a baseline of the same seed.

    The folder gets every picture, contact-sheet.png, report.html, which needs no other file, and report.json.
    """
    axes = {
        "prompt": prompt,
        "checkpoint": checkpoint,
        "sampler": sampler,
        "lora": lora,
        "steps": steps,
        "guidance_scale": guidance_scale,
    }
    given = {"negative_prompt": negative_prompt, "width": width, "height": height}
    common = {name: value for name, value in given.items() if value is not None}
    from diffuserve_client._studio.comparison import compared

    with errors_as_exit_codes():
        plan = Plan.of({name: values or () for name, values in axes.items()}, _seeds(seed, seeds), baseline or ())
        requests = [one.request(number, common) for one in plan.variants for number in plan.seeds]
        require("tools", "jinja2", "skimage.metrics")  # now, rather than after the pictures were made
        files = _file_names(plan)
        with filled_folder(output, overwrite=overwrite) as folder:
            with open_client(connection) as client:
                batch = folder.fill(client, requests, files, concurrency=concurrency, what="pictures")
            comparison = compared(plan, batch.outcomes, files)
            told = _written(folder, comparison, common)
        typer.echo(json.dumps(told, ensure_ascii=False) if as_json else _as_text(folder, comparison))
        batch.exit_unless_whole([f"of variant {one.variant + 1} and seed {one.seed}" for one in comparison.pictures])


def _seeds(first: int, count: int) -> range:
    if first + count - 1 > MAX_SEED:
        raise InvalidArgumentError(
            f"seed is {first} and seeds {count}: the last seed must not exceed {MAX_SEED}; use a smaller seed",
            input="seed",
        )
    return range(first, first + count)


def _file_names(plan: Plan) -> list[str]:
    """All seeds of the first variant, then of the next."""
    digits = max(2, len(str(len(plan.variants))))
    numbers = range(1, len(plan.variants) + 1)
    return [f"{number:0{digits}}-seed-{seed}.png" for number in numbers for seed in plan.seeds]


def _written(folder: Folder, comparison: Comparison, common: dict[str, Any]) -> dict[str, Any]:
    """Write the sheet, the page and the numbers. Returns what --json tells."""
    from diffuserve_client._studio.report import report_html

    sheet = comparison.sheet()
    numbers = comparison.as_json(sheet)
    paths = {
        "contact_sheet": folder.write(SHEET, encoded(sheet.image, "png")),
        "report": folder.write(PAGE, report_html(comparison, common).encode()),
        "numbers": folder.write_json(NUMBERS, numbers),
    }
    return {"folder": str(folder.path), **{name: str(path) for name, path in paths.items()}, **numbers}


def _as_text(folder: Folder, comparison: Comparison) -> str:
    from diffuserve_client._studio.comparison import axis_text

    plan = comparison.plan
    lines = []
    for place, variant in enumerate(plan.variants):
        said = ", ".join(axis_text(name, getattr(variant, name)) for name in plan.varying)
        if plan.baselines[place] == place:
            found = "baseline"
        elif (average := comparison.average(place)) is not None:
            found = f"{average.as_text()}, MSE {average.mse:.1f}"
        else:
            found = "failed" if any(one.problem for one in comparison.of_variant(place)) else "not measured"
        lines.append(f"{place + 1}  {said}  {found}" if said else f"{place + 1}  {found}")
    return "\n".join([*lines, *(str(folder.path / name) for name in (SHEET, PAGE, NUMBERS))])
