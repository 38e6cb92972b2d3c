"""What tests of the whole way share: the exported reference checkpoint, and a real Triton that serves it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine must not fail a property: how long an example took says nothing of it.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others, which have the other cores
    import torch

    torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "shapes"


@pytest.fixture(scope="session")
def deployment() -> Path:
    """The shapes deployment; made once, and again when the checkpoint or the export changes."""
    from diffuserve_export import ExportOptions, export_checkpoint

    out = ROOT / "build" / "deployments" / "shapes"
    export_checkpoint(ExportOptions(checkpoint=str(CHECKPOINT), out=out))
    return out


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder of textual inversions, which is empty when it starts."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="session")
def server(deployment: Path, embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Triton on free ports of loopback, ready."""
    from diffuserve.server import ServerOptions, TritonServer
    from diffuserve.server.snapshot_key import with_snapshot_key

    log = tmp_path_factory.mktemp("triton") / "triton.log"
    options = ServerOptions(
        deployment=deployment, embeddings=embeddings, http_port=0, grpc_port=0, metrics_port=0, log_file=log
    )
    with TritonServer(with_snapshot_key(options)) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shapes checkpoint's own LoRAs, to which tests may add.

    Their names are all of one kind: of a file that mixes `lora_A` with `lora.down`, diffusers leaves layers out.
    """
    from safetensors.torch import load_file

    from integration.lora_cases import put_lora

    def name(key: str) -> str:
        for old in (".lora_linear_layer.", ".lora."):
            key = key.replace(f"{old}down.", ".lora_A.").replace(f"{old}up.", ".lora_B.")
        return key

    folder = tmp_path_factory.mktemp("registry") / "loras"
    for path in (ROOT / "checkpoints" / "shapes-loras").glob("*.safetensors"):
        put_lora(folder, path.stem, {name(key): tensor for key, tensor in load_file(path).items()})
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small checkpoints of every family, each made when it is first asked for."""
    from integration.families import Families

    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def lora_deployment(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shapes checkpoint as `sd15`, with adapters of rank 8; made once, and again when it or the export changes."""
    from integration.families import Families, exported_families

    families, out = Families(tmp_path_factory.mktemp("with-loras")), ROOT / "build" / "deployments" / "lora"
    return exported_families(families, ["sd15"], out, deployment, lora_rank=8)


@pytest.fixture(scope="session")
def client(server: Any) -> Iterator[Any]:
    from diffuserve_client import Client, Retry

    with Client(server.grpc_url, retry=Retry(retries=0)) as client:
        yield client


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other in loops: of models as small as these that is most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quiet_diffusers() -> Iterator[None]:
    """Some schedulers say on every table what they adjust."""
    import diffusers

    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(before)


@pytest.fixture(scope="session")
def pipeline() -> Any:
    """diffusers' own pipeline on the same checkpoint, float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """moto's S3 server on loopback: an S3Server."""
    from s3_server import S3Server

    with S3Server() as server:
        yield server
