"""Components that fail and bugs in the loop, on a real server: the affected get an error, the rest is served."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import (
    Client,
    ComponentFailedError,
    DiffuserveError,
    InternalError,
    InvalidArgumentError,
    Retry,
    Timeout,
)

ROOT = Path(__file__).parents[2]

# A UNet that fails, or answers with too few rows, for a request that says so by its size.
UNET = """
import triton_python_backend_utils as pb_utils
from diffuserve.onnx_component import OnnxComponentModel


class TritonPythonModel(OnnxComponentModel):
    def execute(self, requests):
        (request,) = requests
        sample = pb_utils.get_input_tensor_by_name(request, "sample").as_numpy()
        timestep = pb_utils.get_input_tensor_by_name(request, "timestep").as_numpy()
        midway = timestep.min() < 500
        if sample.shape[2] == 12 and midway:
            raise MemoryError("the engine ran out of memory")
        if sample.shape[2] == 10 and midway:
            return [pb_utils.InferenceResponse([pb_utils.Tensor("model_output", sample[:1])])]
        return super().execute(requests)
"""
# The public model with a bug: deciding what to step next raises once, at the tenth decision.
DIFFUSION = """
from diffuserve.engine import StepPolicy
from diffuserve.triton import DiffusionModel as TritonPythonModel

choose, calls = StepPolicy.choose, []


def choose_with_a_bug(self, candidates, now):
    calls.append(now)
    if len(calls) == 10:
        raise ZeroDivisionError("a bug in a decision")
    return choose(self, candidates, now)


StepPolicy.choose = choose_with_a_bug
"""


@pytest.fixture(scope="module")
def failing_server(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    root = tmp_path_factory.mktemp("failing")
    shutil.copytree(deployment, root / "shapes")
    (root / "shapes" / "models" / "shapes_unet" / "1" / "model.py").write_text(UNET, encoding="utf-8")
    shutil.copytree(ROOT / "model_repository", root / "repository")
    (root / "repository" / "diffusion" / "1" / "model.py").write_text(DIFFUSION, encoding="utf-8")
    options = ServerOptions(
        deployment=root / "shapes",
        model_repository=root / "repository",
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=root / "triton.log",
    )
    with TritonServer(options) as server:
        server.wait_ready()
        yield server
    assert "Exit timeout expired" not in (root / "triton.log").read_text(encoding="utf-8")


def _outcome(client: Client, **parameters: Any) -> DiffuserveError | None:
    try:
        client.generate("a circle", **parameters)
    except DiffuserveError as error:
        return error
    return None


def test_every_affected_request_ends_in_an_error_and_the_rest_in_a_picture(failing_server: TritonServer) -> None:
    with Client(failing_server.grpc_url, timeout=Timeout(total=60), retry=Retry(retries=0)) as client:
        # The bug comes first, while this request is the only one.
        bug = _outcome(client, steps=20)
        assert isinstance(bug, InternalError)
        assert "a bug in a decision" in str(bug)

        sizes = [64, 96, 80, 64, 96, 80, 64]
        with ThreadPoolExecutor(len(sizes)) as pool:
            outcomes = list(pool.map(lambda size: _outcome(client, steps=8, width=size, height=size), sizes))
        for size, outcome in zip(sizes, outcomes, strict=True):
            if size == 64:
                assert outcome is None
            else:
                assert isinstance(outcome, ComponentFailedError)
                assert "shapes_unet" in str(outcome)
        assert "out of memory" in str(outcomes[1])
        assert "rows" in str(outcomes[2])
        assert isinstance(_outcome(client, width=63), InvalidArgumentError)
        assert _outcome(client, steps=2) is None
