"""The graphs of one real export, against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel

from diffuserve.manifest import TensorShape
from diffuserve.spec import TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export import ExportOptions, VerificationError, assembly, export_checkpoint, graphs, onnx_graph
from diffuserve_export.engines.build import onnx_files
from diffuserve_export.modules import VaeDecoder, VaeEncoder, module_of
from diffuserve_export.onnx_graph import onnx_from_component
from diffuserve_export.ports import Ports, ports_of
from diffuserve_export.sources import open_checkpoint
from diffuserve_export.verify import check_shapes, example_inputs, reference_outputs, verify_onnx
from unit.export.conftest import Exported, without_logs

COMPONENTS = (TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER)


def run(path: Path, **feed: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feed)
    return outputs


def relative_error(got: np.ndarray[Any, Any], want: torch.Tensor) -> float:
    return float(np.abs(got - want.numpy()).max() / want.abs().max())


def unet_feed(rows: int, height: int, width: int, tokens: int = 77) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(rows)
    return {
        "sample": rng.standard_normal((rows, 4, height, width), dtype=np.float32),
        "timestep": np.linspace(999, 1, rows, dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, tokens, 16), dtype=np.float32),
    }


def test_every_output_is_verified_at_two_shapes(exported: Exported) -> None:
    results = exported.report.results
    assert [(one.component, one.output) for one in results] == [
        *[(TEXT_ENCODER, "hidden_states"), (TEXT_ENCODER, "pooled")] * 2,
        *[(UNET, "model_output")] * 2,
        *[(VAE_DECODER, "pixels")] * 2,
        *[(VAE_ENCODER, "moments")] * 2,
    ]
    assert all(one.error < 1e-5 for one in results)
    unet = [one.shape for one in results if one.component == UNET]
    assert unet == [(1, 4, 8, 8), (3, 4, 4, 6)]


def test_each_row_has_its_own_timestep(exported: Exported) -> None:
    feed = unet_feed(3, 8, 8)
    (together,) = run(exported.graph(UNET), **feed)
    for row in range(3):
        (alone,) = run(exported.graph(UNET), **{name: array[row : row + 1] for name, array in feed.items()})
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
    (same_timestep,) = run(exported.graph(UNET), **{**feed, "timestep": np.full(3, 999, np.float32)})
    assert np.abs(same_timestep[1:] - together[1:]).max() > 1e-3


@pytest.mark.parametrize(
    ("rows", "height", "width", "tokens"),
    [(1, 32, 48, 77), (2, 48, 32, 231), (4, 4, 24, 154), (65, 4, 6, 77)],
    ids=["64x96", "96x64", "8x48", "65-rows"],
)
def test_rows_sizes_and_tokens_are_free(exported: Exported, rows: int, height: int, width: int, tokens: int) -> None:
    feed = unet_feed(rows, height, width, tokens)
    (got,) = run(exported.graph(UNET), **feed)
    module = module_of(open_checkpoint(exported.checkpoint), UNET)
    with torch.no_grad():
        want = module(*(torch.from_numpy(array) for array in feed.values()))
    assert relative_error(got, want) < 1e-4


def test_latents_are_scaled_inside(exported: Exported) -> None:
    vae = AutoencoderKL.from_pretrained(exported.checkpoint / "vae", torch_dtype=torch.float32)
    latents = torch.randn(2, 4, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = vae.decode(latents / vae.config.scaling_factor).sample
    (pixels,) = run(exported.graph(VAE_DECODER), latents=latents.numpy())
    assert pixels.shape == (2, 3, 64, 96)
    assert relative_error(pixels, want) < 1e-4


def test_moments_are_scaled_mean_and_standard_deviation(exported: Exported) -> None:
    vae = AutoencoderKL.from_pretrained(exported.checkpoint / "vae", torch_dtype=torch.float32)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    (moments,) = run(exported.graph(VAE_ENCODER), pixels=pixels.numpy())
    assert relative_error(moments[:, :4], posterior.mean * vae.config.scaling_factor) < 1e-4
    assert relative_error(moments[:, 4:], posterior.std * vae.config.scaling_factor) < 1e-4


def test_text_encoder_is_that_of_diffusers(exported: Exported) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(exported.checkpoint, torch_dtype=torch.float32)
    prompts = ["a red circle", "", "word " * 100]
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    hidden, pooled = run(exported.graph(TEXT_ENCODER), **text_feed(ids.input_ids))
    with torch.no_grad():
        want = pipeline.text_encoder(ids.input_ids)
    assert relative_error(hidden, want.last_hidden_state) < 1e-4
    assert relative_error(pooled, want.pooler_output) < 1e-4


def text_feed(ids: torch.Tensor, skip: int = 0, embeddings: torch.Tensor | None = None) -> dict[str, Any]:
    return {
        "input_ids": ids.numpy().astype(np.int32),
        "clip_skip": np.full(len(ids), skip, np.int32),
        "embeddings": np.zeros((1, 16), np.float32) if embeddings is None else embeddings.numpy(),
    }


def test_each_row_leaves_out_its_own_layers(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers looks for the final layer norm where transformers had it before its version 5.
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda model: model), raising=False)
    pipeline = StableDiffusionPipeline.from_pretrained(exported.checkpoint, torch_dtype=torch.float32)
    prompt = "a red circle"
    want = []
    for skip in (0, 1):
        embeds, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False, clip_skip=skip)
        want.append(embeds.detach())
    ids = pipeline.tokenizer([prompt] * 3, padding="max_length", max_length=77, return_tensors="pt").input_ids
    feed = {**text_feed(ids), "clip_skip": np.array([1, 0, 1], np.int32)}
    hidden, pooled = run(exported.graph(TEXT_ENCODER), **feed)
    assert relative_error(hidden, torch.cat([want[1], want[0], want[1]])) < 1e-4
    assert (want[1] - want[0]).abs().max() > 0.1
    np.testing.assert_allclose(pooled[0], pooled[1], atol=1e-5)


def test_ids_beyond_the_vocabulary_are_vectors_of_their_own(exported: Exported) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(exported.checkpoint, torch_dtype=torch.float32)
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(4))
    pipeline.load_textual_inversion({"<ring>": vectors}, token="<ring>")
    prompt = pipeline.maybe_convert_prompt("a red <ring> here", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert (ids >= 49408).sum() == 2
    with torch.no_grad():
        want = pipeline.text_encoder(ids)
    spare = torch.cat([vectors, torch.ones(1, 16)])
    hidden, pooled = run(exported.graph(TEXT_ENCODER), **text_feed(ids, embeddings=spare))
    assert relative_error(hidden, want.last_hidden_state) < 1e-4
    assert relative_error(pooled, want.pooler_output) < 1e-4


@pytest.mark.parametrize("component", COMPONENTS)
def test_graphs_hold_their_side_names_and_no_traces_of_the_machine(exported: Exported, component: str) -> None:
    model = onnx.load(exported.graph(component))
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [23]
    ports = exported.manifest.components[component]
    for value, port in zip((*model.graph.input, *model.graph.output), (*ports.inputs, *ports.outputs), strict=True):
        sides = [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        assert (value.name, tuple(sides)) == (port.name, port.shape)
    content = exported.graph(component).read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def test_attention_stays_whole(exported: Exported) -> None:
    assert "Attention" in {node.op_type for node in onnx.load(exported.graph(UNET)).graph.node}


def spoil(path: Path, to: Path) -> Path:
    """A graph that runs, with one weight changed by a little."""
    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = onnx.numpy_helper.to_array(weights) * np.float32(1.01)
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(model, to)
    return to


def test_a_wrong_graph_fails(exported: Exported, tmp_path: Path) -> None:
    opened = open_checkpoint(exported.checkpoint)
    module, ports = module_of(opened, VAE_DECODER), ports_of(opened)[VAE_DECODER]
    feeds = [example_inputs(opened, ports[0], sides) for sides in check_shapes(opened, exported.manifest.size)]
    wrong = spoil(exported.graph(VAE_DECODER), tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match=r"vae_decoder: pixels .* is off by .*, and 1e-04 is allowed"):
        verify_onnx(wrong, VAE_DECODER, ports, feeds, reference_outputs(module, feeds), 1e-4)


def test_another_graph_or_none_fails(exported: Exported, tmp_path: Path) -> None:
    opened = open_checkpoint(exported.checkpoint)
    ports = ports_of(opened)[VAE_DECODER]
    with pytest.raises(VerificationError, match="the graph has"):
        verify_onnx(exported.graph(VAE_ENCODER), VAE_DECODER, ports, [], [], 1e-4)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(VerificationError, match="cannot run the graph"):
        verify_onnx(tmp_path / "model.onnx", VAE_DECODER, ports, [], [], 1e-4)


def test_not_a_number_fails(exported: Exported) -> None:
    opened = open_checkpoint(exported.checkpoint)
    ports = ports_of(opened)[VAE_DECODER]
    feeds = [[torch.full((1, 4, 8, 8), float("nan"))]]
    expected = reference_outputs(module_of(opened, VAE_DECODER), feeds)
    with pytest.raises(VerificationError, match="off by nan"):
        verify_onnx(exported.graph(VAE_DECODER), VAE_DECODER, ports, feeds, expected, 1e-4)


def test_an_export_with_a_wrong_graph_leaves_nothing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: Any, ports: Any, example: Any, path: Path, opset: int) -> Path:
        return spoil(exported.graph(TEXT_ENCODER), path)

    monkeypatch.setattr(graphs, "onnx_from_component", wrong)
    monkeypatch.setattr(assembly, "graph_from_component", graphs.graph_from_component)
    out = tmp_path / "deployment"
    with pytest.raises(VerificationError):
        export_checkpoint(ExportOptions(checkpoint=str(exported.checkpoint), out=out))
    assert not out.exists()


def test_scaling_shift_is_undone() -> None:
    """Both directions of a checkpoint with a shift, as later families have."""

    class Posterior:
        mean = torch.full((1, 4, 2, 2), 3.0)
        std = torch.full((1, 4, 2, 2), 0.5)

    class Vae(torch.nn.Module):
        config = type("Config", (), {"scaling_factor": 2.0, "shift_factor": 1.0})

        def encode(self, pixels: torch.Tensor) -> Any:
            return type("Output", (), {"latent_dist": Posterior})

        def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (latents,)

    vae: Any = Vae()
    moments = VaeEncoder(vae)(torch.zeros(1, 3, 4, 4))
    assert moments[:, :4].unique().tolist() == [4.0]
    assert moments[:, 4:].unique().tolist() == [1.0]
    assert VaeDecoder(vae)(moments[:, :4]).unique().tolist() == [3.0]


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "_LARGEST_IN_GRAPH", 1000)
    layer, value = torch.nn.Linear(32, 8).requires_grad_(False), torch.ones(2, 32)
    ports: Ports = (
        (TensorShape("value", "FP32", ("rows", 32)),),
        (TensorShape("output", "FP32", ("rows", 8)),),
    )
    with without_logs():
        path = onnx_from_component(layer, ports, [value], tmp_path / "model.onnx", 18)
    assert onnx_files(path) == [path, tmp_path / "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size >= 32 * 8 * 4
    assert relative_error(run(path, value=value.numpy())[0], layer(value)) < 1e-6
