"""config.pbtxt of the GPU targets, as protobuf.

Every model has one instance, on the first GPU that the server sees: plans are not shared between instances, and one
denoising loop owns one GPU. A machine with several runs a server for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tritonclient.grpc import model_config_pb2

from diffuserve.manifest import TensorShape
from diffuserve.profiles import Profile
from diffuserve_export.component_model import tensor_config
from diffuserve_export.engines.profiles import tensor_shapes
from diffuserve_export.ports import Ports

__all__ = ["onnxruntime_config", "plan_config", "rtx_config"]

_ENGINE_CACHE: Final = "/tmp/diffuserve-onnxruntime-tensorrt"


def plan_config(name: str, ports: Ports, profiles: Sequence[Profile]) -> Any:
    """A TensorRT plan in Triton's TensorRT backend: a context for each profile, CUDA graphs for the static ones."""
    config = _gpu_config(name, ports, profiles)
    config.platform, config.backend = "tensorrt_plan", "tensorrt"
    config.default_model_filename = "model.plan"
    config.instance_group[0].profile.extend(str(index) for index in range(len(profiles)))
    # Else each context would reserve what the largest profile needs.
    config.parameters["execution_context_allocation_strategy"].string_value = "ON_PROFILE_CHANGE"
    for profile in profiles:
        if profile.is_static:
            _add_graph(config.optimization.cuda, tensor_shapes(ports[0], profile))
    return config


def rtx_config(name: str, ports: Ports, profiles: Sequence[Profile]) -> Any:
    """A TensorRT-RTX engine in the Python backend, which is given its inputs where they are."""
    config = _gpu_config(name, ports, profiles)
    config.backend = "python"
    config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "no"
    return config


def onnxruntime_config(
    name: str, ports: Ports, profiles: Sequence[Profile], provider: str, workspace_bytes: int = 0
) -> Any:
    """An ONNX graph in Triton's ONNX Runtime backend, with the CUDA or the TensorRT provider."""
    config = _gpu_config(name, ports, profiles)
    config.platform, config.backend = "onnxruntime_onnx", "onnxruntime"
    config.default_model_filename = "model.onnx"
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add()
    accelerator.name = provider
    parameters = {"cuda": _cuda_parameters, "tensorrt": _tensorrt_parameters}[provider]
    accelerator.parameters.update(parameters(ports[0], profiles))
    if provider == "tensorrt" and workspace_bytes:
        accelerator.parameters["max_workspace_size_bytes"] = str(workspace_bytes)
    return config


def _cuda_parameters(inputs: Sequence[TensorShape], profiles: Sequence[Profile]) -> dict[str, str]:  # noqa: ARG001
    # Calls come in many shapes, and an exhaustive search would be made anew for each.
    return {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}


def _tensorrt_parameters(inputs: Sequence[TensorShape], profiles: Sequence[Profile]) -> dict[str, str]:
    """Engines are built at the first start, for the same profiles as a plan's, and kept."""
    shapes = [tensor_shapes(inputs, profile) for profile in profiles]
    texts = {
        f"trt_profile_{bound}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, bounds[index]))}" for one in shapes for name, bounds in one.items()
        )
        for index, bound in enumerate(("min", "opt", "max"))
    }
    return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": _ENGINE_CACHE, **texts}


def _gpu_config(name: str, ports: Ports, profiles: Sequence[Profile]) -> Any:
    config = model_config_pb2.ModelConfig(name=name, max_batch_size=0)
    kind = model_config_pb2.ModelInstanceGroup.KIND_GPU
    config.instance_group.append(model_config_pb2.ModelInstanceGroup(count=1, kind=kind, gpus=[0]))
    for which, tensors in (("input", ports[0]), ("output", ports[1])):
        for port in tensors:
            shape = [side if isinstance(side, int) else -1 for side in port.shape]
            tensor_config(config, which, port.name, port.datatype, shape)
    for index, profile in enumerate(profiles):
        _add_warmup(config, f"profile_{index}", ports[0], profile)
    return config


def _add_warmup(config: Any, name: str, inputs: Sequence[TensorShape], profile: Profile) -> None:
    """A call at the profile's opt shape before the model is ready. Zero is a valid token, timestep and latent."""
    warmup = config.model_warmup.add(name=name, batch_size=1, count=1)
    shapes = tensor_shapes(inputs, profile)
    for one in inputs:
        tensor = warmup.inputs[one.name]
        tensor.data_type = model_config_pb2.DataType.Value(f"TYPE_{one.datatype}")
        tensor.dims.extend(shapes[one.name][1])
        tensor.zero_data = True


def _add_graph(cuda: Any, shapes: dict[str, tuple[tuple[int, ...], ...]]) -> None:
    cuda.graphs = True
    spec = cuda.graph_spec.add(batch_size=0)
    for name, (_, opt, _) in shapes.items():
        spec.input[name].dim.extend(opt)
