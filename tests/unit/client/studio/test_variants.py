"""What `compare` compares: combinations, their limit, and which is measured against which."""

from __future__ import annotations

import pytest

from diffuserve_client import GenerateRequest, InvalidArgumentError
from diffuserve_client._studio.variants import MAX_PICTURES, Plan, Variant, loras_of


def test_every_combination_is_a_variant_in_the_order_of_the_values() -> None:
    plan = Plan.of({"prompt": ["a", "b"], "sampler": ["ddim", "euler"], "steps": [4]}, [7, 8])
    assert plan.variants == (
        Variant(prompt="a", sampler="ddim", steps=4),
        Variant(prompt="a", sampler="euler", steps=4),
        Variant(prompt="b", sampler="ddim", steps=4),
        Variant(prompt="b", sampler="euler", steps=4),
    )
    assert plan.varying == ("prompt", "sampler")


def test_a_variant_is_a_request() -> None:
    variant = Variant(prompt="a", checkpoint="c", sampler="ddim", lora="night:0.8 + bar", steps=4, guidance_scale=2.5)
    assert variant.request(7, {"width": 96}) == GenerateRequest(
        prompt="a",
        checkpoint="c",
        sampler="ddim",
        loras=("night:0.8", "bar"),
        steps=4,
        guidance_scale=2.5,
        seed=7,
        width=96,
    )
    assert loras_of("none") == loras_of(None) == ()


@pytest.mark.parametrize(
    ("axes", "baseline", "expected"),
    [
        ({"prompt": ["a", "b"]}, [], (0, 0)),
        ({"prompt": ["a"], "sampler": ["x", "y", "z"]}, [], (0, 0, 0)),
        ({"prompt": ["a"], "sampler": ["x", "y", "z"]}, ["2"], (1, 1, 1)),
        ({"prompt": ["a", "b"], "sampler": ["x", "y"]}, [], (0, 0, 2, 2)),
        ({"prompt": ["a", "b"], "sampler": ["x", "y"]}, ["3"], (2, 2, 2, 2)),
        ({"prompt": ["a", "b"], "sampler": ["x", "y"]}, ["sampler=y"], (1, 1, 3, 3)),
        ({"prompt": ["a", "b"], "sampler": ["x", "y"]}, ["prompt=b"], (2, 3, 2, 3)),
        ({"prompt": ["a"], "steps": [4, 8], "guidance_scale": [1.5, 3.0]}, ["guidance-scale=3", "steps=8"], (3,) * 4),
    ],
)
def test_the_baseline(axes: dict[str, list[object]], baseline: list[str], expected: tuple[int, ...]) -> None:
    assert Plan.of(axes, [0], baseline).baselines == expected


@pytest.mark.parametrize(
    ("axes", "seeds", "baseline", "said"),
    [
        ({"prompt": ["a"]}, 1, ["2"], "the baseline is '2', and must be a variant's number, from 1 to 1"),
        ({"prompt": ["a"]}, 1, ["-1"], "the baseline is '-1'"),
        ({"prompt": ["a"]}, 1, ["cfg=1"], "the baseline 'cfg=1' names no axis; write one of prompt, checkpoint"),
        ({"prompt": ["a"], "sampler": ["x"]}, 1, ["sampler=y"], "'sampler=y' is not among what is compared: x; give"),
        ({"prompt": ["a"]}, 1, ["sampler=y"], "is not among what is compared: no value of it"),
        ({"prompt": ["a"], "steps": [4]}, 1, ["steps=many"], "is not among what is compared: 4"),
        ({"prompt": ["a"], "sampler": ["x", "x"]}, 1, [], "the sampler 'x' is given twice; give it once"),
        (
            {"prompt": ["a", "b"], "sampler": ["x", "y", "z"]},
            43,
            [],
            f"2 of prompt x 3 of sampler x 43 seeds are 258 pictures, and at most {MAX_PICTURES} are compared",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    axes: dict[str, list[object]], seeds: int, baseline: list[str], said: str
) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Plan.of(axes, range(seeds), baseline)
    assert said in raised.value.message


def test_a_product_that_is_far_too_large_is_not_made_first() -> None:
    many = list(range(1, 1000))
    with pytest.raises(InvalidArgumentError, match="at most 256"):
        Plan.of({"prompt": ["a"], "steps": many, "guidance_scale": many, "sampler": list(map(str, many))}, range(10**9))
