"""A ControlNet in a checkpoint's UNet: which fit, where their weights come from, and what the graph computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from diffuserve.manifest import Range, TensorShape
from diffuserve.spec import UNET
from diffuserve_export import CheckpointError, ExportOptions, OptionError
from diffuserve_export.controlnet import controlnet_from_file
from diffuserve_export.digests import FileHashes, export_key
from diffuserve_export.engines import engine_profiles
from diffuserve_export.engines.profiles import ShapeRanges, tensor_shapes
from diffuserve_export.export import Plan, plan_export
from diffuserve_export.lora import add_lora, lora_layout
from diffuserve_export.modules import module_of
from diffuserve_export.ports import ports_of, with_lora
from diffuserve_export.precision import find_islands
from diffuserve_export.verify import example_inputs, example_shape
from unit.export.controlnets import random_controlnet, with_middle
from unit.export.pipelines import random_pipeline
from unit.export.single_file import original_controlnet

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"
Saved = Callable[[str], Path]


@pytest.fixture(scope="session")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Folders of small checkpoints, each with a ControlNet for it in its `controlnet`. Not to be written to."""
    root = tmp_path_factory.mktemp("controlled")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            pipeline = random_pipeline(kind)
            pipeline.unet = with_middle(pipeline.unet)
            pipeline.save_pretrained(root / kind)
            random_controlnet(pipeline.unet).save_pretrained(root / kind / "controlnet")
        return root / kind

    return folder


def plan(checkpoint: Path, controlnet: Path | str, **more: Any) -> Plan:
    return plan_export(ExportOptions(checkpoint=str(checkpoint), controlnet=str(controlnet), out=Path("x"), **more))


def feed(made: Plan, component: str = UNET) -> list[torch.Tensor]:
    return example_inputs(made.checkpoint, ports_of(made.checkpoint)[component][0], example_shape(made.checkpoint))


@pytest.mark.parametrize("kind", ["sd15", "sd15-inpaint", "sd21", "sdxl", "lcm"])
def test_it_adds_to_each_row_what_diffusers_would(controlled: Saved, kind: str) -> None:
    folder = controlled("sd15" if kind == "lcm" else kind)
    checkpoint = folder
    if kind == "lcm":  # a ControlNet is told no guidance scale, so that of the family's other checkpoints fits
        checkpoint = folder.parent / "lcm"
        pipeline = random_pipeline("lcm")
        pipeline.unet = with_middle(pipeline.unet)
        pipeline.save_pretrained(checkpoint)
    made = plan(checkpoint, folder / "controlnet")
    names = [one.name for one in ports_of(made.checkpoint)[UNET][0]]
    assert names[-2:] == ["control", "control_scale"]
    inputs = dict(zip(names, feed(made), strict=True))
    scales = inputs["control_scale"]
    assert scales.tolist() == [1.0, 0.5, 0.0]
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    with torch.no_grad():
        got = module_of(made.checkpoint, UNET)(*inputs.values())
        for row, scale in enumerate(scales.tolist()):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            added = {name: one[name] for name in ("text_embeds", "time_ids") if name in one}
            told: dict[str, Any] = {"added_cond_kwargs": added, "return_dict": False}
            common = one["timestep"], one["encoder_hidden_states"]
            down, mid = controlnet(one["sample"][:, :4], *common, one["control"], conditioning_scale=scale, **told)
            told["timestep_cond"] = one.get("timestep_cond")
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            (want,) = unet(one["sample"], *common, **told, **residuals)
            (plain,) = unet(one["sample"], *common, **told)
            assert torch.allclose(got[row : row + 1], want, atol=1e-5)
            assert torch.allclose(got[row : row + 1], plain, atol=1e-5) == (scale == 0)


