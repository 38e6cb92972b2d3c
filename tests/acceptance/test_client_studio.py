"""`compare`'s page in a browser, and LoRAs and a ControlNet through the commands. WRITE_DOCS=1 makes docs' pictures."""

from __future__ import annotations

import html
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.random import default_rng
from typer.testing import CliRunner, Result

from conftest import ROOT
from diffuserve.manifest import Deployment
from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client._command import app
from integration.families import Families, exported_families
from integration.test_studio import pixels, seen
from shapes_recipe.control import agreement, posed, silhouette
from shapes_recipe.world import Scene, by_night
from unit.pictures import encoded

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WIDTHS = (500, 1200)
DOCS_BYTES = 300_000
SCENES = (Scene("large", "red", "circle", "blue"), Scene("small", "white", "diamond", "purple"))
#: What is run in a copy of the page. Text is measured against the nearest background that is not transparent.
PROBE = """
<script>addEventListener("load", () => {
  const rgba = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = rgba(getComputedStyle(one).backgroundColor);
      if (colour.length == 3 || colour[3] == 1) return colour;
    }
  };
  const contrasts = [...document.querySelectorAll("main *")]
    .filter(one => [...one.childNodes].some(node => node.nodeType == 3 && node.data.trim()))
    .map(one => {
      const [a, b] = [light(rgba(getComputedStyle(one).color)), light(behind(one))].sort((a, b) => b - a);
      return {text: one.textContent.trim().slice(0, 40), contrast: (a + .05) / (b + .05)};
    });
  document.body.dataset.found = JSON.stringify({
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight,
    isDark: matchMedia("(prefers-color-scheme: dark)").matches,
    requests: performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:")).length,
    pictures: [...document.images].map(one => ({
      naturalWidth: one.naturalWidth,
      box: (b => [b.left, b.top + scrollY, b.right, b.bottom + scrollY])(one.getBoundingClientRect()),
    })),
    contrasts,
  });
});</script>
"""


