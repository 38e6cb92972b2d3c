"""Long, weighted, skipped and learnt prompts as the UNet is told them, over encoders whose answers can be computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffuserve.checkpoint import Checkpoint
from diffuserve.components import InProcessRunner
from diffuserve.errors import InvalidArgumentError, UnsupportedError
from diffuserve.manifest import Conditioning, Encoder
from diffuserve.prompts import Reading
from diffuserve.request import GenerateRequest
from diffuserve.spec import UNET
from diffuserve.text_encoding import emphasized
from unit.fakes import UNET_INPUTS, component, write_deployment
from unit.test_conditioning import LARGE, TEXT_EMBEDS, TIME_IDS, write_second_tokenizer

BEGIN, END = 49406, 49407
SMALL = Conditioning()
RED, BLUE = 736, 1746
TWO = replace(
    LARGE,
    encoders=(
        Encoder("text_encoder", "tokenizer.json", embedding_key="clip_l"),
        Encoder("text_encoder_2", "tokenizer_2.json", embedding_key="clip_g"),
    ),
)


class Encoders:
    """`hidden_states` are the ids, in place of those beyond the vocabulary their vectors, and 0.5 a skipped layer.

    `pooled` is the sum of the window.
    """

    def __init__(self, root: Path, how: Conditioning = SMALL, max_rows: int = 64) -> None:
        self.calls: list[Mapping[str, torch.Tensor]] = []
        self.root = root
        further = (TEXT_EMBEDS, TIME_IDS) if how.text_embeds else ()
        components = {one.component: component(one.component) for one in how.encoders}
        components[UNET] = replace(component(UNET), inputs=(*UNET_INPUTS, *further))
        deployment = write_deployment(root, "fake", conditioning=how, components=components, max_rows=max_rows)
        write_second_tokenizer(deployment)
        runner = InProcessRunner({one.component: self.encode for one in how.encoders})
        self.checkpoint = Checkpoint(deployment, "fake", runner)

    def encode(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls.append(inputs)
        ids, vectors = inputs["input_ids"], inputs["embeddings"]
        assert vectors.shape[1] == 1
        assert len(vectors) >= 1
        own = vectors[(ids - 49408).clamp(min=0)][..., 0]
        hidden = torch.where(ids >= 49408, own, ids.float()) + 0.5 * inputs["clip_skip"][:, None]
        return {"hidden_states": hidden[:, :, None], "pooled": hidden.sum(dim=1, keepdim=True)}

    def put(self, name: str, **tensors: Any) -> None:
        folder = self.root / "embeddings"
        folder.mkdir(exist_ok=True)
        made = {key: torch.tensor(values, dtype=torch.float32)[:, None] for key, values in tensors.items()}
        safetensors.torch.save_file(made, folder / f"{name}.safetensors")

    def told(self, prompt: str, **values: Any) -> dict[str, torch.Tensor]:
        (told,) = self.told_together({"prompt": prompt, **values})
        return told

    def told_together(self, *asked: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        requests = [GenerateRequest(**{"seed": 1, "steps": 5, **values}) for values in asked]
        return self.checkpoint.condition([self.checkpoint.resolve(one) for one in requests])

    def states(self, prompt: str, **values: Any) -> list[list[float]]:
        """Of the first encoder, row by row."""
        rows: list[list[float]] = self.told(prompt, **values)["encoder_hidden_states"][:, :, 0].tolist()
        return rows


def window(*ids: int) -> list[int]:
    return [BEGIN, *ids, *[END] * (76 - len(ids))]


def test_windows_lie_end_to_end_and_both_prompts_have_as_many(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path)
    rows = encoders.states("red " * 76, negative_prompt="blue")
    assert rows == [[*window(*[RED] * 75), *window(RED)], [*window(BLUE), *window()]]
    rows = encoders.states("red", negative_prompt="blue " * 151)
    assert rows == [[*window(RED), *window(), *window()], [*window(*[BLUE] * 75) * 2, *window(BLUE)]]
    (row,) = encoders.states("red " * 226, guidance_scale=1.0, negative_prompt="blue")
    assert row == [*window(*[RED] * 75) * 3, *window(RED), *window(), *window()]
    assert encoders.states("red " * 75, negative_prompt="") == [window(*[RED] * 75), window()]


def test_two_encoders_read_as_many_windows_and_the_first_is_pooled(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path, TWO)
    told = encoders.told("red " * 76, negative_prompt="blue")
    assert told["encoder_hidden_states"].shape == (2, 154, 2)
    padded = [BEGIN, BLUE, END, *[0] * 74, BEGIN, END, *[0] * 75]
    assert told["encoder_hidden_states"][1, :, 1].tolist() == padded
    assert told["text_embeds"].tolist() == [[sum(window(*[RED] * 75))], [BEGIN + BLUE + END]]
    nothing = encoders.told("red " * 76)
    assert not nothing["encoder_hidden_states"][1].any()
    assert nothing["encoder_hidden_states"].shape == (2, 154, 2)


def test_windows_are_encoded_once_and_in_calls_that_the_engine_takes(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path, max_rows=2)
    assert encoders.checkpoint.condition.max_windows == 2
    prompt = "red " * 75 + "blue " * 75 + "red " * 75 + "red"
    encoders.states(prompt, negative_prompt="blue")
    # Three that differ and the empty one of the prompt; the negative prompt's first.
    assert [len(call["input_ids"]) for call in encoders.calls] == [2, 2, 1]
    encoders.states(f"{prompt} blue", negative_prompt="blue")
    assert [len(call["input_ids"]) for call in encoders.calls] == [2, 2, 1, 1]


def test_layers_are_left_out_of_the_prompt_or_as_a1111_of_both(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path)
    plain, red, blue = 0.5 * 2, window(RED), window(BLUE)
    skipped = [one + plain for one in red]
    assert encoders.states("red", negative_prompt="blue", clip_skip=2) == [skipped, blue]
    both = encoders.states("red", negative_prompt="blue", clip_skip=2, prompt_syntax="a1111")
    assert both == [skipped, [one + plain for one in blue]]
    # The same words, read another way, are not taken for those that are kept.
    assert encoders.states("red", negative_prompt="blue") == [red, blue]


def test_clip_skip_has_the_checkpoints_limit(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path, Conditioning(clip_skip=2))
    with pytest.raises(InvalidArgumentError, match=r"clip_skip is 3, and the text encoders of fake have 2 layers .* 2"):
        encoders.told("red", clip_skip=3)
    for value in (13, -1):
        with pytest.raises(InvalidArgumentError, match=f"clip_skip is {value}, and must be from 0 to 12"):
            GenerateRequest(prompt="red", clip_skip=value)


def test_weights_multiply_and_the_windows_mean_stays(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path)
    (row, negative) = encoders.states("(red:3) blue BREAK [blue]", negative_prompt="red", prompt_syntax="a1111")
    first = torch.tensor(window(RED, BLUE), dtype=torch.float32)
    weighted = first * torch.tensor([1.0, 3.0, *[1.0] * 75])
    torch.testing.assert_close(torch.tensor(row[:77]), weighted * first.mean() / weighted.mean())
    second = torch.tensor(window(BLUE), dtype=torch.float32)
    weighted = second * torch.tensor([1.0, 1 / 1.1, *[1.0] * 75])
    torch.testing.assert_close(torch.tensor(row[77:]), weighted * second.mean() / weighted.mean())
    assert negative == [*window(RED), *window()]
    assert encoders.states("(red:3) blue")[0] != row[:77], "plain has no weights"


def test_emphasis_that_leaves_no_mean_is_not_restored() -> None:
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert emphasized(hidden, (1.0, 1.0)) is hidden
    assert emphasized(hidden, (0.0, 0.0)).tolist() == [[0, 0], [0, 0]]
    assert emphasized(hidden, (-7.0, 3.0)).isfinite().all()
    assert emphasized(hidden, (2.0, 2.0)).tolist() == hidden.tolist()


def test_learnt_words_are_vectors_in_a_shared_call(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path)
    encoders.put("ring", a=[0.25, 0.5])
    encoders.put("style", a=[0.125])
    asked: list[dict[str, Any]] = [
        {"prompt": "red ring style"},
        {"prompt": "blue <ring>"},
        {"prompt": "red", "guidance_scale": 1.0},
    ]
    told = [one["encoder_hidden_states"][0, :, 0].tolist() for one in encoders.told_together(*asked)]
    assert [len(call["input_ids"]) for call in encoders.calls] == [4]
    assert encoders.calls[0]["embeddings"].tolist() == [[0.25], [0.5], [0.125]]
    assert told == [
        [BEGIN, RED, 0.25, 0.5, 0.125, *[END] * 72],
        [BEGIN, BLUE, 0.25, 0.5, *[END] * 73],
        window(RED),
    ]


def test_a_file_that_changes_is_not_mistaken_for_what_was_kept(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path)
    assert encoders.states("ring", guidance_scale=1.0)[0][1] > 49
    for value in (0.25, 0.75):
        encoders.put("ring", a=[value])
        assert encoders.states("ring", guidance_scale=1.0)[0][:3] == [BEGIN, value, END]
    calls = len(encoders.calls)
    encoders.states("ring", guidance_scale=1.0)
    assert len(encoders.calls) == calls


def test_learnt_words_have_weights_and_fill_windows(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path)
    encoders.put("ring", a=[10.0] * 10)
    (row,) = encoders.states("red " * 70 + "ring", guidance_scale=1.0)
    assert row == [*window(*[RED] * 70), BEGIN, *[10.0] * 10, *[END] * 66]
    (row,) = encoders.states("(ring:2)", guidance_scale=1.0, prompt_syntax="a1111")
    plain = torch.tensor([BEGIN, *[10.0] * 10, *[END] * 66])
    weighted = plain * torch.tensor([1.0, *[2.0] * 10, *[1.0] * 66])
    torch.testing.assert_close(torch.tensor(row), weighted * plain.mean() / weighted.mean())


def test_two_encoders_have_vectors_of_their_own(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path, TWO)
    encoders.put("ring", clip_l=[0.25, 0.5], clip_g=[4.0, 8.0])
    hidden = encoders.told("red ring", guidance_scale=1.0)["encoder_hidden_states"][0]
    assert hidden[1:4].tolist() == [[RED, RED], [0.25, 4.0], [0.5, 8.0]]
    encoders.put("alone", a=[1.0])
    with pytest.raises(InvalidArgumentError, match=r"alone has vectors of width 1, and .* 1 \(clip_l\)") as caught:
        encoders.told("red", negative_prompt="alone")
    assert caught.value.detail["input"] == "negative_prompt"


def test_what_was_read_is_reported(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path)
    encoders.put("ring", a=[0.25])
    request = GenerateRequest(prompt="ring", negative_prompt="a RING", seed=1)
    resolved = encoders.checkpoint.resolve(request)
    reading: Reading = resolved.reading
    assert (len(reading.rows), reading.chunks, len(resolved.embeddings)) == (2, 1, 1)
    (name,) = resolved.embeddings
    assert name.startswith("ring:")
    assert len(name) == len("ring:") + 16
    assert resolved.parameters(0)["embeddings"] == [name]


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (
            {"prompt": "red " * 500 + "((([", "prompt_syntax": "a1111"},
            InvalidArgumentError,
            "prompt takes 7 windows of 75",
        ),
        (
            {"prompt": "red BREAK " * 6 + "red", "prompt_syntax": "a1111"},
            InvalidArgumentError,
            "prompt takes 7 windows",
        ),
        ({"prompt": "[a|b]", "prompt_syntax": "a1111"}, UnsupportedError, "do not change on the way"),
        ({"prompt": "a", "negative_prompt": "(a:11)", "prompt_syntax": "a1111"}, InvalidArgumentError, "weight of 'a'"),
    ],
)
def test_what_cannot_be_read_is_refused_when_it_comes(
    tmp_path: Path, values: dict[str, Any], kind: type[Exception], said: str
) -> None:
    encoders = Encoders(tmp_path)
    with pytest.raises(kind, match=said):
        encoders.told_together(values)
    assert not encoders.calls


def test_three_hundred_tokens_with_unbalanced_brackets_are_read(tmp_path: Path) -> None:
    encoders = Encoders(tmp_path)
    (row,) = encoders.states("((" + "red " * 298 + "]) ", guidance_scale=1.0, prompt_syntax="a1111")
    assert len(row) == 6 * 77
    with pytest.raises(InvalidArgumentError, match="prompt_syntax is 'A1111', and must be one of plain, a1111"):
        GenerateRequest(prompt="a", prompt_syntax="A1111")
