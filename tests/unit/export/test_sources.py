"""Which family a checkpoint is of, what it brings, and the three places that weights come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPTokenizer

from diffuserve.spec import FAMILIES
from diffuserve_export import CheckpointError, ExportOptions, OptionError
from diffuserve_export.digests import FileHashes, export_key
from diffuserve_export.export import plan_export
from diffuserve_export.modules import module_of
from diffuserve_export.sources import ARCHITECTURES, open_architecture, open_checkpoint, open_single_file
from diffuserve_export.tokenizer import tokenizer_from_checkpoint
from diffuserve_export.weights import load_part
from unit.export.pipelines import PIPELINES, TOKENIZER, random_pipeline
from unit.export.single_file import save_single_file

FULL_SIZE = ("sd15", "sd15-inpaint", "sd21", "sdxl")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of each kind of small checkpoint, made once. Not to be written to."""
    root = tmp_path_factory.mktemp("kinds")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            random_pipeline(kind).save_pretrained(root / kind)
        return root / kind

    return folder


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("kind", "family", "guidance_scale", "steps"),
    [
        ("sd15", "sd15", 7.5, 20),
        ("sd15-inpaint", "sd15-inpaint", 7.5, 20),
        ("sd21", "sd21", 7.5, 20),
        ("sdxl", "sdxl", 5.0, 20),
        ("lcm", "sd15", 8.5, 4),
    ],
)
def test_families_and_defaults(
    saved: Callable[[str], Path], kind: str, family: str, guidance_scale: float, steps: int
) -> None:
    opened = open_checkpoint(saved(kind))
    assert opened.family == FAMILIES[family]
    assert (opened.guidance_scale, opened.steps) == (guidance_scale, steps)
    assert opened.zero_empty_negative == (kind == "sdxl")
    assert opened.guidance_embedding == (12 if kind == "lcm" else 0)
    assert opened.sample_channels == (9 if kind == "sd15-inpaint" else 4)
    # Down to what goes into the first of 1, 2 and 2 layers; SDXL begins one before the last.
    assert opened.clip_skip == {"sd21": 2}.get(kind, 1)


TURBO = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("scheduler", "defaults"),
    [
        (TURBO, (0.0, 4)),
        ({**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}, (0.0, 4)),
        ({"_class_name": "LCMScheduler"}, (1.0, 4)),
        ({**TURBO, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, (5.0, 20)),
        ({**TURBO, "timestep_spacing": "leading"}, (5.0, 20)),
        ({**TURBO, "_class_name": "DDIMScheduler"}, (5.0, 20)),
    ],
)
def test_few_steps_show_in_the_scheduler(
    saved: Callable[[str], Path], tmp_path: Path, scheduler: dict[str, Any], defaults: tuple[float, int]
) -> None:
    folder = shutil.copytree(saved("sdxl"), tmp_path / "x")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    opened = open_checkpoint(folder)
    assert (opened.guidance_scale, opened.steps) == defaults
    (folder / "diffuserve.json").write_text('{"steps": 2, "guidance_scale": 3}')
    opened = open_checkpoint(folder)
    assert (opened.guidance_scale, opened.steps) == (3.0, 2)


def test_an_empty_negative_prompt_may_be_encoded(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("sdxl"), tmp_path / "x")
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert not open_checkpoint(folder).zero_empty_negative


def test_every_kind_is_exported_somewhere() -> None:
    assert set(FULL_SIZE) == {path.name for path in ARCHITECTURES.iterdir() if path.is_dir()}
    assert set(FULL_SIZE) <= set(PIPELINES)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_architectures_are_full_size(name: str) -> None:
    """On the meta device, so nothing is made but the count."""
    opened = open_architecture(name)
    assert opened.family.name == name
    for part in opened.parts.values():
        with torch.device("meta"):
            model: nn.Module = load_part(opened, part)
        assert sum(parameter.numel() for parameter in model.parameters()) == part.parameters


def test_the_size_of_the_architectures() -> None:
    """As their authors' own: these numbers are known of the published checkpoints."""
    assert open_architecture("sd15").parts["unet"].parameters == 859_520_964
    assert open_architecture("sd21").parts["unet"].parameters == 865_910_724
    assert open_architecture("sdxl").parts["unet"].parameters == 2_567_463_684
    sizes = {name: plan_export(random_weights(name)).size for name in FULL_SIZE}
    assert [(one.min, one.opt, one.max) for one in sizes.values()] == [
        (256, 512, 1536),
        (256, 512, 1536),
        (256, 768, 1536),
        (256, 1024, 1536),
    ]


def random_weights(family: str, **more: Any) -> ExportOptions:
    return ExportOptions(family=family, random_weights=True, out=Path("x"), **more)


