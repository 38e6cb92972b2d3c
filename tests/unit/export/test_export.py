"""What an export leaves in the deployment, when it does nothing, and what interruptions leave."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format
from tokenizers import Tokenizer
from transformers import CLIPTokenizer
from tritonclient.grpc import model_config_pb2

from diffuserve.manifest import Deployment, Encoder, Manifest, Range
from diffuserve.spec import FAMILIES
from diffuserve_export import ExportOptions, OptionError, assembly, export_checkpoint
from diffuserve_export.checkpoint import Checkpoint, FolderWeights, Part
from diffuserve_export.modules import module_of
from diffuserve_export.ports import row_range, size_range
from diffuserve_export.report import Report
from diffuserve_export.sources import open_checkpoint
from diffuserve_export.workspace import SUMS_FILE, Workspace, locked_workspace
from unit.export.conftest import Exported, Recorder
from unit.export.pipelines import TOKENIZER


def options(checkpoint: Path, out: Path, **more: Any) -> ExportOptions:
    return ExportOptions(checkpoint=str(checkpoint), out=out, **more)


@pytest.fixture
def deployment(exported: Exported, tmp_path: Path) -> Path:
    """A copy of the shared export that a test may change."""
    return shutil.copytree(exported.out, tmp_path / "deployment")


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.glob(".export-*")]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a server could read."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in named.items() if not name.startswith(".")}


def test_the_manifest_says_what_the_server_needs(exported: Exported) -> None:
    manifest = exported.manifest
    assert manifest == Deployment.load(exported.out).manifest("tiny")
    assert (manifest.name, manifest.family, manifest.target, manifest.precision) == (
        "tiny",
        "sd15",
        "onnxruntime-cpu",
        "fp32",
    )
    assert manifest.guidance_scale == 7.5
    assert manifest.size == Range(8, 16, 48, step=4)
    assert manifest.rows == Range(1, 8, 64)
    assert (manifest.latent_channels, manifest.latent_scale, manifest.token_limit) == (4, 2, 77)
    assert (manifest.conditioning.chunks, manifest.conditioning.clip_skip) == ((1, 2, 3, 6), 1)
    assert manifest.conditioning.encoders == (Encoder("text_encoder", "tokenizer.json", 49408, ""),)
    assert manifest.scheduler["_class_name"] == "PNDMScheduler"
    assert manifest.scheduler["steps_offset"] == 1
    for name, component in manifest.components.items():
        assert component.model == f"tiny_{name}"
        assert component.bytes == exported.graph(name).stat().st_size


def test_the_deployment_holds_exactly_this(exported: Exported) -> None:
    models = [
        f"models/tiny_{component}/{file}"
        for component in ("text_encoder", "unet", "vae_decoder", "vae_encoder")
        for file in ("1/model.onnx", "1/model.py", "config.pbtxt")
    ]
    files = [f"checkpoints/tiny/{name}" for name in (SUMS_FILE, "manifest.json", "tokenizer.json")]
    assert sorted(tree(exported.out)) == sorted(["deployment.json", *models, *files])
    assert leftovers(exported.out) == []
    check = ["sha256sum", "--check", "--quiet", f"checkpoints/tiny/{SUMS_FILE}"]
    assert subprocess.run(check, cwd=exported.out, check=False).returncode == 0


def test_config_pbtxt_parses_back(exported: Exported) -> None:
    text = (exported.out / "models" / "tiny_unet" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny_unet", "python", 0)
    assert {one.name: list(one.dims) for one in config.input} == {
        "sample": [-1, 4, -1, -1],
        "timestep": [-1],
        "encoder_hidden_states": [-1, -1, 16],
    }
    assert {one.name: list(one.dims) for one in config.output} == {"model_output": [-1, 4, -1, -1]}
    assert {one.data_type for one in (*config.input, *config.output)} == {model_config_pb2.TYPE_FP32}
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert config.parameters["intra_op_num_threads"].string_value == "0"


def test_tokens_are_those_of_cliptokenizer(exported: Exported) -> None:
    theirs = CLIPTokenizer.from_pretrained(TOKENIZER)
    ours = Tokenizer.from_file(str(exported.out / "checkpoints" / "tiny" / "tokenizer.json"))
    prompts = [
        "",
        "a small red circle on a blue background",
        "Émile's café — 日本語 🙂 12345",
        "word " * 200,
        "  a\n\tb  ",
    ]
    for prompt in prompts:
        want = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(prompt).ids == want
    ours.no_truncation()
    ours.no_padding()
    assert ours.encode(prompts[3]).ids == theirs(prompts[3]).input_ids


def shapes_like(sample_size: int, vae_levels: int, unet_levels: int) -> Checkpoint:
    def part(name: str, config: dict[str, Any]) -> Part:
        return Part(name, "", config, None, (), 0)

    parts = {
        "unet": part("unet", {"sample_size": sample_size, "block_out_channels": [8] * unet_levels}),
        "vae": part("vae", {"block_out_channels": [8] * vae_levels}),
    }
    return Checkpoint(
        label="x",
        root=Path("x"),
        family=FAMILIES["sd15"],
        weights=FolderWeights(),
        parts=parts,
        scheduler={},
        guidance_scale=7.5,
        steps=20,
        zero_empty_negative=False,
        files={},
    )


@pytest.mark.parametrize(
    ("opened", "expected"),
    [
        (shapes_like(8, vae_levels=4, unet_levels=2), Range(32, 64, 192, step=16)),
        (shapes_like(64, vae_levels=4, unet_levels=4), Range(256, 512, 1536, step=64)),
        (shapes_like(2, vae_levels=2, unet_levels=3), Range(8, 8, 8, step=8)),
    ],
)
def test_sizes_follow_from_the_checkpoint(opened: Checkpoint, expected: Range) -> None:
    assert size_range(opened, ExportOptions(checkpoint="x", out=Path("y"))) == expected


def test_sizes_and_rows_can_be_given() -> None:
    given = ExportOptions(checkpoint="x", out=Path("y"), sizes="64:96:128", max_rows=4)
    assert size_range(shapes_like(8, 4, 2), given) == Range(64, 96, 128, step=16)
    assert row_range(given) == Range(1, 4, 4)


def test_the_second_run_does_nothing(exported: Exported) -> None:
    before, report = tree(exported.out), Recorder()
    assert export_checkpoint(options(exported.checkpoint, exported.out), report) == exported.manifest
    assert report.notes == [f"tiny is up to date in {exported.out}"]
    assert report.stages == []
    assert tree(exported.out) == before


def test_the_second_run_needs_no_torch(exported: Exported) -> None:
    code = (
        "import sys; from pathlib import Path; from diffuserve_export import ExportOptions, export_checkpoint; "
        "export_checkpoint(ExportOptions(checkpoint=sys.argv[1], out=Path(sys.argv[2]))); "
        "assert not {'torch', 'onnx', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(exported.checkpoint), str(exported.out)], check=True)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.usefixtures("graphs_from_store")
@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, Path.unlink])
@pytest.mark.parametrize(
    "file", ["models/tiny_unet/1/model.onnx", "models/tiny_unet/config.pbtxt", "checkpoints/tiny/tokenizer.json"]
)
def test_a_damaged_file_is_made_again(
    exported: Exported, deployment: Path, damage: Callable[[Path], None], file: str
) -> None:
    assert export_checkpoint(options(exported.checkpoint, deployment)) == exported.manifest
    damage(deployment / file)
    report = Recorder()
    export_checkpoint(options(exported.checkpoint, deployment), report)
    assert report.stages
    assert tree(deployment) == tree(exported.out)


@pytest.mark.usefixtures("graphs_from_store")
def test_another_checkpoint_is_added_and_the_first_stays(exported: Exported, deployment: Path) -> None:
    export_checkpoint(options(exported.checkpoint, deployment, name="second"))
    assert Deployment.load(deployment).checkpoints == ("tiny", "second")
    after = tree(deployment)
    assert {name: after[name] for name in tree(exported.out) if name != Deployment.FILE} == {
        name: content for name, content in tree(exported.out).items() if name != Deployment.FILE
    }
    # Everything in it is equal, so it names what is there.
    assert Deployment.load(deployment).manifest("second").components["unet"].model == "tiny_unet"
    assert not list((deployment / "models").glob("second_*"))
    for name in ("tiny", "second"):
        report = Recorder()
        export_checkpoint(options(exported.checkpoint, deployment, name=name), report)
        assert report.stages == []


@pytest.mark.usefixtures("graphs_from_store")
@pytest.mark.parametrize("change", ["weights", "scheduler", "sizes"])
def test_other_content_replaces_what_has_the_name(
    exported: Exported, checkpoint: Path, deployment: Path, change: str
) -> None:
    if change == "weights":
        file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif change == "scheduler":
        file = checkpoint / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "steps_offset": 0}))
    sizes = "8:16:32" if change == "sizes" else ""
    manifest = export_checkpoint(options(checkpoint, deployment, sizes=sizes))
    assert manifest.key != exported.manifest.key
    assert Deployment.load(deployment).checkpoints == ("tiny",)
    assert Deployment.load(deployment).manifest("tiny") == manifest
    assert leftovers(deployment) == []


STEPS = ("tokenizer_from_checkpoint", "graph_from_component", "component_model_from_onnx")


@pytest.mark.usefixtures("graphs_from_store")
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_changes_nothing(
    exported: Exported, deployment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    calls = iter(range(100))

    def fail_at_the_second(*arguments: Any) -> Any:
        if next(calls) or step == "tokenizer_from_checkpoint":
            raise KeyboardInterrupt
        return working(*arguments)

    working = getattr(assembly, step)
    monkeypatch.setattr(assembly, step, fail_at_the_second)
    before = tree(deployment)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(options(exported.checkpoint, deployment, name="second"))
    assert tree(deployment) == before
    assert leftovers(deployment) == []
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(options(exported.checkpoint, tmp_path / "fresh"))
    assert not (tmp_path / "fresh").exists()


def stage(workspace: Workspace, content: str) -> Path:
    """A small complete export of `x`, staged and not yet published."""
    staging = workspace.root / f".export-{content}"
    (staging / "checkpoints" / "x").mkdir(parents=True)
    (staging / "checkpoints" / "x" / "manifest.json").write_text(content)
    for model in ("x_text_encoder", "x_unet"):
        (staging / "models" / model).mkdir(parents=True)
        (staging / "models" / model / "model.onnx").write_text(content)
    workspace.seal(staging, "x")
    return staging


class KilledError(BaseException):
    pass


@contextlib.contextmanager
def killed_at_rename(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process dies before its renaming of that number. Nothing of it runs afterwards."""
    left = iter(range(number))

    def dying(real: Callable[..., Path]) -> Callable[..., Path]:
        def rename(path: Path, target: Path) -> Path:
            if next(left, None) is None:
                raise KilledError
            return real(path, target)

        return rename

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying(Path.rename))
        patched.setattr(Path, "replace", dying(Path.replace))
        with contextlib.suppress(KilledError):
            yield


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("number", range(9))
def test_a_kill_while_publishing_is_completed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, replaces: bool
) -> None:
    with locked_workspace(tmp_path, Report()) as workspace:
        if replaces:
            workspace.publish(stage(workspace, "old"), "x")
        staging = stage(workspace, "new")
        with killed_at_rename(number, monkeypatch):
            workspace.publish(staging, "x")
    before = tree(tmp_path)
    manifest, models = (
        before.get("checkpoints/x/manifest.json"),
        {content for name, content in before.items() if name.startswith("models/")},
    )
    # Whoever reads now finds a manifest with its own models, or none.
    assert manifest is None or models == {manifest}
    assert replaces or manifest or "deployment.json" not in before
    with locked_workspace(tmp_path, Report()):
        after = tree(tmp_path)
    before_ready = b"old" if replaces else None
    expected = before_ready if number == 0 else b"new"
    assert after.get("checkpoints/x/manifest.json") == after.get("models/x_unet/model.onnx") == expected
    assert ("deployment.json" in after) == (expected is not None)
    assert leftovers(tmp_path) == []


