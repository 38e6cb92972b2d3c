"""Triton's side of the runtime over a stand-in for its Python module: what cannot be tried without a GPU."""

from __future__ import annotations

import http.server
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from diffuserve.errors import ComponentFailedError, InternalError, InvalidArgumentError
from diffuserve.logs import JsonFormatter
from diffuserve.manifest import Component, TensorShape
from diffuserve.request import Event
from diffuserve.telemetry import Telemetry
from diffuserve.wire import Operation
from unit.fake_backend import Tensor
from unit.fakes import Recorder, Unreachable

#: Those that import Triton's.
MODULES = ("diffuserve.triton", "diffuserve.bls", "diffuserve.triton_metrics", "diffuserve.triton_reply")
UNET = Component("shapes_unet", (), (TensorShape("model_output", "FP32", ("rows",)),), "", 0)


class InferenceRequest:
    """Answers each output with ones in the CPU's memory, or with an `errors`, and keeps what it was made with."""

    made: list[dict[str, Any]]
    errors: list[str]

    def __init__(self, **options: Any) -> None:
        InferenceRequest.made.append(options)

    def exec(self) -> Any:
        if InferenceRequest.errors:
            text = InferenceRequest.errors.pop(0)
            error = SimpleNamespace(message=lambda: text)
            return SimpleNamespace(has_error=lambda: True, error=lambda: error)
        outputs = [Tensor(name, torch.ones(2)) for name in InferenceRequest.made[-1]["requested_output_names"]]
        return SimpleNamespace(has_error=lambda: False, output_tensors=lambda: outputs)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stand_in = ModuleType("triton_python_backend_utils")
    InferenceRequest.made, InferenceRequest.errors = [], []
    vars(stand_in).update(
        Tensor=Tensor,
        InferenceRequest=InferenceRequest,
        TRITONSERVER_MEMORY_GPU="gpu",
        PreferredMemory=lambda kind, device: (kind, device),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("diffuserve.triton")
    for name in MODULES:
        sys.modules.pop(name, None)


def opened(triton: Any, device: torch.device) -> Any:
    runner = triton.BlsRunner(device)
    runner.open()
    return runner


def test_outputs_on_the_cpu_are_taken_as_they_come(triton: Any) -> None:
    outputs = opened(triton, torch.device("cpu")).run(UNET, {"sample": torch.zeros(2)})
    assert torch.equal(outputs["model_output"], torch.ones(2))
    assert "preferred_memory" not in InferenceRequest.made[0]
    assert InferenceRequest.made[0]["parameters"] == {}


def test_a_gpu_is_asked_for_and_outputs_elsewhere_are_refused(triton: Any) -> None:
    runner = opened(triton, torch.device("cuda", 1))
    with pytest.raises(ComponentFailedError, match=r"gave model_output on cpu, and the loop steps on cuda:1: .*pool"):
        runner.run(UNET, {"sample": torch.zeros(2)})
    assert InferenceRequest.made[0]["preferred_memory"] == ("gpu", 1)


def test_a_trace_context_goes_along_as_parameters(triton: Any) -> None:
    runner = opened(triton, torch.device("cpu"))
    runner.run(UNET, {"sample": torch.zeros(2)}, trace={"traceparent": "00-1-2-01"})
    assert InferenceRequest.made[0]["parameters"] == {"traceparent": "00-1-2-01"}
    assert "trace" not in InferenceRequest.made[0]


def test_nothing_is_called_before_triton_can_take_it(triton: Any) -> None:
    runner = triton.BlsRunner(torch.device("cpu"))
    with pytest.raises(ComponentFailedError, match="shapes_unet cannot be called while Triton makes"):
        runner.run(UNET, {"sample": torch.zeros(2)})
    assert not InferenceRequest.made


class Loading:
    """Triton's ways to load a model again; `fails` says with what the next attempts fail."""

    def __init__(self) -> None:
        self.did, self.fails, self.ready = list[str](), list[str](), False
        vars(sys.modules["triton_python_backend_utils"]).update(
            load_model=self.load, unload_model=self.unload, is_model_ready=lambda model_name: self.ready
        )

    def unload(self, model_name: str) -> None:
        self.did.append(f"unload {model_name}")

    def load(self, model_name: str) -> None:
        self.did.append(f"load {model_name}")
        if self.fails:
            raise RuntimeError(self.fails.pop(0))


DIED = "Stub process 'shapes_unet_0_0' is not healthy."
NOT_LOADED = "Failed for execute the inference request. Model 'shapes_unet' is not ready."


@pytest.mark.parametrize("error", [DIED, NOT_LOADED])
def test_a_component_that_is_not_there_is_loaded_and_called_again(triton: Any, error: str) -> None:
    loading, InferenceRequest.errors = Loading(), [error]
    outputs = opened(triton, torch.device("cpu")).run(UNET, {"sample": torch.zeros(2)})
    assert torch.equal(outputs["model_output"], torch.ones(2))
    assert loading.did == ["unload shapes_unet", "load shapes_unet"]


def test_one_that_cannot_be_loaded_is_tried_again_by_the_next_call(triton: Any) -> None:
    loading, runner = Loading(), opened(triton, torch.device("cpu"))
    InferenceRequest.errors, loading.fails = [DIED, NOT_LOADED], ["failed to poll"]
    with pytest.raises(
        ComponentFailedError, match=r"shapes_unet failed: .*healthy; loading it again failed: failed to"
    ):
        runner.run(UNET, {"sample": torch.zeros(2)})
    runner.run(UNET, {"sample": torch.zeros(2)})
    assert loading.did == ["unload shapes_unet", "load shapes_unet"] * 2


class Repository(http.server.BaseHTTPRequestHandler):
    """A server's HTTP port: what it answers to the next requests, and those it had."""

    answers: list[tuple[int, str]]
    asked: list[str]

    def do_POST(self) -> None:
        Repository.asked.append(self.path)
        status, text = Repository.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def repository() -> Iterator[str]:
    Repository.answers, Repository.asked = [], []
    with http.server.HTTPServer(("127.0.0.1", 0), Repository) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_models_are_loaded_over_http(triton: Any, repository: str) -> None:
    loading, runner = Loading(), triton.BlsRunner(torch.device("cpu"), repository)
    loading.ready = True
    Repository.answers = [(200, ""), (400, '{"error":"load failed:\\n  no such graph"}'), (500, "")]
    runner.load("shapes_unet")
    for reason in ("shapes_unet: load failed: no such graph$", "shapes_unet: HTTP Error 500"):
        with pytest.raises(ComponentFailedError, match=reason):
            runner.load("shapes_unet")
    assert Repository.asked == ["/v2/repository/models/shapes_unet/load"] * 3
    assert loading.did == [], "a load that fails must not be this process's own"


def test_a_component_that_died_is_loaded_again_over_http(triton: Any, repository: str) -> None:
    loading, InferenceRequest.errors = Loading(), [DIED]
    loading.ready, Repository.answers = True, [(200, "")]
    runner = triton.BlsRunner(torch.device("cpu"), repository)
    runner.open()
    runner.run(UNET, {"sample": torch.zeros(2)})
    assert (loading.did, len(Repository.asked)) == (["unload shapes_unet"], 1)


@pytest.mark.parametrize("answer", [(403, "restricted"), (404, ""), (200, ""), None])
def test_without_such_a_port_they_are_loaded_all_the_same(
    triton: Any, repository: str, answer: tuple[int, str] | None
) -> None:
    """Loads are restricted there, or it is another server's, or nobody's."""
    loading, Repository.answers = Loading(), [answer] if answer else []
    runner = triton.BlsRunner(torch.device("cpu"), repository if answer else "http://127.0.0.1:9")
    runner.load("shapes_unet")
    assert loading.did == ["load shapes_unet"]


def test_one_that_dies_of_the_call_is_not_called_a_third_time(triton: Any) -> None:
    Loading()
    InferenceRequest.errors = [DIED, DIED]
    with pytest.raises(ComponentFailedError, match="shapes_unet failed: Stub process"):
        opened(triton, torch.device("cpu")).run(UNET, {"sample": torch.zeros(2)})
    assert len(InferenceRequest.made) == 2


def test_any_other_error_of_a_component_is_told_at_once(triton: Any) -> None:
    InferenceRequest.errors = ["Server not ready"]
    with pytest.raises(ComponentFailedError, match="shapes_unet failed: Server not ready"):
        opened(triton, torch.device("cpu")).run(UNET, {"sample": torch.zeros(2)})


@pytest.mark.parametrize(
    ("target", "kind", "expected"),
    [("onnxruntime-cpu", "CPU", "cpu"), ("tensorrt", "CPU", "cuda:0"), ("tensorrt", "GPU", "cuda:3")],
)
def test_the_loop_s_device_follows_the_export_and_the_instance(
    triton: Any, target: str, kind: str, expected: str
) -> None:
    deployment = SimpleNamespace(checkpoints=("a",), manifest=lambda name: SimpleNamespace(target=target))
    arguments = {"model_instance_kind": kind, "model_instance_device_id": "3" if kind == "GPU" else "0"}
    assert str(triton._device(deployment, arguments)) == expected


class FullSender:
    """A response sender that has no room for pictures."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, int]] = []

    def is_cancelled(self) -> bool:
        return False

    def send(self, response: Any, flags: int) -> None:
        if not response.error:
            raise RuntimeError("Failed to increase the shared memory pool size")
        self.sent.append((response.error, flags))


def test_a_picture_that_triton_cannot_take_ends_the_request_with_an_error(triton: Any) -> None:
    vars(sys.modules["triton_python_backend_utils"]).update(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(error=error),
        TritonError=lambda text, status: (text, status),
    )
    vars(triton.pb_utils.TritonError).update(INTERNAL="internal")
    watch, sender = triton.CancelWatch(), FullSender()
    try:
        reply = triton.TritonReply(sender, watch)
        event = Event(kind="image", data=b"a picture", info={})
        with pytest.raises(InternalError, match=r"cannot be handed to Triton.*shared memory"):
            reply.send(event, final=False)
        assert sender.sent == [], "the request ends with what was raised"
        reply.send(event, final=True)
        ((text, status), flags) = sender.sent[0]
        assert (flags, status, len(sender.sent)) == (1, "internal", 1)
        assert text.startswith("[internal] a response cannot be handed to Triton (Failed to increase the shared memory")
    finally:
        watch.close()


def test_an_operation_that_fails_is_answered_and_a_refusal_that_cannot_be_sent_is_logged(
    triton: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def drain(grace: float) -> None:
        raise RuntimeError("a bug")

    model, reply = triton.DiffusionModel(), Unreachable()
    model._token, model._telemetry, model._service = b"secret", Telemetry(), SimpleNamespace(drain=drain)
    model._operate(Operation("drain", token="secret", grace_s=0.0), reply, "r-1")
    for thread in (one for one in threading.enumerate() if one.name == "drain"):
        thread.join(20)
    assert isinstance(reply.error, InternalError)
    (told,) = [one for one in caplog.records if one.message == "a refusal could not be sent"]
    assert vars(told)["request_id"] == "r-1"


def test_the_log_says_which_input_was_refused_and_not_what_it_held(
    triton: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model, reply = triton.DiffusionModel(), Recorder()
    model._telemetry = Telemetry()
    model._refuse(reply, "r-2", InvalidArgumentError("prompt holds '[a secret|b]'", input="prompt", value="a secret"))
    (told,) = caplog.records
    line = JsonFormatter().format(told)
    assert {"request_id": "r-2", "outcome": "invalid_argument", "input": "prompt"}.items() <= json.loads(line).items()
    assert "secret" not in line
    assert "secret" in reply.wait().error.message


class Sender:
    """A response sender that must never be asked while, or after, it sends the last response."""

    def __init__(self) -> None:
        self.sending, self.may_end, self.asked_late = threading.Event(), threading.Event(), False

    def is_cancelled(self) -> bool:
        self.asked_late |= self.sending.is_set()
        return False

    def send(self, response: Any, flags: int) -> None:
        self.sending.set()
        assert self.may_end.wait(10)


def test_nobody_asks_for_cancelling_while_the_last_response_is_sent(triton: Any) -> None:
    vars(sys.modules["triton_python_backend_utils"]).update(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)
    watch, sender = triton.CancelWatch(), Sender()
    try:
        reply = triton.TritonReply(sender, watch)
        ending = threading.Thread(target=lambda: reply._send(None, final=True))
        ending.start()
        assert sender.sending.wait(10)
        asking = threading.Thread(target=reply.ask)
        asking.start()
        asking.join(0.05)
        assert asking.is_alive()
        sender.may_end.set()
        asking.join(10)
        ending.join(10)
        assert not sender.asked_late
        assert reply.is_cancelled()
    finally:
        watch.close()