def test_adapters_beside_it_change_the_unet_alone(controlled: Saved) -> None:
    folder = controlled("sdxl")
    checkpoint = plan(folder, folder / "controlnet").checkpoint
    plain, both = (module_of(checkpoint, UNET) for _ in range(2))
    layout = lora_layout(both, rank=2, rows=3, number_bytes=4)
    add_lora(both, layout)
    assert not [name for name, one in both.named_modules() if name.startswith("controlnet") and name.endswith(".base")]
    inputs, _ = with_lora(ports_of(checkpoint)[UNET], layout.size)
    names = [one.name for one in inputs]
    assert names[-4:] == ["control", "control_scale", "lora", "lora_index"]
    told = example_inputs(checkpoint, inputs, example_shape(checkpoint))
    with torch.no_grad():
        got, want = both(*told), plain(*told[:-2])
    for row, adapter in enumerate(told[-1].tolist()):
        assert torch.allclose(got[row], want[row], atol=1e-5) == (adapter == 0)


def test_what_overflows_in_a_controlnet_stays_in_float32(controlled: Saved, tmp_path: Path) -> None:
    folder = shutil.copytree(controlled("sd15") / "controlnet", tmp_path / "hot")
    weights = load_file(folder / WEIGHTS)
    weights["down_blocks.0.resnets.0.conv1.weight"] *= 1e6
    weights["down_blocks.0.resnets.0.conv2.weight"] *= 1e-6
    save_file(weights, folder / WEIGHTS)
    made = plan(controlled("sd15"), folder)
    islands = find_islands(module_of(made.checkpoint, UNET), [feed(made)], "fp16")
    assert islands.modules
    assert all(name.startswith("controlnet.down_blocks.0") for name in islands.modules)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"block_out_channels": (8, 24)}, r"block_out_channels is \[8, 24\], and must be \[8, 16\]; give one that was"),
        ({"cross_attention_dim": 24}, "cross_attention_dim is 24, and must be 16"),
        ({"layers_per_block": 2}, "layers_per_block is 2, and must be 1"),
        ({"in_channels": 9}, "in_channels is 9, and must be 4"),
        ({"conditioning_channels": 1}, "takes pictures of 1 channels, and 3 are given"),
        ({"conditioning_embedding_out_channels": (4, 8, 8)}, "takes 4 pixels for a latent, along one side, .* has 2"),
        (
            {"global_pool_conditions": True},
            r"guide one of a picture's two rows \(guess_mode\); give one",
        ),
        ({"num_class_embeds": 3}, "it has num_class_embeds, and takes further inputs"),
        (
            {"_class_name": "ControlNetUnionModel"},
            "it is a ControlNetUnionModel; give one ControlNetModel",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    controlled: Saved, tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    folder = shutil.copytree(controlled("sd15") / "controlnet", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(CheckpointError, match=reason):
        plan(controlled("sd15"), folder)


def test_another_family_is_refused_by_name(controlled: Saved) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"does not fit the UNet of .* \(sdxl\): cross_attention_dim is 16, and must be 40; .*"
        "addition_embed_type is None, and must be text_time",
    ):
        plan(controlled("sdxl"), controlled("sd15") / "controlnet")


def test_a_single_file_is_the_folders(controlled: Saved, tmp_path: Path) -> None:
    """In diffusers' layout and in the original code's."""
    folder = controlled("sd15")
    wanted = module_of(plan(folder, folder / "controlnet").checkpoint, UNET).state_dict()
    plain = shutil.copyfile(folder / "controlnet" / WEIGHTS, tmp_path / "plain.safetensors")
    made = plan(folder, plain)
    found = module_of(made.checkpoint, UNET).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], one) for name, one in wanted.items())
    assert made.checkpoint.files["controlnet/weights"] == plain
    # The original's has three halvings always.
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    usual = random_controlnet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256))
    state = usual.state_dict()
    save_file(original_controlnet(usual), tmp_path / "original.safetensors")
    model, lacking = controlnet_from_file(tmp_path / "original.safetensors", ControlNetModel, usual.config)
    assert not lacking
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


