"""Measure how often the shapes checkpoint draws what its captions say, with plain diffusers and the oracle.

    PYTHONPATH=checkpoints python -m shapes_recipe.evaluate checkpoints/shapes
    PYTHONPATH=checkpoints python -m shapes_recipe.evaluate checkpoints/shapes --work build/training

The second form takes the averaged weights of an unfinished run, and from the folder its tokenizer only.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from transformers import CLIPTokenizer

from shapes_recipe.oracle import Verdict, judge
from shapes_recipe.train import GUIDANCE_SCALE
from shapes_recipe.world import Scene, held_out_scenes, trained_scenes

__all__ = ["ATTRIBUTES", "Judged", "Result", "choose", "evaluate", "load", "load_unfinished", "sheet"]

ATTRIBUTES: Final = ("size", "colour", "shape", "background")
BATCH: Final = 20
DEFAULT_SEED: Final = 20261122


@dataclass(frozen=True, slots=True)
class Judged:
    """One picture, what it should show, and what the oracle sees in it."""

    scene: Scene
    picture: npt.NDArray[np.uint8]
    verdict: Verdict

    @property
    def right(self) -> bool:
        return self.verdict.matches(self.scene)

    def right_in(self, attribute: str) -> bool:
        """Whether one attribute is right; a refused picture is wrong in all of them."""
        seen = self.verdict.seen
        return seen is not None and bool(getattr(seen, attribute) == getattr(self.scene, attribute))


@dataclass(frozen=True, slots=True)
class Result:
    """The judged pictures of one evaluation."""

    judged: tuple[Judged, ...]

    @property
    def accuracy(self) -> float:
        return sum(one.right for one in self.judged) / len(self.judged)

    @property
    def refused(self) -> float:
        return sum(one.verdict.seen is None for one in self.judged) / len(self.judged)

    def accuracy_of(self, attribute: str) -> float:
        return sum(one.right_in(attribute) for one in self.judged) / len(self.judged)

    def summary(self) -> dict[str, float]:
        """Rates by name, in the order of the table."""
        rates = {attribute: self.accuracy_of(attribute) for attribute in ATTRIBUTES}
        return {"all four": self.accuracy, **rates, "refused": self.refused}

    def refusals(self) -> Counter[str]:
        """How often each kind of refusal occurred; the kind is the reason up to its colon."""
        return Counter(one.verdict.reason.split(":")[0] for one in self.judged if one.verdict.seen is None)


def choose(scenes: Sequence[Scene], count: int, seed: int) -> list[Scene]:
    """A seeded choice in which no scene occurs twice before every scene has occurred once."""
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(scenes)) for _ in range(math.ceil(count / len(scenes)))]
    return [scenes[int(index)] for index in np.concatenate(rounds)[:count]]


def evaluate(pipeline: Any, scenes: Sequence[Scene], steps: int, size: int, guidance: float, seed: int) -> Result:
    """Draw one picture for each scene, the i-th from noise of `seed + i`, and judge it."""
    pipeline.set_progress_bar_config(disable=True)
    judged: list[Judged] = []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        drawn = pipeline(
            prompt=[scene.caption for scene in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=size,
            height=size,
            generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(batch))],
            output_type="np",
        ).images
        pictures = np.rint(np.asarray(drawn) * 255).astype(np.uint8)
        judged += [Judged(scene, one, judge(one)) for scene, one in zip(batch, pictures, strict=True)]
    return Result(tuple(judged))


def load(folder: Path) -> Any:
    """The published fp16 weights, computed in float32."""
    return StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )


def load_unfinished(work: Path, folder: Path) -> Any:
    """The averaged weights of a run that may still go on, assembled (and rounded to fp16) as the run will do it."""
    from shapes_recipe import train

    vae, model = train.make_vae(), train.TextAndUNet()
    for module, name in ((vae, "vae.pt"), (model, "unet.pt")):
        path = work / name
        if not path.exists():
            raise SystemExit(f"{path} does not exist: the run in {work} has not reached that stage yet")
        module.load_state_dict(torch.load(path, weights_only=True)["ema"])
    with torch.no_grad():
        sample = torch.cat([train.vae_batch(step) for step in (0, 1, 2, 3, 4, 6, 7, 8)])
        vae.register_to_config(scaling_factor=round(1 / vae.encode(sample).latent_dist.mode().std().item(), 4))
    with tempfile.TemporaryDirectory() as assembled:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        train.assemble(vae, model, tokenizer, Path(assembled))
        return load(Path(assembled))


def sheet(judged: Sequence[Judged], columns: int = 8) -> Image.Image:
    """All pictures with their captions, right ones in green; under a wrong one, what is seen instead."""
    cell, margin, text = 150, 6, 46
    rows = math.ceil(len(judged) / columns)
    image = Image.new("RGB", (columns * cell, rows * (cell - 2 * margin + text + margin)), (40, 40, 40))
    draw = ImageDraw.Draw(image)
    for index, one in enumerate(judged):
        left, top = index % columns * cell + margin, index // columns * (cell - 2 * margin + text + margin) + margin
        picture = Image.fromarray(one.picture).resize((cell - 2 * margin,) * 2, Image.Resampling.NEAREST)
        image.paste(picture, (left, top))
        lines = [f"{one.scene.size} {one.scene.colour} {one.scene.shape}", f"on {one.scene.background}"]
        if not one.right:
            lines.append(_brief(one.verdict))
        colour = (120, 220, 120) if one.right else (255, 120, 110)
        draw.multiline_text((left, top + picture.height + 1), "\n".join(lines), fill=colour, font_size=10, spacing=2)
    return image


def _brief(verdict: Verdict) -> str:
    seen = verdict.seen
    text = verdict.reason if seen is None else f"{seen.size} {seen.colour} {seen.shape} on {seen.background}"
    return text if len(text) <= 30 else text[:29] + "…"


def _table(results: dict[str, Result], title: str) -> Table:
    table = Table("scenes", "pictures", "all four", *ATTRIBUTES, "refused", title=title)
    for name, result in results.items():
        rates = [f"{rate:.1%}" for rate in result.summary().values()]
        table.add_row(name, str(len(result.judged)), *rates)
    return table


def _as_json(results: dict[str, Result], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        **settings,
        "results": {name: {"pictures": len(one.judged), **one.summary()} for name, one in results.items()},
        "refusals": {name: dict(one.refusals()) for name, one in results.items()},
        "wrong": {
            name: [
                {"caption": each.scene.caption, "seen": each.verdict.seen and each.verdict.seen.caption}
                | {"reason": each.verdict.reason}
                for each in one.judged
                if not each.right
            ]
            for name, one in results.items()
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a diffusers folder, such as checkpoints/shapes")
    parser.add_argument("--work", type=Path, help="evaluate the unfinished run in this folder, such as build/training")
    parser.add_argument("--pictures", type=int, default=200, help="pictures for trained, and for held-out, scenes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, choices=(64, 96), default=64)
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--sheet", type=Path, help="write all pictures with their verdicts as one PNG")
    parser.add_argument("--json", type=Path, help="write the rates, and every wrong picture's caption, as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.pictures < 1:
        raise SystemExit(f"--pictures {arguments.pictures}: at least 1 is needed")
    folder, work = arguments.folder, arguments.work
    pipeline = load_unfinished(work, folder) if work else load(folder)
    settings = {name: getattr(arguments, name) for name in ("steps", "size", "guidance", "seed")}
    results = {
        name: evaluate(pipeline, choose(scenes, arguments.pictures, arguments.seed), **settings)
        for name, scenes in (("trained", trained_scenes()), ("held-out", held_out_scenes()))
    }

    console = Console()
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    console.print(_table(results, title))
    for name, result in results.items():
        for reason, count in result.refusals().most_common(3):
            console.print(f"{name}: {count} x {reason}")
    if arguments.sheet:
        sheet([one for result in results.values() for one in result.judged]).save(arguments.sheet)
    if arguments.json:
        arguments.json.write_text(json.dumps(_as_json(results, settings), indent=2) + "\n")


if __name__ == "__main__":
    main()