def test_random_weights_are_the_seeds() -> None:
    opened = open_architecture("sd15")
    first, again = (load_part(opened, opened.parts["vae"]).state_dict() for _ in range(2))
    other = load_part(open_architecture("sd15", seed=1), opened.parts["vae"]).state_dict()
    name = "decoder.conv_in.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_options_of_random_weights(tmp_path: Path) -> None:
    assert random_weights("sdxl").deployed_name == "sdxl"
    assert random_weights("sdxl").source == "sdxl, random weights"
    hashes = FileHashes(tmp_path / "hashes")
    plans = [plan_export(random_weights(name, name="x")) for name in ("sd15", "sd15-inpaint")]
    assert len({export_key(plan.checkpoint.files, plan.facts(), hashes) for plan in plans}) == 2
    with pytest.raises(OptionError, match="random weights need a family: one of sd15"):
        random_weights("")
    with pytest.raises(CheckpointError, match=r"architecture of 'sdxl-inpaint' is not known; known are sd15, "):
        plan_export(random_weights("sdxl-inpaint"))


def test_precisions_are_the_components_own() -> None:
    plan = plan_export(random_weights("sdxl", precision="fp16"))
    assert plan.precisions == {
        "text_encoder": "fp16",
        "text_encoder_2": "fp16",
        "unet": "fp16",
        "vae_decoder": "fp32",
        "vae_encoder": "fp32",
    }
    assert set(plan_export(random_weights("sd15", precision="fp16")).precisions.values()) == {"fp16"}
    chosen = plan_export(random_weights("sdxl", precision="fp16", vae_precision="fp16"))
    assert set(chosen.precisions.values()) == {"fp16"}


@pytest.mark.parametrize(("name", "encoder"), [("sd15", ""), ("sd21", ""), ("sdxl", "_2")])
def test_the_built_in_tokenizer_is_clips(tmp_path: Path, name: str, encoder: str) -> None:
    """The vocabulary follows from the merges, and the padding from the family."""
    path = tokenizer_from_checkpoint(open_architecture(name), f"text_encoder{encoder}", tmp_path / "tokenizer.json")
    ours = Tokenizer.from_file(str(path))
    pad = "<|endoftext|>" if name == "sd15" else "!"
    theirs = CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)
    for prompt in ("", "a small red circle", "Émile's café — 日本語 🙂 12345", "word " * 200):
        assert ours.encode(prompt).ids == theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_single_file_has_the_folders_weights(saved: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    file = save_single_file(random_pipeline(kind), tmp_path / "one.safetensors")
    single, folder = open_single_file(file, saved(kind)), open_checkpoint(saved(kind))
    assert single.family == folder.family
    for component in ("text_encoder", "text_encoder_2", "unet", "vae_decoder"):
        if component in folder.family.components:
            got, want = (module_of(one, component).state_dict() for one in (single, folder))
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)
    assert single.files["weights"] == file
    assert {name: part.parameters for name, part in single.parts.items()} == {
        name: part.parameters for name, part in folder.parts.items()
    }


def test_a_single_file_that_is_not_whole(saved: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline, config = random_pipeline(), saved("sd15")
    file = save_single_file(pipeline, tmp_path / "one.safetensors", without="first_stage_model.")
    with pytest.raises(CheckpointError, match=r"lacks its vae: no weight in it starts with first_stage_model\."):
        open_single_file(file, config)
    save_single_file(pipeline, file, without="model.diffusion_model.")
    with pytest.raises(CheckpointError, match=r"no whole Stable Diffusion checkpoint: it lacks model\."):
        open_single_file(file, config)
    save_single_file(pipeline, file, without="cond_stage_model.")
    with pytest.raises(CheckpointError, match="no text encoder of a known family"):
        open_single_file(file, config)
    save_single_file(pipeline, file, without="model.diffusion_model.out.")
    with pytest.raises(CheckpointError, match=r"lacks weights.*first conv_norm_out\.bias; if it is not built like"):
        module_of(open_single_file(file, config), "unet")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        open_single_file(file, config)


def test_a_single_file_with_other_configs_than_its_own(saved: Callable[[str], Path], tmp_path: Path) -> None:
    file = save_single_file(random_pipeline(), tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"is of family sd15, and its configs in .* of sdxl"):
        open_single_file(file, saved("sdxl"))
    with pytest.raises(CheckpointError, match="if it is not built like its family's own models, give its configs"):
        module_of(open_single_file(file), "vae_decoder")
    file = save_single_file(random_pipeline("sd15-inpaint"), file)
    assert open_single_file(file, saved("sd15-inpaint")).family.name == "sd15-inpaint"


def test_pickles_are_read_only_where_they_are_allowed(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    random_pipeline().save_pretrained(folder, safe_serialization=False)
    if not (folder / "text_encoder" / "pytorch_model.bin").exists():  # transformers writes no pickles any more
        weights = folder / "text_encoder" / "model.safetensors"
        opened = open_checkpoint(saved("sd15"))
        state = load_part(opened, opened.parts["text_encoder"]).state_dict()
        torch.save(state, weights.with_name("pytorch_model.bin"))
        weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds pickled weights only.*or give --allow-pickle"):
        open_checkpoint(folder)
    opened, want = open_checkpoint(folder, allow_pickle=True), open_checkpoint(saved("sd15"))
    for component in ("text_encoder", "unet"):
        got = module_of(opened, component).state_dict()
        assert all(torch.equal(got[name], one) for name, one in module_of(want, component).state_dict().items())
