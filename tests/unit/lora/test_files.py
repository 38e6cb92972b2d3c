"""Files of LoRA: every naming is the same layers, and what cannot be expressed is refused by name."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffuserve.lora.files import LoraFile, Place, parse_lora_file, parse_lora_header
from unit.lora.files import TO_Q, tensors_of

DOWN, UP = tensors_of().values()
Q = Place("unet", TO_Q.replace(".", "_"))


def parsed(tensors: dict[str, torch.Tensor], **metadata: str) -> LoraFile:
    return parse_lora_file(safetensors.torch.save(tensors, metadata or None))


def named(down: str, up: str) -> dict[str, torch.Tensor]:
    return {down: DOWN, up: UP}


T1, T2, BLOCK = "text_encoder encoder_layers_0", "text_encoder_2 encoder_layers_0", "transformer_blocks_0"
SQUASHED = TO_Q.replace(".", "_")


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"unet.{TO_Q}.lora_A.weight", f"unet.{TO_Q}.lora_B.weight"),
        (f"unet.{TO_Q}.lora_A.default.weight", f"unet.{TO_Q}.lora_B.default.weight"),
        (f"base_model.model.{TO_Q}.lora_A.weight", f"base_model.model.{TO_Q}.lora_B.weight"),
        (f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"),
        (f"unet.{TO_Q}.lora_down.weight", f"unet.{TO_Q}.lora_up.weight"),
        (f"unet.{TO_Q}.lora.down.weight", f"unet.{TO_Q}.lora.up.weight"),
        (f"unet.{TO_Q}.lora_linear_layer.down.weight", f"unet.{TO_Q}.lora_linear_layer.up.weight"),
        (
            f"unet.{TO_Q.replace('to_q', 'processor.to_q')}_lora.down.weight",
            f"unet.{TO_Q.replace('to_q', 'processor.to_q')}_lora.up.weight",
        ),
        (f"lora_unet_{SQUASHED}.lora_down.weight", f"lora_unet_{SQUASHED}.lora_up.weight"),
    ],
)
def test_all_names_are_one_layer(down: str, up: str) -> None:
    file = parsed(named(down, up))
    (place,) = file.modules
    assert place == Q
    assert torch.equal(file.modules[place].down, DOWN)
    assert torch.equal(file.modules[place].up, UP)
    assert file.modules[place].scale == 1


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", f"{T1} self_attn_q_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora", f"{T1} self_attn_out_proj"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", f"{T1} mlp_fc1"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", f"{T1} mlp_fc1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", f"{T2} mlp_fc1"),
        ("text_encoder_2.encoder.layers.0.mlp.fc1", f"{T2} mlp_fc1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora",
         f"unet mid_block_attentions_0 {BLOCK}_attn2_to_out_0"),
        ("diffusion_model.input_blocks.4.1.proj_in", "unet input_blocks_4_1_proj_in"),
    ],
)  # fmt: skip
def test_components_are_told_apart(layer: str, place: str) -> None:
    suffixes = (".down.weight", ".up.weight") if layer.endswith("_lora") else (".lora_down.weight", ".lora_up.weight")
    (found,) = parsed(named(*(layer + suffix for suffix in suffixes))).modules
    component, _, name = place.partition(" ")
    assert found == Place(component, name.replace(" ", "_"))


def test_alpha_is_divided_by_the_rank() -> None:
    name = f"lora_unet_{SQUASHED}"
    factors = named(f"{name}.lora_down.weight", f"{name}.lora_up.weight")
    assert parsed({**factors, f"{name}.alpha": torch.tensor(3.0)}).modules[Q].scale == 3 / 2


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 6}, 3.0),
        ({"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / math.sqrt(2)),
        ({"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"k": 2, "to_q": 0, "attn1.to_q": 1}}, 0.0),  # the first
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"o_q": 1}}, 3.0),  # parts of a name are whole
        ({"text_encoder.lora_alpha": 6}, 1.0),
        ({}, 1.0),
    ],
)
def test_pefts_config_says_the_alpha(config: dict[str, Any], scale: float) -> None:
    file = parsed(tensors_of(), lora_adapter_metadata=json.dumps(config))
    assert file.modules[Q].scale == pytest.approx(scale)


def test_a_pattern_names_a_layer_of_a_text_encoder_as_peft_does() -> None:
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    config = {"text_encoder.lora_alpha": 6, "text_encoder.alpha_pattern": {layer: 1}}
    file = parsed(tensors_of(layer=f"text_encoder.{layer}"), lora_adapter_metadata=json.dumps(config))
    assert [one.scale for one in file.modules.values()] == [0.5]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"unet.lora_alpha": None}, "an alpha of None for .*to_q, which is no finite number"),
        ({"unet.lora_alpha": 10**400}, "an alpha of 1000.*, which is no finite number"),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": {}}}, "an alpha of {}"),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": [1]}, r"alpha_pattern for unet that is '\[1\]'"),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": "x"}, "alpha_pattern for unet that is 'x'"),
    ],
)
def test_metadata_of_another_kind_is_refused(config: dict[str, Any], said: str) -> None:
    content = safetensors.torch.save(tensors_of(), {"lora_adapter_metadata": json.dumps(config)})
    for parse in (parse_lora_file, lambda whole: parse_lora_header(whole, len(whole))):
        with pytest.raises(ValueError, match=said):
            parse(content)


def test_a_header_that_is_all_patterns_takes_no_time_for_each_layer() -> None:
    tensors = {
        f"unet.layer{number}.to_q.lora_{factor}.weight": torch.ones(1, 1) for number in range(1000) for factor in "AB"
    }
    patterns = {f"never.{number}": 1 for number in range(40_000)}  # 40 million pairs
    config = {"unet.lora_alpha": 4, "unet.alpha_pattern": patterns}
    content = safetensors.torch.save(tensors, {"lora_adapter_metadata": json.dumps(config)})
    began = time.thread_time()
    parse_lora_header(content, len(content))
    assert time.thread_time() - began < 3


def test_convolutions_of_one_pixel_are_matrices() -> None:
    names = (f"unet.{TO_Q}.lora_A.weight", f"unet.{TO_Q}.lora_B.weight")
    file = parsed({names[0]: DOWN[..., None, None].clone(), names[1]: UP[..., None, None].clone()})
    assert (file.modules[Q].down.shape, file.modules[Q].up.shape) == (DOWN.shape, UP.shape)
    assert file.bytes == DOWN.nbytes + UP.nbytes


L = f"unet.{TO_Q}"
BAD: list[tuple[dict[str, torch.Tensor], str]] = [
    ({f"{L}.lora_A.weight": torch.ones(2, 6, 3, 3), f"{L}.lora_B.weight": UP}, rf"not of 1x1 \(LoCon\).*{SQUASHED}"),
    ({**tensors_of(), f"{L}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "three factors .*to_q"),
    ({**tensors_of(), f"{L}.dora_scale": torch.ones(8)}, "cannot express: DoRA .*to_q"),
    ({**tensors_of(), f"{L}.lora_magnitude_vector.weight": torch.ones(8)}, "DoRA .*to_q"),
    ({**tensors_of(), f"{L}.lora_B.bias": torch.ones(8)}, "biases .*to_q"),
    ({f"lora_unet_{SQUASHED}.hada_w1_a": torch.ones(2, 2)}, f"LoHa .*{SQUASHED}"),
    ({f"lora_unet_{SQUASHED}.lokr_w1": torch.ones(2, 2)}, f"LoKr .*{SQUASHED}"),
    ({f"lora_unet_{SQUASHED}.diff_b": torch.ones(2)}, f"whole weights .*{SQUASHED}"),
    ({"emb_params": torch.ones(1, 64)}, r"no LoRA \(emb_params\)"),
    ({f"{L}.lora_A.weight": DOWN}, "one factor of two for .*to_q"),
    ({f"{L}.lora_A.weight": DOWN, f"{L}.lora_B.weight": torch.ones(8, 3)}, r"shapes \[2, 6\] and \[8, 3\] .*to_q"),
    ({f"{L}.lora_A.weight": torch.ones(257, 6), f"{L}.lora_B.weight": torch.ones(8, 257)}, "a rank of 1 to 256"),
    ({f"{L}.lora_A.weight": torch.ones(2, 6).long(), f"{L}.lora_B.weight": UP}, "values in torch.int64 .*to_q"),
    ({f"{L}.lora_A.weight": DOWN * math.nan, f"{L}.lora_B.weight": UP}, "values that are not finite.*to_q"),
    ({f"{L}.lora_A.weight": DOWN, f"{L}.lora_B.weight": UP * math.inf}, "values that are not finite.*to_q"),
    ({f"{L}.lora_A.weight": DOWN, f"{L}.lora_B.weight": UP * 1e6}, "beyond 10000.*to_q"),
    ({f"{L}.lora_A.weight": torch.ones(0, 6), f"{L}.lora_B.weight": torch.ones(8, 0)}, "a factor of shape"),
    ({f"{L}.lora_A.weight": torch.ones(6), f"{L}.lora_B.weight": UP}, r"a factor of shape \[6\]"),
    ({**tensors_of(), f"{L}.alpha": torch.tensor(math.nan)}, "an alpha of nan .*to_q"),
    ({**tensors_of(), "unet.other.alpha": torch.tensor(1.0)}, "an alpha and no factors for unet.other"),
    ({**tensors_of(), f"{L}.lora_down.weight": DOWN.clone()}, "twice, under two names"),
    ({f"a{number}": torch.ones(1) for number in range(10_001)}, "has 10001 tensors, and must have 1 to 10000"),
]


@pytest.mark.parametrize(("tensors", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_what_cannot_be_expressed_is_refused_by_name(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parsed(tensors)


def test_dora_in_the_config_is_refused() -> None:
    with pytest.raises(ValueError, match="DoRA"):
        parsed(tensors_of(), lora_adapter_metadata=json.dumps({"unet.use_dora": True, "unet.lora_alpha": 1}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no safetensors file, or not whole"),
        (b"PK\x03\x04" + b"\0" * 64, "no safetensors file"),
        (b"\x80\x04cos\nsystem\n(S'false'\ntR.", "no safetensors file"),
        ((8 << 20).to_bytes(8, "little") + b"[" * (8 << 20), "a header of 8388608 bytes, and at most 4194304 are read"),
        ((1 << 20).to_bytes(8, "little") + b"[" * (1 << 20), "no safetensors file"),
        (safetensors.torch.save(tensors_of())[:-1], "not whole"),
        (safetensors.torch.save(tensors_of(), {"lora_adapter_metadata": "[" * 100_000}), "no safetensors file"),
        (safetensors.torch.save(tensors_of(), {"lora_adapter_metadata": "{"}), "no safetensors file"),
    ],
)
def test_what_is_no_file_of_tensors_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_lora_file(content)


def test_kohyas_names_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    """Its converter is one name at a time; here on layers that both have."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as converted

    layers = [
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_up_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_2_attentions_1_transformer_blocks_0_ff_net_2",
        "lora_unet_up_blocks_2_attentions_1_proj_out",
        "lora_te_text_model_encoder_layers_11_self_attn_out_proj",
        "lora_te_text_model_encoder_layers_3_mlp_fc2",
    ]
    tensors = {f"{one}.lora_{side}.weight": torch.ones(2, 2) for one in layers for side in ("down", "up")}
    theirs, _ = converted(dict(tensors))
    assert parsed(dict(tensors)).modules.keys() == parsed(theirs).modules.keys()
