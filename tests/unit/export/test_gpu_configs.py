"""config.pbtxt of the GPU targets, parsed back as Triton parses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from diffuserve.manifest import TensorShape
from diffuserve.profiles import EngineFacts, Profile, Range
from diffuserve.spec import UNET
from diffuserve_export import ExportError
from diffuserve_export.component_model import write_config
from diffuserve_export.engines import engine_profiles
from diffuserve_export.engines.configs import onnxruntime_config, plan_config, rtx_config
from diffuserve_export.engines.model import check_memory
from diffuserve_export.engines.profiles import ShapeRanges

LATENTS = ("rows", 4, "latent_height", "latent_width")
INPUTS = (
    TensorShape("sample", "FP16", LATENTS),
    TensorShape("timestep", "FP32", ("rows",)),
    TensorShape("encoder_hidden_states", "BF16", ("rows", "tokens", 768)),
)
PORTS = (INPUTS, (TensorShape("model_output", "FP16", LATENTS),))
RANGES = ShapeRanges(Range(256, 512, 1536, 64), Range(1, 8, 64), 8, 77, {})
PROFILES = engine_profiles(UNET, INPUTS, RANGES)
KIND_GPU = model_config_pb2.ModelInstanceGroup.KIND_GPU


def parsed(config: Any, folder: Path) -> Any:
    write_config(folder, config)
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def all_configs() -> list[Any]:
    return [
        plan_config("x_unet", PORTS, PROFILES),
        rtx_config("x_unet", PORTS, PROFILES),
        onnxruntime_config("x_unet", PORTS, PROFILES, "cuda"),
        onnxruntime_config("x_unet", PORTS, PROFILES, "tensorrt", workspace_bytes=1 << 30),
    ]


@pytest.mark.parametrize("config", all_configs(), ids=lambda one: one.backend)
def test_every_target_has_the_same_tensors_and_one_instance(config: Any, tmp_path: Path) -> None:
    config = parsed(config, tmp_path)
    assert (config.name, config.max_batch_size) == ("x_unet", 0)
    types = [model_config_pb2.DataType.Name(one.data_type) for one in (*config.input, *config.output)]
    assert types == ["TYPE_FP16", "TYPE_FP32", "TYPE_BF16", "TYPE_FP16"]
    assert {one.name: list(one.dims) for one in (*config.input, *config.output)} == {
        "sample": [-1, 4, -1, -1],
        "timestep": [-1],
        "encoder_hidden_states": [-1, -1, 768],
        "model_output": [-1, 4, -1, -1],
    }
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.gpus)) == (1, KIND_GPU, [0])


@pytest.mark.parametrize("config", all_configs(), ids=lambda one: one.backend)
def test_every_profile_is_warmed_up(config: Any, tmp_path: Path) -> None:
    warmups = parsed(config, tmp_path).model_warmup
    assert len(warmups) == len(PROFILES) == 3
    assert [one.batch_size for one in warmups] == [1, 1, 1]
    assert [list(one.inputs["sample"].dims) for one in warmups] == [
        [8, 4, 64, 64],
        [8, 4, 128, 128],
        [4, 4, 192, 192],
    ]
    assert all(tensor.zero_data for one in warmups for tensor in one.inputs.values())


def test_a_plan_has_a_context_for_each_profile(tmp_path: Path) -> None:
    config = parsed(plan_config("x_unet", PORTS, PROFILES), tmp_path)
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert list(config.instance_group[0].profile) == ["0", "1", "2"]
    assert config.parameters["execution_context_allocation_strategy"].string_value == "ON_PROFILE_CHANGE"
    assert not config.optimization.cuda.graphs


def test_cuda_graphs_are_captured_for_the_static_profiles(tmp_path: Path) -> None:
    profiles = engine_profiles(UNET, INPUTS, RANGES, cuda_graphs=True)
    config = parsed(plan_config("x_unet", PORTS, profiles), tmp_path)
    cuda = config.optimization.cuda
    assert cuda.graphs
    assert len(config.instance_group[0].profile) == len(profiles)
    assert [one.input["sample"].dim[0] for one in cuda.graph_spec] == [2, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert {name: list(shape.dim) for name, shape in cuda.graph_spec[1].input.items()} == {
        "sample": [4, 4, 64, 64],
        "timestep": [4],
        "encoder_hidden_states": [4, 77, 768],
    }


def test_the_rtx_component_is_given_tensors_where_they_are(tmp_path: Path) -> None:
    config = parsed(rtx_config("x_unet", PORTS, PROFILES), tmp_path)
    assert config.backend == "python"
    assert config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"


def test_onnx_runtime_has_its_providers_options(tmp_path: Path) -> None:
    config = parsed(onnxruntime_config("x_unet", PORTS, PROFILES, "cuda"), tmp_path)
    assert (config.platform, config.backend) == ("onnxruntime_onnx", "onnxruntime")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "cuda"
    assert accelerator.parameters["cudnn_conv_algo_search"] == "HEURISTIC"


def test_the_tensorrt_provider_has_the_plans_profiles(tmp_path: Path) -> None:
    config = parsed(onnxruntime_config("x_unet", PORTS, PROFILES, "tensorrt", 1 << 30), tmp_path)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["max_workspace_size_bytes"] == str(1 << 30)
    assert accelerator.parameters["trt_engine_cache_enable"] == "1"
    assert accelerator.parameters["trt_profile_max_shapes"].split(",")[:3] == [
        "sample:64x4x64x64",
        "timestep:64",
        "encoder_hidden_states:64x462x768",
    ]
    assert accelerator.parameters["trt_profile_min_shapes"].count("sample:1x4x32x32") == 3


def engine(weights: int, activation: int) -> EngineFacts:
    profile = Profile({"rows": Range(1, 2, 4)}, activation)
    facts = {"builder": "tensorrt", "version": "10.13.0", "precision": "fp16", "onnx_sha256": "", "sha256": ""}
    return EngineFacts(**facts, devices=("8.9",), profiles=(profile,), bytes=weights)  # type: ignore[arg-type]


def test_engines_that_need_more_than_the_budget_are_refused() -> None:
    engines = {"unet": engine(5_000_000_000, 9_000_000_000), "vae_decoder": engine(200_000_000, 3_000_000_000)}
    check_memory(engines, 17.3)
    with pytest.raises(
        ExportError,
        match=r"need 17\.20 GB .* \(unet 14\.00, vae_decoder 3\.20\), and the budget is 16 GB",
    ):
        check_memory(engines, 16)
