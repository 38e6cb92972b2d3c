"""Profiles cover every size with the rows that are bounded for it, and never more."""

from __future__ import annotations

import itertools

import pytest

from diffuserve.manifest import TensorShape
from diffuserve.profiles import Profile, Range
from diffuserve.spec import TEXT_ENCODER, UNET, VAE_DECODER
from diffuserve_export import OptionError
from diffuserve_export.engines import EngineOptions, engine_profiles
from diffuserve_export.engines.options import TENSORRT, TENSORRT_RTX
from diffuserve_export.engines.profiles import ROW_BUCKETS, ShapeRanges, tensor_shapes

LATENTS = TensorShape("sample", "FP16", ("rows", 4, "latent_height", "latent_width"))
UNET_INPUTS = (
    LATENTS,
    TensorShape("timestep", "FP32", ("rows",)),
    TensorShape("encoder_hidden_states", "FP16", ("rows", "tokens", 768)),
)


def ranges(opt: int = 512, most: int = 1536, rows: int = 64, least: int = 256) -> ShapeRanges:
    return ShapeRanges(Range(least, opt, most, 64), Range(1, min(8, rows), rows), 8, 77, {})


def most_rows(profiles: tuple[Profile, ...], height: int, width: int) -> int:
    sides = {"latent_height": height // 8, "latent_width": width // 8}
    return max((one.sides["rows"].max for one in profiles if one.takes(sides)), default=0)


@pytest.mark.parametrize("opt", [512, 768, 1024])
@pytest.mark.parametrize("rows", [64, 12, 4, 1])
def test_every_size_has_the_rows_that_its_pixels_allow(opt: int, rows: int) -> None:
    profiles = engine_profiles(UNET, UNET_INPUTS, ranges(opt, rows=rows))
    for height, width in itertools.product(range(256, 1537, 64), repeat=2):
        found = most_rows(profiles, height, width)
        assert 1 <= found <= rows
        assert found * height * width <= 64 * 512 * 512
    assert most_rows(profiles, 512, 512) == min(64, rows)
    assert most_rows(profiles, 1024, 1024) == min(16, rows)
    assert most_rows(profiles, 1536, 1536) == min(4, rows)


def test_the_checkpoints_own_size_is_what_an_engine_is_tuned_for() -> None:
    for opt in (512, 768, 1024):
        profiles = engine_profiles(UNET, UNET_INPUTS, ranges(opt))
        assert opt // 8 in {one.sides["latent_height"].opt for one in profiles}
    assert most_rows(engine_profiles(UNET, UNET_INPUTS, ranges(768)), 768, 768) == 28
    decoder = engine_profiles(VAE_DECODER, (LATENTS,), ranges(1024))
    assert [one.sides["latent_height"] for one in decoder] == [Range(32, 64, 64, 8), Range(32, 128, 192, 8)]
    assert [one.sides["rows"].max for one in decoder] == [4, 1]


def test_larger_pictures_than_the_bounds_name_have_fewer_rows() -> None:
    profiles = engine_profiles(UNET, UNET_INPUTS, ranges(1024, most=3072))
    assert most_rows(profiles, 3072, 3072) == 1


def test_few_rows_need_no_stairs() -> None:
    assert len(engine_profiles(UNET, UNET_INPUTS, ranges(rows=4))) == 1
    assert len(engine_profiles(UNET, UNET_INPUTS, ranges())) == 3
    small = ShapeRanges(Range(32, 64, 192, 16), Range(1, 8, 64), 8, 77, {})
    (only,) = engine_profiles(UNET, UNET_INPUTS, small)
    assert (only.sides["rows"].max, only.sides["latent_height"]) == (64, Range(4, 8, 24, 2))


def test_the_text_encoder_has_rows_and_vectors_for_every_token_in_them() -> None:
    inputs = (TensorShape("input_ids", "INT32", ("rows", 77)), TensorShape("embeddings", "FP16", ("vectors", 768)))
    (only,) = engine_profiles(TEXT_ENCODER, inputs, ranges())
    assert only.sides == {"rows": Range(1, 8, 64), "vectors": Range(1, 1, 64 * 75)}


def test_static_profiles_come_first_and_each_is_one_shape() -> None:
    profiles = engine_profiles(UNET, UNET_INPUTS, ranges(rows=12), cuda_graphs=True)
    static = [one for one in profiles if one.is_static]
    assert [one.sides["rows"].max for one in static] == [2, 4, 6, 8, 12]
    assert list(profiles[: len(static)]) == static
    shapes = tensor_shapes(UNET_INPUTS, static[0])
    assert shapes["sample"] == ((2, 4, 64, 64),) * 3
    assert shapes["encoder_hidden_states"] == ((2, 77, 768),) * 3
    assert not [one for one in engine_profiles(VAE_DECODER, (LATENTS,), ranges(), cuda_graphs=True) if one.is_static]
    assert max(ROW_BUCKETS) == 64


def test_shapes_are_in_the_inputs_order() -> None:
    (profile,) = engine_profiles(UNET, UNET_INPUTS, ranges(rows=4))
    assert tensor_shapes(UNET_INPUTS, profile) == {
        "sample": ((1, 4, 32, 32), (4, 4, 64, 64), (4, 4, 192, 192)),
        "timestep": ((1,), (4,), (4,)),
        "encoder_hidden_states": ((1, 77, 768), (4, 77, 768), (4, 462, 768)),
    }


def test_a_side_without_a_range_is_named() -> None:
    inputs = (*UNET_INPUTS, TensorShape("lora", "FP16", ("adapters", 100)))
    with pytest.raises(OptionError, match="unet has sides without a range: adapters"):
        engine_profiles(UNET, inputs, ranges())
    given = ShapeRanges(Range(256, 512, 512, 64), Range(1, 4, 4), 8, 77, {"adapters": Range(1, 4, 8)})
    assert engine_profiles(UNET, inputs, given)[0].sides["adapters"] == Range(1, 4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capability": "90"}, r"compute-capability has '90', and TensorRT-RTX builds for 75,80,86,89,120,121"),
        ({"compute_capability": "80,"}, "compute-capability has ''"),
        ({"compute_capability": "all"}, "compute-capability has 'all'"),
        ({"workspace_gb": -1.0}, "workspace is -1 GB"),
        ({"memory_budget_gb": 0.0}, "memory-budget 0 GB"),
        ({"provider": "rocm"}, "provider is 'rocm', and must be one of cuda, tensorrt"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EngineOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "options", "name"),
    [
        (TENSORRT, {"compute_capability": "89"}, "compute-capability"),
        (TENSORRT_RTX, {"cuda_graphs": True}, "cuda-graphs"),
        ("onnxruntime-cpu", {"workspace_gb": 1.0}, "workspace"),
        (TENSORRT, {"provider": "tensorrt"}, "provider"),
    ],
)
def test_an_option_without_use_is_refused(target: str, options: dict[str, object], name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is given, and the target {target} has no use for it"):
        EngineOptions(**options).check_target(target)  # type: ignore[arg-type]


def test_capabilities_are_sorted_and_each_there_once() -> None:
    assert EngineOptions(compute_capability="120,8.9, 80,89").capabilities == ("8.0", "8.9", "12.0")
