"""`compare`, `storyboard` and `angles` on a real Triton: numbers computed again from the files, pictures judged."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from diffuserve_client import GenerateRequest
from diffuserve_client._command import app
from shapes_recipe.oracle import judge
from shapes_recipe.world import Scene
from unit.client.studio.wang import ssim_of_wang

RED_CIRCLE = Scene("large", "red", "circle", "blue")
WHITE_DIAMOND = Scene("small", "white", "diamond", "purple")
# The edges of these keep two colours where H.264 halves the resolution of colour, at 64 pixels.
STORY = [
    RED_CIRCLE,
    Scene("small", "green", "ring", "white"),
    WHITE_DIAMOND,
    Scene("large", "red", "square", "blue"),
]
DURATIONS = [0.5, 0.8, 0.3, 1.2]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")


def run(server: Any, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json", "--url", server.grpc_url])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def seen(picture: Any) -> Scene | None:
    return judge(np.asarray(PIL.Image.fromarray(np.asarray(picture)).convert("RGB"))).seen


def pixels(path: Path) -> Any:
    with PIL.Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_numbers_of_compare_are_those_of_its_files(server: Any, tmp_path: Path) -> None:
    prompts = ("--prompt", RED_CIRCLE.caption, "--prompt", WHITE_DIAMOND.caption)
    samplers = ("--sampler", "ddim", "--sampler", "euler_ancestral", "--sampler", "DDIM")
    told = run(server, "compare", *prompts, *samplers, "--steps", "8", "--seed", "7", "--seeds", "2")
    folder = tmp_path / "compare"
    assert told["failed"] == 0
    assert [one["baseline"] for one in told["variants"]] == [1, 1, 1, 4, 4, 4]
    files = {(one["variant"], one["seed"]): pixels(folder / one["file"]) for one in told["pictures"]}
    assert len(files) == 12
    for one in told["pictures"]:
        variant = told["variants"][one["variant"] - 1]
        ours = files[one["variant"], one["seed"]].astype(np.float64)
        theirs = files[variant["baseline"], one["seed"]].astype(np.float64)
        if one["variant"] == variant["baseline"]:
            assert one["is_baseline"]
            continue
        mse = float(((ours - theirs) ** 2).mean())
        assert one["mse"] == pytest.approx(mse)
        assert float(one["psnr_db"]) == pytest.approx(10 * math.log10(255**2 / mse) if mse else math.inf)
        assert one["ssim"] == pytest.approx(ssim_of_wang(ours, theirs), abs=1e-6)
        assert (mse == 0) == (variant["sampler"] == "DDIM"), "the same sampler by another name"
    with PIL.Image.open(folder / "contact-sheet.png") as sheet:
        for one in told["pictures"]:
            scene = Scene.from_caption(told["variants"][one["variant"] - 1]["prompt"])
            assert seen(sheet.crop(one["sheet_box"])) == scene, one
    again = GenerateRequest.from_image(folder / "05-seed-8.png")
    assert (again.prompt, again.seed, again.steps) == (WHITE_DIAMOND.caption, 8, 8)


@pytest.fixture
def story(tmp_path: Path) -> str:
    scenes = [{"prompt": one.caption, "duration": duration} for one, duration in zip(STORY, DURATIONS, strict=True)]
    (tmp_path / "story.yaml").write_text(json.dumps({"seed": 2, "steps": 20, "scenes": scenes}))  # JSON is YAML
    return "story.yaml"


def test_the_frames_of_a_gif_are_the_scenes(server: Any, story: str, tmp_path: Path) -> None:
    run(server, "storyboard", story, "-o", "film.gif")
    durations = []
    with PIL.Image.open(tmp_path / "film.gif") as gif:
        for place, scene in enumerate(STORY):
            gif.seek(place)
            durations.append(gif.info["duration"] / 1000)
            frame = np.asarray(gif.convert("RGB"))
            assert seen(frame) == scene
            original = pixels(tmp_path / f"film-frames/00{place + 1}.png")
            assert np.abs(frame.astype(int) - original).mean() < 3, "256 colours are few, and enough"
        assert gif.n_frames == len(STORY)  # type: ignore[attr-defined]
    assert durations == DURATIONS


def test_an_mp4_lasts_as_the_scenes_do(server: Any, story: str, tmp_path: Path) -> None:
    told = run(server, "storyboard", story, "-o", "film.mp4", "--fps", "20")
    frames = iio.imread(tmp_path / "film.mp4", plugin="pyav")
    counts = [round(20 * one) for one in DURATIONS]
    assert told["frames"] == len(frames) == sum(counts)
    expected = [scene for scene, count in zip(STORY, counts, strict=True) for _ in range(count)]
    assert [seen(one) for one in frames] == expected


def test_a_storyboards_sheet_and_its_chain(server: Any, tmp_path: Path) -> None:
    changed = Scene("large", "green", "circle", "blue")
    scenes = [RED_CIRCLE.caption, {"prompt": changed.caption, "init": "previous"}]
    (tmp_path / "chain.yaml").write_text(json.dumps({"seed": 7, "steps": 16, "strength": 0.8, "scenes": scenes}))
    told = run(server, "storyboard", "chain.yaml", "-o", "sheet.png")
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert [seen(sheet.crop(one["sheet_box"])) for one in told["scenes"]] == [RED_CIRCLE, changed]


def test_angles_are_in_their_order(server: Any, tmp_path: Path) -> None:
    colours = ("yellow", "green", "white", "red")
    run(server, "compare", "--prompt", RED_CIRCLE.caption, "--seed", "7", "-o", "reference")
    template = "a large {view} circle on a blue background"
    views = [word for colour in colours for word in ("--view", colour)]
    steps = ("--steps", "16", "--strength", "0.8", "--columns", "2")
    told = run(server, "angles", "reference/01-seed-7.png", "--prompt", template, *views, *steps)
    wanted = [RED_CIRCLE, *(Scene("large", colour, "circle", "blue") for colour in colours)]
    with PIL.Image.open(io.BytesIO(Path(told["contact_sheet"]).read_bytes())) as sheet:
        boxes = [told["reference"]["sheet_box"], *(one["sheet_box"] for one in told["views"])]
        assert [seen(sheet.crop(box)) for box in boxes] == wanted
    assert [box[:2] for box in boxes] == sorted((box[:2] for box in boxes), key=lambda corner: corner[::-1])
    assert [seen(pixels(Path(one["path"]))) for one in told["views"]] == wanted[1:]
