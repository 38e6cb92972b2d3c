"""Bad input: exit code 2 and one line that says what to do, no traceback, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from diffuserve_export import CheckpointError, ExportOptions, OptionError, command, export_checkpoint
from diffuserve_export.command import app
from diffuserve_export.export import Plan, plan_export
from diffuserve_export.hub import find_checkpoint
from diffuserve_export.sources import open_checkpoint
from diffuserve_export.weights import load_part
from unit.export.conftest import Exported


def refused(*arguments: str) -> str:
    """The one line that the command ends with."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def truncate(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def headed(header: bytes) -> Callable[[Path], Any]:
    """Damage: a file of weights that is this header."""
    content = len(header).to_bytes(8, "little") + header
    return lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(content)


def shaped(told: Any, offsets: tuple[int, ...] = (0, 0)) -> Callable[[Path], Any]:
    return headed(json.dumps({"a": {"dtype": "F32", "shape": told, "data_offsets": offsets}}).encode())


def pickles(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no model_index", lambda f: (f / "model_index.json").unlink(), "not a diffusers folder"),
    ("not JSON", lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not JSON"),
    ("a list", lambda f: (f / "model_index.json").write_text("[]"), "holds no JSON object"),
    (
        "another family",
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
        "is a FluxPipeline, and the known families are sd15: StableDiffusionPipeline",
    ),
    ("no unet", lambda f: shutil.rmtree(f / "unet"), "lacks its unet"),
    ("no vae config", lambda f: (f / "vae" / "config.json").unlink(), "lacks its vae"),
    ("no tokenizer", lambda f: shutil.rmtree(f / "tokenizer"), "lacks its tokenizer"),
    ("no scheduler", lambda f: shutil.rmtree(f / "scheduler"), "lacks its scheduler"),
    ("no weights", lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "has no weights"),
    ("truncated", truncate, "is truncated or damaged: it should have"),
    ("empty", lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b""), "is truncated or damaged"),
    ("nested", headed(b"[" * 200_000), "is truncated or damaged"),
    ("one offset", shaped([1], (0,)), "is truncated or damaged"),
    ("a shape of text", shaped(["q"]), "is truncated or damaged: it says ['q'] where a shape is meant"),
    ("a negative shape", shaped([-5]), "it says [-5] where a shape is meant"),
    ("no shape", shaped(7), "it says 7 where a shape is meant"),
    ("pickled", pickles, "pickled weights only"),
    (
        "another class",
        lambda f: edit(f / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        "has AutoencoderTiny as its vae; AutoencoderKL is exported",
    ),
    ("edited by text", lambda f: edit(f / "unet" / "config.json", in_channels=8), "not built yet: a UNet of 8 input"),
    ("classes", lambda f: edit(f / "unet" / "config.json", num_class_embeds=8), "with num_class_embeds"),
    ("SDXL's UNet", lambda f: edit(f / "unet/config.json", addition_embed_type="text_time"), "and sd15 needs None"),
    (
        "another width",
        lambda f: edit(f / "unet/config.json", cross_attention_dim=24),
        "takes text of width 24, and its",
    ),
    (
        "the refiner",
        lambda f: edit(
            f / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder_2=[None] * 2
        ),
        "has nothing as its text_encoder_2",
    ),
    ("no scheduler class", lambda f: (f / "scheduler/scheduler_config.json").write_text("{}"), "has no _class_name"),
]


@pytest.mark.parametrize(("damage", "message"), [one[1:] for one in DAMAGE], ids=[one[0] for one in DAMAGE])
def test_a_bad_checkpoint(checkpoint: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(checkpoint)
    assert message in refused("--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "abacus"], "target is 'abacus', and must be one of onnxruntime-cpu"),
        (
            ["--target", "onnxruntime", "--precision", "int4"],
            "not built yet: onnxruntime in int4; use onnxruntime-cpu in fp32",
        ),
        (
            ["--compute-capability", "89"],
            "compute-capability is given, and the target onnxruntime-cpu has no use for it",
        ),
        (["--target", "tensorrt-rtx", "--compute-capability", "70"], "TensorRT-RTX builds for 75,80,86,89,120,121"),
        (["--precision", "bf16"], "not built yet: onnxruntime-cpu in bf16"),
        (["--precision", "int8"], "not built yet: onnxruntime-cpu in int8"),
        (["--vae-precision", "int8"], "vae-precision is 'int8', and must be one of fp32, fp16, bf16"),
        (["--family", "sd3"], "family is 'sd3', and must be one of sd15"),
        (["--family", "sdxl"], "is of family sd15, not sdxl"),
        (["--random-weights"], "has its own"),
        (["--config", "/no/such"], "config is /no/such, and must be a diffusers folder"),
        (["--precision", "fp3"], "precision is 'fp3', and must be one of fp32"),
        (["--sizes", "64"], "must be min:opt:max in pixels"),
        (["--sizes", "10:16:32"], "each a multiple of 4"),
        (["--sizes", "32:16:8"], "rising"),
        (["--sizes", "0:16:32"], "rising"),
        (["--max-rows", "0"], "max-rows is 0, and must be at least 1"),
        (["--name", "Tiny"], "the name 'Tiny' must be lower-case"),
        (["--name", "../tiny"], "the name '../tiny' must be"),
    ],
)
def test_a_bad_option(saved_checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in refused("--checkpoint", str(saved_checkpoint), "--out", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert "there is no folder /no/such" in refused("--checkpoint", "/no/such", "--out", out)
    assert "there is no file /no/such.safetensors" in refused("--checkpoint", "/no/such.safetensors", "--out", out)
    (tmp_path / "one.ckpt").write_text("")
    assert "is a pickle, which can run code" in refused("--checkpoint", str(tmp_path / "one.ckpt"), "--out", out)
    (tmp_path / "notes.txt").write_text("")
    assert "is a file" in refused("--checkpoint", str(tmp_path / "notes.txt"), "--out", out)


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refused("--checkpoint", "owner/name", "--out", str(tmp_path / "out"))
    assert message.endswith(
        "there is no folder owner/name, and the hub did not give it: no connection; check the name and the network"
    )


def test_a_hub_id_fetches_what_an_export_reads(saved_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "owner/name"
        asked.append(allow_patterns)
        return str(saved_checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint(find_checkpoint("owner/name")).root == saved_checkpoint
    assert len(asked) == 1
    assert {"unet/diffusion_pytorch_model.safetensors", "diffuserve.json"} <= set(asked[0])


def test_fp16_weights_are_fetched_where_there_are_no_others(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(checkpoint / "waiting")
    asked: list[list[str]] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if len(asked) == 2:
            (checkpoint / "waiting").rename(weights.with_suffix(".fp16.safetensors"))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_checkpoint(find_checkpoint("owner/name"))
    assert opened.parts["unet"].variant == "fp16"
    assert asked[1][0] == "unet/diffusion_pytorch_model.fp16.safetensors"
    assert all(pattern.startswith("unet/") for pattern in asked[1])


def test_pickles_are_fetched_only_where_they_are_asked_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickles(checkpoint)
    asked: list[str] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_checkpoint("owner/name")
    assert not [pattern for pattern in asked if not pattern.endswith((".json", ".safetensors", ".txt", "/*"))]
    asked.clear()
    find_checkpoint("owner/name", allow_pickle=True)
    found = [pattern for pattern in asked if pattern.endswith(".bin")]
    assert found == ["vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin"]


def test_the_command_reads_pickles_where_it_is_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickles(checkpoint)
    plans: list[Plan] = []
    monkeypatch.setattr(command, "export_checkpoint", lambda options, _: plans.append(plan_export(options)))
    arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--allow-pickle"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    opened = plans[0].checkpoint
    assert opened.parts["vae"].pickled
    # What has the name holds no pickle.
    with pytest.raises(CheckpointError, match=r"the vae of .* cannot be loaded: "):
        load_part(opened, opened.parts["vae"])


def test_shards_must_all_be_there(checkpoint: Path) -> None:
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    shard = weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
    weights.rename(shard)
    index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    assert open_checkpoint(checkpoint).parts["unet"].files == (index, shard)
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": "another.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names weights that are missing: another\.safetensors"):
        open_checkpoint(checkpoint)


def test_weights_that_do_not_fit_their_config(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "text_encoder" / "config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"the text_encoder of .* lacks weights"):
        export_checkpoint(ExportOptions(checkpoint=str(checkpoint), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_too_little_disk(saved_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    line = refused("--checkpoint", str(saved_checkpoint), "--out", str(tmp_path / "out"))
    assert re.search(r"has 0\.00 GB free, and the export needs 0\.\d\d GB there; .* by --out$", line)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_for_engines(saved_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("DIFFUSERVE_CACHE", str(cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000 if path == cache else 10**12))
    arguments = ["--checkpoint", str(saved_checkpoint), "--target", "tensorrt-rtx", "--compute-capability", "89"]
    line = refused(*arguments, "--out", str(tmp_path / "out"))
    assert line.startswith(f"error: {cache / 'engines'} has 0.00 GB free, and the export needs")
    assert line.endswith("by DIFFUSERVE_CACHE")
    assert not (tmp_path / "out").exists()
    assert list(cache.iterdir()) == []


def test_a_folder_that_cannot_be_made(saved_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused("--checkpoint", str(saved_checkpoint), "--out", str(tmp_path / "file" / "out"))
    assert "cannot be written to" in line


@pytest.mark.parametrize(
    ("checkpoint_path", "name"),
    [
        ("stabilityai/Some_Model.V5.1", "some_model-v5-1"),
        ("checkpoints/shapes/", "shapes"),
        ("a/B", "b"),
    ],
)
def test_names_by_default(checkpoint_path: str, name: str) -> None:
    assert ExportOptions(checkpoint=checkpoint_path, out=Path("x")).deployed_name == name


def test_an_empty_checkpoint() -> None:
    with pytest.raises(OptionError, match="the checkpoint is empty"):
        ExportOptions(checkpoint=" ", out=Path("x"))


def test_the_command_says_when_it_is_up_to_date(exported: Exported) -> None:
    result = CliRunner().invoke(app, ["--checkpoint", str(exported.checkpoint), "--out", str(exported.out)])
    assert result.exit_code == 0
    assert f"tiny is up to date in {exported.out}" in result.stdout


def test_a_checkpoint_may_bring_its_own_guidance_scale(checkpoint: Path) -> None:
    assert open_checkpoint(checkpoint).guidance_scale == 7.5
    defaults = checkpoint / "diffuserve.json"
    defaults.write_text('{"guidance_scale": 2}')
    opened = open_checkpoint(checkpoint)
    assert opened.guidance_scale == 2.0
    assert "diffuserve.json" in opened.files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"guidance_scale": 51}', "must be a number from 0 to 50"),
        ('{"guidance_scale": "7"}', "must be a number from 0 to 50"),
        ('{"guidance_scale": NaN}', "must be a number from 0 to 50"),
        ('{"steps": 0}', "sets steps to 0, and it must be a number from 1 to 150"),
        ('{"steps": 2.5}', "sets steps to 2.5"),
        ('{"sampler": "lcm"}', "sets sampler, and only guidance_scale and steps can be set there"),
        ("[]", "holds no JSON object"),
    ],
)
def test_bad_serving_defaults_are_refused(checkpoint: Path, text: str, said: str) -> None:
    (checkpoint / "diffuserve.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(checkpoint)
