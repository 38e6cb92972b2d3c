"""What an export makes for previews and for large pictures: colours, a tiny autoencoder, the size of tiles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn
from torch.nn import functional

from diffuserve.manifest import Range
from diffuserve.spec import PREVIEW_DECODER, VAE_COMPONENTS, VAE_DECODER
from diffuserve_export import CheckpointError, ExportOptions, OptionError, assembly, export_checkpoint
from diffuserve_export.assembly import _ranges
from diffuserve_export.colours import colours_of, patchwork
from diffuserve_export.export import Plan, plan_export
from diffuserve_export.graphs import Graph, graph_from_component
from diffuserve_export.modules import VaeDecoder, module_of
from diffuserve_export.ports import size_range, vae_range
from diffuserve_export.sources import open_checkpoint
from unit.export.conftest import Exported, Recorder, float32_graph, without_logs
from unit.export.test_export import shapes_like


class LinearVae(nn.Module):
    """Latents are a picture's colours, averaged over 4 x 4 pixels and mixed; decoding undoes the mixing."""

    config = type("Config", (), {"scaling_factor": 0.5, "shift_factor": 0.25})
    mixed = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.8, -0.3], [0.4, 0.0, 1.2], [0.1, 0.1, 0.1]])

    def encode(self, pixels: torch.Tensor) -> Any:
        mean = torch.einsum("ck,nkhw->nchw", self.mixed, functional.avg_pool2d(pixels, 4))
        posterior = type("Posterior", (), {"mean": mean, "std": mean * 0})
        return type("Output", (), {"latent_dist": posterior})

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        colours = torch.einsum("kc,nchw->nkhw", torch.linalg.pinv(self.mixed), latents)
        return (functional.interpolate(colours, scale_factor=4.0),)


def test_colours_are_the_decoders_own() -> None:
    vae = LinearVae()
    colours = colours_of(VaeDecoder(vae), 4)
    latents = (vae.encode(patchwork(4, 64)).latent_dist.mean - 0.25) * 0.5
    expected = functional.avg_pool2d(vae.decode(latents / 0.5 + 0.25, return_dict=False)[0], 4)
    found = torch.einsum("kc,nchw->nkhw", torch.tensor(colours.weights), latents)
    found += torch.tensor(colours.bias)[:, None, None]
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_manifest_has_them(exported: Exported) -> None:
    colours = exported.manifest.colours
    assert np.shape(colours.weights) == (3, 4)
    assert np.isfinite(colours.weights).all()
    again = colours_of(module_of(open_checkpoint(exported.checkpoint), VAE_DECODER), 2)
    # Which threads take part in a sum changes its last digits.
    assert np.allclose(colours.weights, again.weights, rtol=1e-3, atol=1e-4)
    assert np.allclose(colours.bias, again.bias, rtol=1e-3, atol=1e-4)


def test_drawn_pictures_have_any_colour_and_edges() -> None:
    pictures = patchwork(8, 32)
    assert torch.equal(pictures, patchwork(8, 32))
    assert float(pictures.min()) < -0.9
    assert float(pictures.max()) > 0.9
    assert float(pictures.diff(dim=3).abs().max()) > 0.5


@pytest.mark.parametrize(
    ("sample_size", "levels", "tile", "expected"),
    [
        (8, (4, 2), 0, Range(32, 64, 128, step=16)),
        (64, (4, 4), 0, Range(256, 512, 1024, step=64)),
        (64, (4, 4), 512, Range(256, 512, 512, step=64)),
        (64, (4, 4), 256, Range(256, 256, 256, step=64)),
        (64, (4, 4), 4096, Range(256, 512, 1536, step=64)),
        (2, (2, 3), 0, Range(8, 8, 8, step=8)),
    ],
)
def test_what_is_decoded_in_one_piece(sample_size: int, levels: tuple[int, int], tile: int, expected: Range) -> None:
    checkpoint = shapes_like(sample_size, *levels)
    options = ExportOptions(checkpoint="x", out=Path("y"), vae_tile=tile)
    assert vae_range(checkpoint, size_range(checkpoint, options), options) == expected