@dataclass(frozen=True)
class Browser:
    """Chromium without a window, a profile of its own for each page."""

    folder: Path

    def _run(self, page: Path, width: int, height: int, *flags: str, is_dark: bool) -> str:
        profile = self.folder / "profile"
        dark = ["--blink-settings=preferredColorScheme=0"] if is_dark else ["--blink-settings=preferredColorScheme=1"]
        command = [str(CHROMIUM), *FLAGS, *dark, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        done = subprocess.run(
            [*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        shutil.rmtree(profile)
        return done.stdout

    def found(self, page: Path, width: int, *, is_dark: bool = False) -> dict[str, Any]:
        """What the probe tells of a page. Its policy, which allows no script, is taken out of the copy."""
        text, count = re.subn(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page.read_text())
        assert count == 1
        copy = self.folder / "probed.html"
        copy.write_text(text.replace("</body>", f"{PROBE}</body>"))
        dom = self._run(copy, width, 900, "--dump-dom", is_dark=is_dark)
        match = re.search(r'data-found="([^"]*)"', dom)
        assert match, dom[-2000:]
        told: dict[str, Any] = json.loads(html.unescape(match[1]))
        return told

    def screenshot(self, page: Path, width: int, height: int, *, is_dark: bool = False) -> PIL.Image.Image:
        """Of the page as it is."""
        file = self.folder / "page.png"
        self._run(page, width, height, f"--screenshot={file}", is_dark=is_dark)
        return PIL.Image.open(io.BytesIO(file.read_bytes())).convert("RGB")


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: install it (Debian: apt-get install chromium)")
    folder = tmp_path / "browser"
    folder.mkdir()
    return Browser(folder)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")


@pytest.fixture(scope="module")
def lora_url(lora_deployment: Deployment, loras: Path) -> Iterator[str]:
    options = ServerOptions(deployment=lora_deployment.root, loras=loras, http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(options) as server:
        server.wait_ready()
        yield server.grpc_url


def run(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--url", url])


def compare_loras(url: str, folder: str, *loras: str) -> Result:
    prompts = [word for scene in SCENES for word in ("--prompt", scene.caption)]
    values = [word for lora in ("none", *loras) for word in ("--lora", lora)]
    samplers = ("--sampler", "ddim", "--sampler", "dpmpp_2m")
    return run(url, "compare", *prompts, *samplers, *values, "--steps", "20", "--seed", "2", "-o", folder, "--json")


@pytest.fixture(scope="module")
def compared(lora_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison of two prompts, samplers and LoRAs, and what the command told of it."""
    folder = tmp_path_factory.mktemp("compared") / "compare"
    result = compare_loras(lora_url, str(folder), "night")
    assert (result.exit_code, result.stderr) == (0, "")
    return folder, json.loads(result.stdout)


def expected(variant: dict[str, Any]) -> Scene | None:
    scene = Scene.from_caption(variant["prompt"])
    return by_night(scene) if variant["lora"] == "night" else scene


def test_each_variant_is_what_it_says(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, told = compared
    assert len(told["pictures"]) == 8
    with PIL.Image.open(folder / "contact-sheet.png") as sheet:
        for one in told["pictures"]:
            scene = expected(told["variants"][one["variant"] - 1])
            assert seen(pixels(folder / one["file"])) == seen(sheet.crop(one["sheet_box"])) == scene


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_in_a_browser(
    browser: Browser, compared: tuple[Path, dict[str, Any]], width: int, is_dark: bool
) -> None:
    """Every picture is there and right, nothing is wider than the window, all text can be read."""
    folder, told = compared
    page = folder / "report.html"
    found = browser.found(page, width, is_dark=is_dark)
    assert (found["width"], found["isDark"], found["overflow"], found["requests"]) == (width, is_dark, 0, 0)
    assert [one["naturalWidth"] for one in found["pictures"]] == [64] * 8
    faint = [one for one in found["contrasts"] if one["contrast"] < 4.5]  # WCAG 2's level AA
    assert len(found["contrasts"]) > 50
    assert faint == []
    shot = browser.screenshot(page, width, found["height"], is_dark=is_dark)
    for one, picture in zip(told["pictures"], found["pictures"], strict=True):
        left, top, right, bottom = (round(side) for side in picture["box"])
        crop = shot.crop((left + 8, top + 8, right - 8, bottom - 8))  # corners are round
        assert seen(crop) == expected(told["variants"][one["variant"] - 1])


def test_a_lora_that_is_not_there_fails_in_its_cell(lora_url: str, browser: Browser, tmp_path: Path) -> None:
    result = compare_loras(lora_url, "failed", "absent", "night:0.5+bar:0.5")
    assert result.exit_code == 2
    assert "4 of 12 pictures failed; the first, of variant 2 and seed 2:" in result.stderr
    told = json.loads(result.stdout)
    assert [one["variant"] for one in told["pictures"] if "error" in one] == [2, 5, 8, 11]
    found = browser.found(tmp_path / "failed/report.html", 1200)
    assert [one["naturalWidth"] for one in found["pictures"]] == [64] * 8
    assert found["overflow"] == 0


def test_angles_by_a_controlnet(deployment: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The silhouette says where the shape is, each view its colour."""
    families, out = Families(tmp_path_factory.mktemp("controlled")), ROOT / "build" / "deployments" / "control"
    exported = exported_families(families, ["sd15-control"], out, deployment)
    shape = posed(default_rng(3))
    (tmp_path / "in.png").write_bytes(encoded(silhouette(shape)))
    colours = [colour for colour in ("red", "green", "yellow", "white") if colour != shape.scene.background]
    prompt = replace(shape.scene, colour="{view}").caption
    views = [word for colour in colours for word in ("--view", colour)]
    options = ServerOptions(deployment=exported.root, http_port=0, grpc_port=0, metrics_port=0)
    with TritonServer(options) as server:
        server.wait_ready()
        result = run(
            server.grpc_url,
            "angles",
            "in.png",
            "--method",
            "control",
            "--prompt",
            prompt,
            *views,
            "--steps",
            "20",
            "--json",
        )
    assert (result.exit_code, result.stderr) == (0, "")
    for one, colour in zip(json.loads(result.stdout)["views"], colours, strict=True):
        picture = PIL.Image.fromarray(pixels(Path(one["path"])))
        assert agreement(picture, shape, replace(shape.scene, colour=colour)) > 0.7, colour


@pytest.mark.skipif(not os.environ.get("WRITE_DOCS"), reason="WRITE_DOCS=1 makes docs' pictures anew")
def test_write_docs(browser: Browser, compared: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = compared
    page = folder / "report.html"
    shot = browser.screenshot(page, 1200, browser.found(page, 1200)["height"])
    with PIL.Image.open(folder / "contact-sheet.png") as sheet:
        for picture, name in ((shot, "compare.png"), (sheet.convert("RGB"), "compare-sheet.png")):
            file = ROOT / "docs" / name
            picture.quantize(256, dither=PIL.Image.Dither.NONE).save(file, optimize=True)
            assert file.stat().st_size < DOCS_BYTES
            assert np.asarray(picture).std() > 20
