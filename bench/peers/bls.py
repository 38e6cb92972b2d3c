"""(c) One denoising loop a request inside Triton, calling the components by business logic scripting (BLS).

Both variants run on the same Triton, the same exported graphs and the same wire as this service, and are called by
the same client.

(c1) `bls_batched` is the design at its best. All requests' loops run at once, as coroutines with `async_exec`, and the
UNet stands behind Triton's dynamic batcher. That needs a UNet whose timestep is given per row, which the published
ones do not have: theirs is one number a call, so that calls of different requests cannot be joined.

(c2) `bls_published` is what can be downloaded: part 6 of Triton's conceptual guide (triton-inference-server/tutorials,
Conceptual_Guide/Part_6-building_complex_pipelines, whose pipeline model runs one request's loop after the other in
`execute`, with BLS calls to the text encoder and the VAE and the UNet in its own process), in the form with the UNet as
an ONNX component too (kamalkraj/stable-diffusion-tritonserver: `max_batch_size: 0` and one timestep a call). One
instance of the pipeline, one UNet call a step with the rows of one request.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tritonclient.grpc import model_config_pb2

from diffuserve.manifest import Component, Deployment
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.spec import UNET
from diffuserve.wire import MODEL_NAME
from diffuserve_client import Client, GeneratedImage, GenerateRequest, Timeout
from diffuserve_export.component_model import config_text, new_config, tensor_config
from peers.common import Places, Serve

__all__ = ["bls_batched", "bls_published"]

_BENCH: Final = Path(__file__).resolve().parents[1]
_PUBLIC_CONFIG: Final = _BENCH.parent / "model_repository" / MODEL_NAME / "config.pbtxt"
_PATIENCE: Final = Timeout(total=3600, stall=3600)


@contextmanager
def bls_batched(places: Places) -> Iterator[Serve]:
    with _served(places, "ConcurrentLoops", batched=True) as serve:
        yield serve


@contextmanager
def bls_published(places: Places) -> Iterator[Serve]:
    with _served(places, "OneLoop", batched=False) as serve:
        yield serve


@contextmanager
def _served(places: Places, pipeline: str, *, batched: bool) -> Iterator[Serve]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = ServerOptions(
            deployment=_write_deployment(places.deployment.absolute(), root / "deployment", batched=batched),
            model_repository=_write_pipeline(root / "pipeline", pipeline),
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            log_file=root / "triton.log",
        )
        with TritonServer(options) as server, Client(server.grpc_url, timeout=_PATIENCE) as client:
            server.wait_ready()

            def serve(request: GenerateRequest) -> GeneratedImage:
                return client.generate(request).images[0]

            yield serve


def _write_pipeline(repository: Path, name: str) -> Path:
    """The public model, with the peer's loop in place of the service."""
    model = repository / MODEL_NAME
    (model / "1").mkdir(parents=True)
    shutil.copy(_PUBLIC_CONFIG, model / "config.pbtxt")
    _write_model(model / "1", "peers.bls_pipeline", name)
    return repository


def _write_model(version: Path, module: str, name: str) -> None:
    """Triton's stubs read no PYTHONPATH, so the file says where the peers are."""
    lines = ("import sys", f"sys.path.append({str(_BENCH)!r})", f"from {module} import {name} as TritonPythonModel", "")
    (version / "model.py").write_text("\n".join(lines), encoding="utf-8")


def _write_deployment(original: Path, copy: Path, *, batched: bool) -> Path:
    """The same deployment by links, its UNet behind the dynamic batcher where that is wanted."""
    deployment = Deployment.load(original)
    unet = deployment.manifest(deployment.checkpoints[0]).components[UNET]
    (copy / "models").mkdir(parents=True)
    shutil.copy(original / Deployment.FILE, copy)
    (copy / "checkpoints").symlink_to(original / "checkpoints")
    for model in sorted(deployment.models.iterdir()):
        if batched and model.name == unet.model:
            _write_batched(model, copy / "models" / model.name, unet, deployment)
        else:
            (copy / "models" / model.name).symlink_to(model)
    return copy


def _write_batched(original: Path, folder: Path, unet: Component, deployment: Deployment) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").symlink_to(original / "1" / "model.onnx")
    _write_model(folder / "1", "peers.bls_unet", "BatchedUnet")
    rows = deployment.manifest(deployment.checkpoints[0]).rows.max
    (folder / "config.pbtxt").write_text(config_text(_batched_config(unet, rows)), encoding="utf-8")


def _batched_config(unet: Component, rows: int) -> Any:
    """Triton adds the first dimension itself, and each tensor needs one more: a timestep is [rows, 1]."""
    config = new_config(unet.model)
    config.max_batch_size = rows
    # Without a wait the first loop to come back runs alone while the others follow it: more calls, fewer rows each.
    config.dynamic_batching.CopyFrom(model_config_pb2.ModelDynamicBatching(max_queue_delay_microseconds=3000))
    for kind, tensors in (("input", unet.inputs), ("output", unet.outputs)):
        for one in tensors:
            sides = [side if isinstance(side, int) else -1 for side in one.shape[1:]]
            tensor_config(config, kind, one.name, one.datatype, sides or [1])
    config.parameters["intra_op_num_threads"].string_value = "0"
    return config