def test_files_that_are_no_controlnet(controlled: Saved, tmp_path: Path) -> None:
    folder, file = controlled("sd15"), tmp_path / "one.safetensors"
    state = load_file(folder / "controlnet" / WEIGHTS)
    save_file({"lora_unet_down.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="it has neither controlnet_cond_embedding"):
        plan(folder, file)
    save_file({**state, "task_embedding": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="it has task_embedding, as a union of several has"):
        plan(folder, file)
    save_file({name: one for name, one in state.items() if name != "conv_in.bias"}, file)
    with pytest.raises(CheckpointError, match=r"the controlnet of .* lacks weights.* first conv_in\.bias"):
        module_of(plan(folder, file).checkpoint, UNET)
    save_file({**state, "conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"the controlnet of .* cannot be loaded"):
        module_of(plan(folder, file).checkpoint, UNET)
    save_file({**state, "more.bias": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"has no place for, first more\.bias"):
        module_of(plan(folder, file).checkpoint, UNET)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        plan(folder, file)


def test_pickles_and_what_is_nowhere_are_refused(controlled: Saved, tmp_path: Path) -> None:
    pickle = tmp_path / "control.pth"
    pickle.write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code when it is read"):
        plan(controlled("sd15"), pickle)
    folder = shutil.copytree(controlled("sd15") / "controlnet", tmp_path / "pickled")
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds pickled weights only"):
        plan(controlled("sd15"), folder)
    allowed = plan(controlled("sd15"), folder, allow_pickle=True)
    assert any(name.startswith("controlnet.") for name in module_of(allowed.checkpoint, UNET).state_dict())
    for nowhere in ("no such folder", tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="is no ControlNet; give a diffusers folder"):
            plan(controlled("sd15"), nowhere)
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        plan(controlled("sd15"), "nobody/nothing-at-all")


def test_it_is_a_part_of_what_decides_an_export(controlled: Saved, tmp_path: Path) -> None:
    folder, hashes = controlled("sd15"), FileHashes(tmp_path / "hashes")
    moved = shutil.copytree(folder / "controlnet", tmp_path / "moved")
    changed = shutil.copytree(folder / "controlnet", tmp_path / "changed")
    weights = load_file(changed / WEIGHTS)
    save_file({**weights, "conv_in.bias": weights["conv_in.bias"] + 1}, changed / WEIGHTS)

    def key(made: Plan) -> str:
        return export_key(made.checkpoint.files, made.facts(), hashes)

    plain = plan(folder, "")
    own, same, other = (plan(folder, one) for one in (folder / "controlnet", moved, changed))
    assert key(own) == key(same)
    assert len({key(plain), key(own), key(other)}) == 3
    assert own.source == f"{folder} with the ControlNet {folder / 'controlnet'}"
    parameters = sum(one.numel() for one in weights.values())
    assert own.graph_bytes[UNET] - plain.graph_bytes[UNET] == 4 * parameters


def test_quantized_precisions_are_refused() -> None:
    with pytest.raises(OptionError, match=r"not built: a ControlNet in int8, .*; export it in fp32 or fp16 or bf16"):
        ExportOptions(checkpoint="x", controlnet="y", out=Path("x"), target="tensorrt", precision="int8")


def test_profiles_bind_the_control_to_the_latents() -> None:
    inputs = (
        TensorShape("sample", "FP16", ("rows", 4, "latent_height", "latent_width")),
        TensorShape("control", "FP16", ("rows", 3, "height", "width")),
    )
    ranges = ShapeRanges(Range(256, 512, 1536, 64), Range(1, 8, 64), 8, 77, {})
    for profile in engine_profiles(UNET, inputs, ranges, cuda_graphs=True):
        shapes = tensor_shapes(inputs, profile)
        for sample, control in zip(shapes["sample"], shapes["control"], strict=True):
            assert (control[0], control[2], control[3]) == (sample[0], 8 * sample[2], 8 * sample[3])
