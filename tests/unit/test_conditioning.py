"""What the UNet is told for a request, made as the manifest says, over encoders whose answers can be computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from diffuserve import text_encoding
from diffuserve.checkpoint import Checkpoint
from diffuserve.components import InProcessRunner, cast_inputs
from diffuserve.conditioning import embedded_guidance
from diffuserve.engine import Group
from diffuserve.errors import ComponentFailedError, InvalidArgumentError
from diffuserve.manifest import Conditioning, Deployment, Encoder, TensorShape
from diffuserve.request import GenerateRequest
from diffuserve.spec import SAMPLE_INPAINT, UNET
from unit.fakes import TOKENIZER, UNET_INPUTS, component, write_deployment

ENCODERS = (Encoder("text_encoder", "tokenizer.json"), Encoder("text_encoder_2", "tokenizer_2.json"))
TEXT_EMBEDS = TensorShape("text_embeds", "FP16", ("rows", 3))
TIME_IDS = TensorShape("time_ids", "FP32", ("rows", 6))
TIMESTEP_COND = TensorShape("timestep_cond", "FP32", ("rows", 7))
LARGE = Conditioning(
    encoders=ENCODERS,
    text_embeds="text_encoder_2",
    time_ids=("height", "width", 0, 0, "height", "width"),
    zero_empty_negative=True,
)


class Models:
    """`hidden_states` of the first encoder are the token ids, of the second their negatives, twice.

    `pooled` is the first word's id, three times, in half.
    """

    def __init__(self) -> None:
        #: Token ids, call by call.
        self.read: dict[str, list[Any]] = {"text_encoder": [], "text_encoder_2": []}
        self.unet_inputs: Mapping[str, torch.Tensor] = {}

    def checkpoint(self, root: Path, how: Conditioning, *further: TensorShape) -> Checkpoint:
        names = ("text_encoder", "text_encoder_2", "vae_decoder")
        unet = replace(component(UNET), inputs=(*UNET_INPUTS, *further))
        components = {**{name: component(name) for name in names}, UNET: unet}
        deployment = write_deployment(root, "fake", conditioning=how, components=components)
        write_second_tokenizer(deployment)
        runner = InProcessRunner({"text_encoder": self.first, "text_encoder_2": self.second, UNET: self.unet})
        return Checkpoint(deployment, "fake", runner)

    def first(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.read["text_encoder"].append(inputs["input_ids"].tolist())
        return {"hidden_states": inputs["input_ids"].float()[:, :, None]}

    def second(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.read["text_encoder_2"].append(inputs["input_ids"].tolist())
        ids = inputs["input_ids"].float()
        return {"hidden_states": -ids[:, :, None].repeat(1, 1, 2), "pooled": ids[:, 1:2].repeat(1, 3).half()}

    def unet(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.unet_inputs = inputs
        return {"model_output": inputs["sample"]}


def write_second_tokenizer(deployment: Deployment) -> None:
    """As SDXL's second: it pads with `!`, which is 0."""
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    content["padding"] = {
        "strategy": {"Fixed": 77},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (deployment.folder("fake") / "tokenizer_2.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def models() -> Models:
    return Models()


def ask(prompt: str = "red", **values: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": prompt, "seed": 1, "steps": 5, **values})


def test_encoders_stand_side_by_side_each_with_its_own_tokenizer(tmp_path: Path, models: Models) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    (told,) = checkpoint.condition([checkpoint.resolve(ask(negative_prompt="blue"))])
    hidden = told["encoder_hidden_states"]
    assert (hidden.shape, hidden.dtype) == ((2, 77, 3), torch.float32)
    assert hidden[0, :, 0].tolist() == models.read["text_encoder"][0][0]
    red, blue = models.read["text_encoder_2"][0]
    assert hidden[:, 1, 1].tolist() == hidden[:, 1, 2].tolist() == [-red[1], -blue[1]]
    # "red" and its two marks, then padding: the end again, and `!`.
    assert set(hidden[0, 3:, 0].tolist()) == {49407}
    assert set(hidden[0, 3:, 1].tolist()) == {0}
    embeds = told["text_embeds"]
    assert (embeds.tolist(), embeds.dtype) == ([[red[1]] * 3, [blue[1]] * 3], torch.float32)


def test_times_are_the_pictures_height_and_width(tmp_path: Path, models: Models) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    requests = [ask(width=96, height=48), ask(guidance_scale=1.0)]
    wide, single = checkpoint.condition([checkpoint.resolve(one) for one in requests])
    assert wide["time_ids"].tolist() == [[48, 96, 0, 0, 48, 96]] * 2
    assert single["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    assert wide["time_ids"].dtype == torch.float32


@pytest.mark.parametrize(("negative", "zeros"), [("", True), (" ", False), ("blue", False)])
def test_an_empty_negative_prompt_is_zeros(tmp_path: Path, models: Models, negative: str, zeros: bool) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    # An empty prompt is no negative prompt: it is encoded.
    (told,) = checkpoint.condition([checkpoint.resolve(ask("", negative_prompt=negative))])
    for name in ("encoder_hidden_states", "text_embeds"):
        assert told[name][0].any()
        assert bool(told[name][1].any()) != zeros
    assert told["time_ids"][0].tolist() == told["time_ids"][1].tolist()


def test_where_the_manifest_does_not_say_so_it_is_encoded(tmp_path: Path, models: Models) -> None:
    how = replace(LARGE, zero_empty_negative=False)
    checkpoint = models.checkpoint(tmp_path, how, TEXT_EMBEDS, TIME_IDS)
    (told,) = checkpoint.condition([checkpoint.resolve(ask())])
    assert told["encoder_hidden_states"][1, 0].tolist() == [49406, -49406, -49406]


def test_each_text_is_encoded_once_for_all_requests(tmp_path: Path, models: Models) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    asked = [
        ask("red", negative_prompt="blue"),
        ask("green", negative_prompt="blue"),
        ask("blue", guidance_scale=1.0),
        ask("red"),
    ]
    requests = [checkpoint.resolve(one) for one in asked]
    assert [one.rows for one in requests] == [2, 2, 1, 2]
    together = checkpoint.condition(requests)
    assert [len(calls) for calls in models.read.values()] == [1, 1]
    assert [len(calls[0]) for calls in models.read.values()] == [3, 3]
    for request, told in zip(requests, together, strict=True):
        (alone,) = checkpoint.condition([request])
        assert told.keys() == alone.keys()
        assert all(torch.equal(told[name], alone[name]) for name in told)
        assert {len(one) for one in told.values()} == {request.rows}
    # A request holds its own rows and no one else's.
    hidden = together[0]["encoder_hidden_states"]
    assert hidden.untyped_storage().nbytes() == hidden.numel() * 4


def test_texts_that_came_lately_are_not_encoded_again(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoding, "_RECENT_BYTES", 3 * 77 * 4)  # three texts of the first encoder's single channel
    checkpoint = models.checkpoint(tmp_path, replace(LARGE, zero_empty_negative=False), TEXT_EMBEDS, TIME_IDS)

    def texts_read(*asked: GenerateRequest) -> int:
        before = len(models.read["text_encoder"])
        checkpoint.condition([checkpoint.resolve(one) for one in asked])
        return sum(map(len, models.read["text_encoder"][before:]))

    assert texts_read(ask("red", negative_prompt="blue")) == 2
    assert texts_read(ask("red", negative_prompt="blue"), ask("green", negative_prompt="blue")) == 1
    assert texts_read(ask("blue", guidance_scale=1.0)) == 0
    # Of red, green and blue, red was asked for longest ago.
    assert texts_read(ask("black", guidance_scale=1.0)) == 1
    assert texts_read(ask("green", negative_prompt="blue")) == 0
    assert texts_read(ask("red", guidance_scale=1.0)) == 1
    assert sum(recent._bytes for recent in _recents(checkpoint)) <= 2 * 3 * 77 * 4


def test_an_encoder_that_fails_loses_nothing(tmp_path: Path, models: Models) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    before = checkpoint.condition([checkpoint.resolve(ask("red"))])[0]
    kept = [_size(recent) for recent in _recents(checkpoint)]

    def fail(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise RuntimeError("out of memory")

    working = set_runner(checkpoint, InProcessRunner({"text_encoder": fail, "text_encoder_2": fail}))
    with pytest.raises(ComponentFailedError, match="out of memory"):
        checkpoint.condition([checkpoint.resolve(ask("red", negative_prompt="blue"))])
    assert [_size(recent) for recent in _recents(checkpoint)] == kept
    again = checkpoint.condition([checkpoint.resolve(ask("red"))])[0]
    assert all(torch.equal(again[name], one) for name, one in before.items())
    set_runner(checkpoint, working)
    checkpoint.condition([checkpoint.resolve(ask("red", negative_prompt="blue"))])
    assert [len(calls[-1]) for calls in models.read.values()] == [1, 1]


def set_runner(checkpoint: Checkpoint, runner: Any) -> Any:
    """Another runner for the text encoders; the one before."""
    encoders: Any = checkpoint.condition._encoders.values()
    before = [encoder._runner for encoder in encoders]
    for encoder in encoders:
        encoder._runner = runner
    return before[0]


def _size(recent: Any) -> tuple[int, int]:
    return len(recent._rows), recent._bytes


def _recents(checkpoint: Checkpoint) -> list[Any]:
    return [encoder.recent for encoder in checkpoint.condition._encoders.values()]


@pytest.mark.parametrize("width", [6, 7, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.3, 8.5, 50.0])
def test_embedded_guidance_is_diffusers(scale: float, width: int) -> None:
    pipeline: Any = LatentConsistencyModelPipeline
    expected = pipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), embedding_dim=width)
    assert torch.equal(embedded_guidance(scale, width), expected)


@pytest.mark.parametrize("scale", [0.5, 1.0, 8.5])
def test_guidance_that_the_unet_is_told_takes_one_row(tmp_path: Path, models: Models, scale: float) -> None:
    checkpoint = models.checkpoint(tmp_path, Conditioning(guidance_embedding=7), TIMESTEP_COND)
    resolved = checkpoint.resolve(ask(guidance_scale=scale, negative_prompt="blue"))
    (told,) = checkpoint.condition([resolved])
    assert resolved.rows == 1
    assert {name: len(one) for name, one in told.items()} == {"encoder_hidden_states": 1, "timestep_cond": 1}
    assert torch.equal(told["timestep_cond"], embedded_guidance(scale, 7))


def test_a_trial_has_every_input_of_the_unet_in_its_type(tmp_path: Path, models: Models) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    checkpoint.trial(Group("fake", height=64, width=96), rows=5)()
    found = {name: (tuple(one.shape), one.dtype) for name, one in models.unet_inputs.items()}
    assert found == {
        "sample": ((5, 4, 8, 12), torch.float32),
        "timestep": ((5,), torch.float32),
        "encoder_hidden_states": ((5, 77, 1), torch.float32),
        "text_embeds": ((5, 3), torch.float16),
        "time_ids": ((5, 6), torch.float32),
    }


def test_times_stay_float32_beside_half() -> None:
    """fp16 would turn 721.37 into 721.5, and has no number above 65504."""
    half = tuple(replace(one, datatype="FP16") for one in UNET_INPUTS if one.name != "timestep")
    taken = replace(component(UNET), inputs=(*half, UNET_INPUTS[1], TEXT_EMBEDS, TIME_IDS))
    cast = cast_inputs(taken, {one.name: torch.full((1,), 721.37) for one in taken.inputs})
    assert {name for name, one in cast.items() if one.dtype == torch.float32} == {"timestep", "time_ids"}
    assert {name for name, one in cast.items() if one.dtype == torch.float16} == {
        "sample",
        "encoder_hidden_states",
        "text_embeds",
    }


def test_a_mask_is_asked_for_at_admission_and_measured_all_the_same(tmp_path: Path, models: Models) -> None:
    checkpoint = models.checkpoint(tmp_path, Conditioning(sample=SAMPLE_INPAINT))
    with pytest.raises(
        InvalidArgumentError, match=r"fake makes anew .* give init_image and mask_image, or ask another"
    ):
        checkpoint.resolve(ask())
    checkpoint.trial(Group("fake", height=64, width=64), rows=1)()
    assert models.unet_inputs["sample"].shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("how", "further", "reason"),
    [
        (Conditioning(), (TIMESTEP_COND,), "takes .*timestep_cond, and its manifest says how to make encoder_h"),
        (LARGE, (TEXT_EMBEDS,), "says how to make .*time_ids, timestep; export it again"),
    ],
)
def test_a_unet_that_takes_something_else_is_refused_at_load(
    tmp_path: Path, models: Models, how: Conditioning, further: tuple[TensorShape, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        models.checkpoint(tmp_path, how, *further)


def test_an_export_from_before_is_refused_at_load_with_the_remedy(tmp_path: Path, models: Models) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    old = replace(component("text_encoder"), inputs=component("text_encoder").inputs[:1])
    folder = Deployment.load(tmp_path).folder("fake")
    manifest = checkpoint.manifest
    changed = replace(manifest, components={**manifest.components, "text_encoder": old})
    (folder / "manifest.json").write_text(changed.to_json())
    reason = r"text_encoder of fake takes input_ids, and is given clip_skip, embeddings, input_ids; export it again"
    with pytest.raises(ValueError, match=reason):
        Checkpoint(Deployment.load(tmp_path), "fake", InProcessRunner({}))
    (folder / "manifest.json").write_text(replace(manifest, format_version=2).to_json())
    with pytest.raises(ValueError, match="the manifest's format is 2, and 3 is read; export again"):
        Checkpoint(Deployment.load(tmp_path), "fake", InProcessRunner({}))


@pytest.mark.parametrize("damage", ["missing", "not a tokenizer"])
def test_a_tokenizer_that_cannot_be_read_is_refused_at_load(tmp_path: Path, models: Models, damage: str) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    file = Deployment.load(tmp_path).folder("fake") / "tokenizer_2.json"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("{")
    with pytest.raises((OSError, ValueError), match=r"tokenizer_2\.json"):
        Checkpoint(Deployment.load(tmp_path), "fake", checkpoint._runner)


def test_an_encoder_that_gives_other_rows_is_an_error(tmp_path: Path, models: Models) -> None:
    checkpoint = models.checkpoint(tmp_path, LARGE, TEXT_EMBEDS, TIME_IDS)
    second = models.second

    def fewer(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: one[:1] for name, one in second(inputs).items()}

    set_runner(checkpoint, InProcessRunner({"text_encoder": models.first, "text_encoder_2": fewer}))
    with pytest.raises(ComponentFailedError, match="text_encoder_2 gave 1 rows for 2"):
        checkpoint.condition([checkpoint.resolve(ask(negative_prompt="blue"))])