def test_a_killed_run_leaves_nothing_that_counts(exported: Exported, tmp_path: Path) -> None:
    out = tmp_path / "deployment"
    command = [sys.executable, "-m", "diffuserve_export", "--checkpoint", str(exported.checkpoint), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob(".export-*/models/*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert tree(out) == {}
    assert len(leftovers(out)) == 1
    report = Recorder()
    with locked_workspace(out, report):
        assert leftovers(out) == []
    assert report.notes == ["removing what an interrupted export left behind"]


def test_one_export_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []
    waiting = threading.Event()

    class Waiting(Report):
        def note(self, text: str) -> None:
            order.append(text)
            waiting.set()

    def second() -> None:
        with locked_workspace(tmp_path / "out", Waiting()):
            order.append("second")

    with locked_workspace(tmp_path / "out", Report()):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    # The first one made the folder, put nothing in it and removed it: the second works in a folder of its own.
    assert order == [f"waiting for another export into {tmp_path / 'out'}", "first", "second"]


def test_a_new_folder_keeps_what_others_put_into_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with contextlib.suppress(KilledError), locked_workspace(out, Report()):
        (out / "loras").mkdir()
        (out / "loras" / "mine.safetensors").write_text("hours of work")
        raise KilledError
    assert [path.name for path in out.rglob("*")] == ["loras", "mine.safetensors"]


def test_an_export_is_whole_without_the_hashes_that_it_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    report = Recorder()
    with locked_workspace(tmp_path, report) as workspace:
        workspace.publish(stage(workspace, "new"), "x")
        monkeypatch.setattr(Path, "write_text", full)
    (note,) = report.notes
    assert note.startswith(f"{tmp_path / '.hashes.json'} cannot be written (No space left on device)")
    assert list(tmp_path.glob(".hashes*")) == []


def test_the_lock_is_the_kernels(tmp_path: Path) -> None:
    """So that a run that was killed holds nothing."""
    with locked_workspace(tmp_path, Report()), (tmp_path / ".lock").open() as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / ".lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_unreadable_deployment_is_an_error(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "deployment.json").write_text("{")
    with pytest.raises(OptionError, match=r"deployment.json cannot be read: .*; remove it"):
        export_checkpoint(options(exported.checkpoint, tmp_path))


def test_weights_in_fp16_are_exported_in_float32(exported: Exported) -> None:
    module = module_of(open_checkpoint(exported.checkpoint), "unet")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_manifest_survives_json(exported: Exported) -> None:
    assert Manifest.from_json(exported.manifest.to_json()) == exported.manifest
    assert os.access(exported.out / "models", os.R_OK | os.X_OK)
