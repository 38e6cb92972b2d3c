"""Files into vectors: what a layer's factors multiply to is the weighted sum of what the files say."""

from __future__ import annotations

import pytest
import torch

from diffuserve.lora.files import LoraFile, LoraModule, Place
from diffuserve.lora.layout import LINEAR, Layer, layout_of
from diffuserve.lora.packing import Places, Share, packed, required_rank
from unit.lora.files import LAYOUTS, TO_Q, WORDS, pair

Q, T = Place("unet", TO_Q.replace(".", "_")), Place("text_encoder", "encoder_layers_0_self_attn_q_proj")
DTYPES = dict.fromkeys(LAYOUTS, torch.float32)
PLACES = Places(LAYOUTS)


def share(rank: int, weight: float = 1.0, *, truncated: bool = False, scale: float = 1.0, seed: int = 1) -> Share:
    down, up = pair(rank, 6, 8, seed)
    return Share(PLACES.fit(LoraFile("", {Q: LoraModule(down, up, scale)})), weight, truncated)


def product(one: Share) -> torch.Tensor:
    module = one.fitted["unet"][TO_Q]
    return one.weight * module.scale * module.up @ module.down


def change(*shares: Share) -> torch.Tensor:
    factors = LAYOUTS["unet"].factors(packed((), shares, LAYOUTS, DTYPES).vectors["unet"])
    return factors[TO_Q].up @ factors[TO_Q].down


def test_ranks_are_stacked_and_weights_folded_in() -> None:
    first, second = share(1, 0.5, scale=3.0), share(3, -2.0, seed=2)
    assert torch.allclose(change(first, second), product(first) + product(second), atol=1e-5)


def test_layers_that_a_file_leaves_out_stay_zero() -> None:
    adapter = packed((), [share(2)], LAYOUTS, DTYPES)
    assert set(adapter.vectors) == {"unet"}
    others = [one for path, one in LAYOUTS["unet"].factors(adapter.vectors["unet"]).items() if path != TO_Q]
    assert others
    assert not any(one.down.any() or one.up.any() for one in others)


def test_text_encoders_have_vectors_of_their_own() -> None:
    down, up = pair(2, 3, 3)
    fitted = PLACES.fit(LoraFile("", {T: LoraModule(down, up, 1.0)}))
    adapter = packed((), [Share(fitted, 1.0, False)], LAYOUTS, DTYPES)
    factors = LAYOUTS["text_encoder"].factors(adapter.vectors["text_encoder"])[WORDS]
    assert set(adapter.vectors) == {"text_encoder"}
    assert torch.allclose(factors.up @ factors.down, up @ down, atol=1e-6)


def test_truncation_is_the_nearest_of_that_rank_and_tells_its_error() -> None:
    whole, cut = share(1, 0.5), share(6, 2.0, truncated=True, seed=2)
    u, s, v = torch.linalg.svd(product(cut), full_matrices=False)
    nearest = (u[:, :3] * s[:3]) @ v[:3]
    assert torch.allclose(change(whole, cut), product(whole) + nearest, atol=1e-4)
    error = packed((), [whole, cut], LAYOUTS, DTYPES).error
    assert error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)


def test_several_that_are_truncated_share_what_is_left() -> None:
    cut = [share(4, 1.0, truncated=True, seed=seed) for seed in (2, 3)]
    u, s, v = torch.linalg.svd(product(cut[0]) + product(cut[1]), full_matrices=False)
    assert torch.allclose(change(*cut), (u[:, :4] * s[:4]) @ v[:4], atol=1e-4)


def test_what_fits_is_not_truncated() -> None:
    one, other = share(2, truncated=True), share(2, seed=2)
    assert torch.allclose(change(one, other), product(one) + product(other), atol=1e-5)
    assert packed((), [one, other], LAYOUTS, DTYPES).error == 0


def test_the_rank_that_is_needed() -> None:
    layout = LAYOUTS["unet"]
    assert required_rank([share(2), share(3)], layout, "unet") == 5
    assert required_rank([share(4), share(9, truncated=True)], layout, "unet") == 5
    assert required_rank([share(3), share(9, truncated=True)], layout, "unet") == 4
    assert required_rank([share(3)], LAYOUTS["text_encoder"], "text_encoder") == 0


def test_what_overflows_in_half_precision_is_refused() -> None:
    half = dict.fromkeys(LAYOUTS, torch.float16)
    with pytest.raises(ValueError, match=r"overflows in torch\.float16; give it a smaller weight"):
        packed((), [share(1, 1e6)], LAYOUTS, half)


def test_another_familys_layers_and_widths_are_named() -> None:
    down, up = pair(2, 6, 8)
    with pytest.raises(ValueError, match=rf"other widths: {TO_Q} \(7 to 8, and not 6 to 8\)"):
        PLACES.fit(LoraFile("", {Q: LoraModule(torch.ones(2, 7), up, 1.0)}))
    strange = [Place("unet", f"layer_{number}") for number in range(7)]
    with pytest.raises(
        ValueError, match=r"7 of 8 layers that no adapter .*: unet\.layer_0, .*unet\.layer_4 and 2 more"
    ):
        PLACES.fit(LoraFile("", {place: LoraModule(down, up, 1.0) for place in (*strange, Q)}))


def test_the_original_unets_names_are_those_that_diffusers_gives_them() -> None:
    from types import SimpleNamespace

    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers as mapped

    paths = [
        *(f"down_blocks.{block}.attentions.{at}.proj_in" for block in (1, 2) for at in (0, 1)),
        "mid_block.attentions.0.proj_in",
        *(f"up_blocks.{block}.attentions.{at}.proj_in" for block in (0, 1) for at in (0, 1, 2)),
    ]
    layout = layout_of([[Layer(path, LINEAR, 4, 4)] for path in paths], 1, 2)
    places = Places({"unet": layout})
    original = [
        *(f"input_blocks_{number}_1_proj_in" for number in (4, 5, 7, 8)),
        "middle_block_1_proj_in",
        *(f"output_blocks_{number}_1_proj_in" for number in range(6)),
    ]
    module = LoraModule(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    for path, name in zip(paths, original, strict=True):
        assert list(places.fit(LoraFile("", {Place("unet", name): module}))["unet"]) == [path]
        (theirs,) = mapped({f"lora_unet_{name}.alpha": 1}, SimpleNamespace(layers_per_block=2))
        for block, ours in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            theirs = theirs.replace(block, ours)  # which it does elsewhere
        assert theirs == f"lora_unet_{path.replace('.', '_')}.alpha"