@pytest.mark.parametrize("tile", [192, 520])
def test_tiles_must_be_sizes_of_pictures(tile: int) -> None:
    checkpoint, options = shapes_like(64, 4, 4), ExportOptions(checkpoint="x", out=Path("y"), vae_tile=tile)
    with pytest.raises(OptionError, match=rf"vae-tile is {tile}, and must be a multiple of 64 from 256"):
        vae_range(checkpoint, size_range(checkpoint, options), options)
    with pytest.raises(OptionError, match="vae-tile is -64"):
        ExportOptions(checkpoint="x", out=Path("y"), vae_tile=-64)


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factor 2, as the small checkpoint's own."""
    folder = tmp_path_factory.mktemp("tiny-vae")
    torch.manual_seed(1)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder)
    return folder


def planned(exported: Exported, out: Path, tiny_vae: Path | None, **more: Any) -> Plan:
    return plan_export(ExportOptions(checkpoint=str(exported.checkpoint), out=out, preview_vae=tiny_vae, **more))


def test_its_decoder_is_a_verified_component(exported: Exported, tiny_vae: Path, tmp_path: Path) -> None:
    plan, report = planned(exported, tmp_path, tiny_vae), Recorder()
    assert set(plan.precisions) == {*exported.manifest.components, PREVIEW_DECODER}
    (tmp_path / "model" / "1").mkdir(parents=True)
    with without_logs():
        graph = graph_from_component(plan, PREVIEW_DECODER, tmp_path / "model" / "1" / "model.onnx", report)
    assert graph.colours is None
    assert {(one.component, one.output) for one in report.results} == {(PREVIEW_DECODER, "pixels")}
    assert all(one.error < 1e-4 for one in report.results)
    latents = torch.randn(2, 4, 8, 12)
    (pixels,) = onnxruntime.InferenceSession(graph.path).run(None, {"latents": latents.numpy()})
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(tiny_vae).decode(latents).sample
    assert np.abs(pixels - expected.numpy()).max() < 1e-4


def test_engines_are_built_for_tiles_and_previews_one_by_one(
    exported: Exported, tiny_vae: Path, tmp_path: Path
) -> None:
    plan = planned(exported, tmp_path, tiny_vae, vae_tile=24)
    for name in plan.precisions:
        ranges = _ranges(plan, name, None)
        assert ranges.size == (Range(8, 16, 24, 4) if name in VAE_COMPONENTS else Range(8, 16, 48, 4))
        assert ranges.rows == (Range(1, 1, 1) if name == PREVIEW_DECODER else Range(1, 8, 64))


def test_an_export_without_it_removes_the_one_from_before(
    exported: Exported, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(plan: Plan, component: str, path: Path, report: Any) -> Graph:
        shutil.copyfile(exported.graph(VAE_DECODER if component == PREVIEW_DECODER else component), path)
        return float32_graph(plan.checkpoint, component, path)

    monkeypatch.setattr(assembly, "graph_from_component", copy)
    out, checkpoint = tmp_path / "deployment", str(exported.checkpoint)
    model = out / "models" / "tiny_preview_decoder"
    one = export_checkpoint(ExportOptions(checkpoint=checkpoint, out=out, preview_vae=tiny_vae))
    assert one.components[PREVIEW_DECODER].model == model.name
    assert (model / "1" / "model.onnx").is_file()
    other = export_checkpoint(ExportOptions(checkpoint=checkpoint, out=out))
    assert other.key != one.key
    assert PREVIEW_DECODER not in other.components
    assert not model.exists()
    assert sorted(path.name for path in (out / "models").iterdir()) == sorted(
        described.model for described in other.components.values()
    )


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def _without_weights(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_config, "lacks its config.json"),
        (_with(_class_name="AutoencoderKL"), "is a AutoencoderKL, and previews are made by an AutoencoderTiny"),
        (_with(latent_channels=16), "latents of 16 channels, 2 pixels each, and .* has 4 of 2; give one"),
        (_with(decoder_block_out_channels=[8, 8, 8]), "4 pixels each"),
        (_without_weights, "has no weights"),
    ],
)
def test_another_autoencoder_is_refused(
    exported: Exported, tiny_vae: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(tiny_vae, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        planned(exported, tmp_path, folder)
    with pytest.raises(OptionError, match="preview-vae is missing, and must be the folder"):
        planned(exported, tmp_path, Path("missing"))
