"""`compare`'s page: one file of HTML with the pictures in it, which loads nothing and runs nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from diffuserve import __version__
from diffuserve.errors import DiffuserveError
from diffuserve_client._extras import extra
from diffuserve_client._studio.comparison import AXIS_TITLES, Comparison, Picture, axis_text
from diffuserve_client._studio.folder import encoded

if TYPE_CHECKING:
    from diffuserve_client._results import GenerateResult
    from diffuserve_client._studio.similarity import Similarity

__all__ = ["report_html"]

_TEMPLATE: Final = Path(__file__).with_name("report.html.j2")
#: Pictures with a longer side are shrunk to it in the page, and encoded anew; smaller ones are there as they came.
LARGEST_SIDE: Final = 768
_SMALL: Final = 160  # shown larger than they are, so that their pixels should stay what they are
_FEW: Final = 4  # pictures side by side that are shown larger
_PLURALS: Final = {
    "prompt": "prompts",
    "checkpoint": "checkpoints",
    "sampler": "samplers",
    "lora": "LoRAs",
    "steps": "numbers of steps",
    "guidance_scale": "guidance scales",
}


def report_html(comparison: Comparison, common: Mapping[str, Any]) -> str:
    """The page. `common` is what all requests share beside the axes. Raises UnsupportedError without jinja2."""
    with extra("tools"):
        import jinja2

    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        version=__version__,
        title=_title(comparison),
        subtitle=_subtitle(comparison),
        facts=_facts(comparison, common),
        failed=_failed(comparison),
        axes=[AXIS_TITLES[name] for name in comparison.plan.varying],
        averages_text=_averages_text(comparison),
        variants=[_variant(comparison, place) for place in range(len(comparison.plan.variants))],
        sections=_sections(comparison),
    )


def _title(comparison: Comparison) -> str:
    plan = comparison.plan
    terms = [f"{len(plan.axes[name])} {_PLURALS[name]}" for name in plan.varying]
    return f"{' × '.join(terms) or 'One variant'} compared"


def _subtitle(comparison: Comparison) -> str:
    seeds = comparison.plan.seeds
    count = len(comparison.pictures)
    said = (
        f"seeds {seeds[0]} {'and' if len(seeds) == 2 else 'to'} {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    return f"{count} picture{'s' if count > 1 else ''}, {said}"


def _facts(comparison: Comparison, common: Mapping[str, Any]) -> list[tuple[str, Any]]:
    axes = comparison.plan.axes
    single = [(AXIS_TITLES[name], axes[name][0]) for name in axes if name != "prompt" and len(axes[name]) == 1]
    shared = [(name.replace("_", " ").capitalize(), value) for name, value in common.items()]
    return [(name, value) for name, value in (*single, *shared) if value is not None]


def _failed(comparison: Comparison) -> str:
    count = sum(1 for one in comparison.pictures if one.problem)
    return f"{count} of {len(comparison.pictures)} pictures failed." if count else ""


def _averages_text(comparison: Comparison) -> str:
    count = len(comparison.plan.seeds)
    return "How close each comes to its baseline" + (f", on average over {count} seeds." if count > 1 else ".")


def _numbers(similarity: Similarity | None) -> dict[str, Any] | None:
    if similarity is None:
        return None
    return {
        "ssim": f"{similarity.ssim:.4f}",
        "psnr": similarity.psnr_text,
        "mse": f"{similarity.mse:.1f}",
        "share": f"{100 * max(0.0, similarity.ssim):.1f}",
        "is_identical": similarity.is_identical,
    }


def _variant(comparison: Comparison, place: int) -> dict[str, Any]:
    plan = comparison.plan
    pictures = comparison.of_variant(place)
    failed = sum(1 for one in pictures if one.problem)
    return {
        "number": place + 1,
        "against": plan.baselines[place] + 1,
        "is_baseline": plan.baselines[place] == place,
        "failed": f"{failed} of {len(pictures)} failed" if failed else "",
        "texts": [axis_text(name, getattr(plan.variants[place], name)) for name in plan.varying],
        "similarity": _numbers(comparison.average(place)),
    }


def _sections(comparison: Comparison) -> list[dict[str, Any]]:
    """One for each prompt, seed by seed; where prompts alone are compared, one for all of them."""
    plan = comparison.plan
    axes = tuple(name for name in plan.varying if name != "prompt")
    if plan.varying == ("prompt",):
        return [_section(comparison, "Pictures", comparison.pictures, plan.varying)]
    sections = []
    for prompt in plan.axes["prompt"]:
        those = [one for one in comparison.pictures if plan.variants[one.variant].prompt == prompt]
        sections.append(_section(comparison, axis_text("prompt", prompt), those, axes))
    return sections


def _section(comparison: Comparison, title: str, pictures: Sequence[Picture], axes: Sequence[str]) -> dict[str, Any]:
    seeds = comparison.plan.seeds
    groups = [
        {"seed": seed, "cells": [_cell(comparison, one, axes) for one in pictures if one.seed == seed]}
        for seed in seeds
    ]
    return {"title": title, "groups": groups, "is_few": len(pictures) <= _FEW * len(seeds)}


def _cell(comparison: Comparison, one: Picture, axes: Sequence[str]) -> dict[str, Any]:
    plan = comparison.plan
    cell = {
        "number": one.variant + 1,
        "against": one.baseline + 1,
        "label": ", ".join(axis_text(name, getattr(plan.variants[one.variant], name)) for name in axes),
        "is_baseline": one.is_baseline,
        "similarity": _numbers(one.similarity),
        "not_measured": one.not_measured,
        "problem": one.problem,
        "data": None,
    }
    if not isinstance(one.outcome, DiffuserveError):
        width, height = one.outcome.image.size
        cell |= {"data": _data_uri(one.outcome), "width": width, "height": height, "is_small": width < _SMALL}
    return cell


def _data_uri(result: GenerateResult) -> str:
    image = result.images[0]
    kind, data = image.format, image.data
    if max(image.image.size) > LARGEST_SIDE:
        shrunk = image.image.convert("RGB")
        shrunk.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        kind, data = "webp", encoded(shrunk, "webp")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
