"""What a client does with a server that fails, hangs or is not there."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

import diffuserve.request
import diffuserve_client
from diffuserve_client import (
    CancelledError,
    Client,
    ComponentFailedError,
    ConnectionFailedError,
    DeadlineError,
    DiffuserveError,
    DrainingError,
    Event,
    GenerateRequest,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    QueueFullError,
    Retry,
    Timeout,
    UnavailableError,
    UnsupportedError,
    _exchange,
    _timeout,
)
from diffuserve_client._events import decoded, typed
from unit.client.fake_triton import FakeTriton, answer, failure, heartbeat, image, picture, progress, response, silence

#: No second try, which would hide the first's error.
ONCE = Retry(retries=0)


def script_of(*responses: Any) -> Any:
    def script(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield from responses

    return script


@pytest.mark.parametrize(
    "kind",
    [
        InvalidArgumentError,
        NotFoundError,
        UnsupportedError,
        QueueFullError,
        DeadlineError,
        DrainingError,
        CancelledError,
        ComponentFailedError,
        InternalError,
    ],
)
def test_the_servers_errors_keep_their_type_and_detail(
    client: Client, fake: FakeTriton, kind: type[DiffuserveError]
) -> None:
    fake.script = script_of(failure(kind("it is so; do this", input="steps", value=0)))
    with pytest.raises(kind) as caught:
        client.generate("a")
    assert type(caught.value) is kind
    assert caught.value.message == "it is so; do this"
    assert caught.value.detail == {"input": "steps", "value": 0}


def test_an_error_after_some_images_is_raised(client: Client, fake: FakeTriton) -> None:
    fake.script = script_of(response(image(0)), failure(ComponentFailedError("the engine died")))
    with pytest.raises(ComponentFailedError, match="the engine died"):
        client.generate("a", num_images=2)


def test_an_error_that_is_not_ours_keeps_its_text(client: Client, fake: FakeTriton) -> None:
    fake.script = script_of(failure("unexpected inference input 'x' for model 'diffusion'"))
    with pytest.raises(InternalError, match=r"^unexpected inference input 'x' for model 'diffusion'$"):
        client.generate("a")


def test_a_server_of_another_wire_version_is_named(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exchange, "WIRE_VERSION", 99)
    with pytest.raises(NotFoundError, match=r"does not have model 'diffusion' in version 99.*same release"):
        client.generate("a")


def test_a_model_that_is_not_ready_is_unavailable(client: Client, fake: FakeTriton) -> None:
    fake.script = script_of(failure("Request for unknown model: 'diffusion' version 1 is not at ready state"))
    with pytest.raises(UnavailableError, match="but it is not ready; wait for it to load"):
        client.generate("a")


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ((), "ended the stream early, 0 of 2 images received"),
        ((response(image(0)),), "ended the stream early, 1 of 2"),
        ((response(image(0)), response(image(1))), "ended the stream early, 2 of 2"),
        ((response(None, final=True),), "called the request done, 0 of 2"),
        ((response(image(0), final=True),), "called the request done, 1 of 2"),
        ((response(image(0)), response(image(0), final=True)), "sent an image 0 that was not to come"),
        ((response(image(2), final=True),), "sent an image 2 that was not to come"),
    ],
)
def test_a_request_is_done_only_with_all_images_and_the_final_response(
    client: Client, fake: FakeTriton, responses: tuple[Any, ...], message: str
) -> None:
    fake.script = script_of(*responses)
    with pytest.raises(InternalError, match=message):
        client.generate("a", num_images=2)


def test_bad_base64_is_an_error(client: Client, fake: FakeTriton) -> None:
    fake.script = script_of(response(image(data=b"*"), final=True))
    with pytest.raises(InternalError, match="image 0 is not base64"):
        client.generate("a", image_encoding="base64")


def test_a_response_without_its_tensors_is_an_error(client: Client, fake: FakeTriton) -> None:
    short = response(image(), final=True)
    del short.infer_response.outputs[-1]
    fake.script = script_of(short)
    with pytest.raises(InternalError, match="response cannot be read: KeyError"):
        client.generate("a")


def test_bad_values_never_reach_the_server(client: Client, fake: FakeTriton) -> None:
    with pytest.raises(InvalidArgumentError, match="steps is 0"):
        client.generate("a", steps=0)
    with pytest.raises(InvalidArgumentError, match="width is 4294967296"):
        client.generate("a", width=2**32)
    assert fake.requests == []


def test_the_deadline_ends_the_wait_and_the_servers_work(client_class: Any, fake: FakeTriton) -> None:
    fake.script = silence
    started = time.monotonic()
    with client_class(fake.url, timeout=Timeout(total=0.5, connect=30), retry=ONCE) as client:
        with pytest.raises(DeadlineError, match=r"not done within 0\.5 s, 0 of 1 images"):
            client.generate("a")
        assert time.monotonic() - started < 10
        assert fake.over.wait(10)


@pytest.fixture
def hasty(client_class: Any, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client that takes 0.3 s of silence for a death; no real one may ask for signs of life so often."""
    for module in (_timeout, diffuserve.request):
        monkeypatch.setattr(module, "MIN_HEARTBEAT_MS", 100)
    with client_class(fake.url, timeout=Timeout(total=60, connect=30, stall=0.3), retry=ONCE) as client:
        yield client


def test_a_server_that_falls_silent_is_given_up_and_told_to_stop(hasty: Client, fake: FakeTriton) -> None:
    def one_then_silence(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(progress(1, 20))
        yield from silence(fake, request)

    fake.script = one_then_silence
    started = time.monotonic()
    with pytest.raises(ConnectionFailedError, match=r"nothing came from localhost:\d+ for 0\.3 s, 0 of 1") as caught:
        hasty.generate("a")
    assert 0.3 <= time.monotonic() - started < 10
    assert caught.value.detail == {"url": fake.url, "stall": 0.3}
    assert fake.heartbeats == [100]
    assert fake.over.wait(10)


def test_a_large_request_has_time_to_get_there(hasty: Client, fake: FakeTriton) -> None:
    def late(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        fake.over.wait(0.6)  # as where its 100 kB come at some 1.3 Mbit/s
        yield response(heartbeat())
        if request.seed == 1:
            yield from silence(fake, request)
        yield from answer(fake, request)

    fake.script = late
    large = GenerateRequest(prompt="a", seed=0, init_image=b"\x89PNG" * 25_000)
    assert len(hasty.generate(large).images) == 1
    assert fake.over.wait(10)
    fake.over.clear()
    started = time.monotonic()
    with pytest.raises(ConnectionFailedError, match=r"for 0\.3 s, 0 of 1 images received, and a server"):
        hasty.generate(replace(large, seed=1))
    assert time.monotonic() - started < 2, "from the first answer on, the limit is the stall timeout alone"
    assert fake.over.wait(10)
    fake.over.clear()
    with pytest.raises(ConnectionFailedError, match=r"for 0\.3 s, 0 of 1 images received and \d+ bytes sent"):
        hasty.generate("a")


def test_signs_of_life_are_asked_for_heard_and_kept_from_who_did_not_ask(hasty: Client, fake: FakeTriton) -> None:
    def alive(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        for _ in range(8):
            fake.over.wait(0.1)
            yield response(heartbeat())
        yield from answer(fake, request)

    fake.script = alive
    assert [event.kind for event in hasty.stream(GenerateRequest(prompt="a"))] == ["image"]
    kinds = [event.kind for event in hasty.stream(GenerateRequest(prompt="a", heartbeat_ms=60_000))]
    assert kinds == [*["heartbeat"] * 8, "image"]
    assert fake.heartbeats == [100, 100]


def test_who_reads_slowly_is_not_a_server_that_is_silent(hasty: Client, fake: FakeTriton) -> None:
    with closing(hasty.stream(GenerateRequest(prompt="a", steps=3, progress_every=1))) as events:
        next(events)
        time.sleep(0.5)
        assert [event.kind for event in events] == ["progress", "progress", "image"]


def test_a_stall_timeout_allows_for_three_signs_of_life() -> None:
    assert Timeout().stall == 15
    assert Timeout().heartbeat_ms == 5000
    assert Timeout(stall=2).heartbeat_ms == 1000
    with pytest.raises(InvalidArgumentError, match=r"stall timeout is 1\.9 s, and must be 2 at least"):
        Timeout(stall=1.9)
    with pytest.raises(InvalidArgumentError, match="stall timeout is inf s"):
        Timeout(stall=float("inf"))


def test_a_dead_process_of_the_model_is_told_as_what_it_is(client: Client, fake: FakeTriton) -> None:
    fake.script = script_of(failure("Stub process 'diffusion_0_0' is not healthy."))
    with pytest.raises(
        UnavailableError, match=r"process of model 'diffusion' .* died, 0 of 1 .* send the request again"
    ):
        client.generate("a")


def test_leaving_a_stream_cancels_it(client: Client, fake: FakeTriton) -> None:
    def one_then_silence(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(progress(1, 20))
        yield from silence(fake, request)

    fake.script = one_then_silence
    with closing(client.stream(GenerateRequest(prompt="a", progress_every=1))) as events:
        assert next(events) == typed(progress(1, 20))
        assert not fake.over.is_set()
    assert fake.over.wait(10)


def test_an_error_in_on_progress_cancels(client: Client, fake: FakeTriton) -> None:
    def one_then_silence(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield response(progress(1, 20))
        yield from silence(fake, request)

    def fail(_: Event) -> None:
        raise LookupError("mine")

    fake.script = one_then_silence
    with pytest.raises(LookupError, match="mine"):
        client.generate("a", on_progress=fail)
    assert fake.over.wait(10)


def test_ctrl_c_cancels(fake: FakeTriton) -> None:
    def interrupted(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        yield from silence(fake, request)

    fake.script = interrupted
    with Client(fake.url) as client, pytest.raises(KeyboardInterrupt):
        client.generate("a")
    assert fake.over.wait(10)


def test_closing_the_client_cancels_what_runs_elsewhere(client_class: Any, fake: FakeTriton) -> None:
    begun = threading.Event()

    def begin(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        begun.set()
        yield from silence(fake, request)

    fake.script = begin
    client = client_class(fake.url)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "a")
        assert begun.wait(10)
        client.close()
        with pytest.raises(CancelledError, match="0 of 1 images received"):
            waiting.result(10)
    assert fake.over.wait(10)


def test_a_server_that_is_not_there(client: Client, fake: FakeTriton) -> None:
    client.generate("a")
    port = fake.port
    fake.stop()
    for _ in range(2):
        with pytest.raises(
            ConnectionFailedError, match=r"cannot reach a server at localhost:\d+ .*; start it"
        ) as caught:
            client.generate("a")
    assert caught.value.code == "connection_failed"
    assert caught.value.detail == {"url": fake.url}
    again = FakeTriton(answer, f"localhost:{port}")
    try:
        assert len(client.generate("a").images) == 1, "the client connects afresh"
    finally:
        again.stop()


def test_a_name_that_does_not_resolve() -> None:
    with (
        Client("nowhere.invalid:8001", timeout=20, retry=ONCE) as client,
        pytest.raises(ConnectionFailedError, match="nowhere"),
    ):
        client.generate("a")


def test_something_that_accepts_and_says_nothing(client_class: Any) -> None:
    with socket.create_server(("localhost", 0)) as listener:
        url = f"localhost:{listener.getsockname()[1]}"
        with (
            client_class(url, timeout=Timeout(connect=0.3), retry=ONCE) as client,
            pytest.raises(ConnectionFailedError, match=r"no answer within 0\.3 s"),
        ):
            client.generate("a")
        with client_class(url, timeout=0.3, retry=ONCE) as client:
            for _ in range(3):  # two clocks that run out together are told apart by chance
                with pytest.raises(DeadlineError, match=r"not done within 0\.3 s") as caught:
                    client.generate("a")
                assert caught.value.detail["unreachable"], "so that the next request goes elsewhere, where there is one"
            (told,) = client.health()
            assert isinstance(told.error, DeadlineError)


def test_a_grpc_server_that_is_no_triton(client_class: Any) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        with (
            client_class(f"localhost:{port}", retry=ONCE) as client,
            pytest.raises(ConnectionFailedError, match="does not speak Triton's gRPC protocol"),
        ):
            client.generate("a")
    finally:
        server.stop(0).wait()


def test_a_server_that_dies_mid_stream(client_class: Any) -> None:
    command = [sys.executable, str(Path(__file__).with_name("fake_triton.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"localhost:{int(process.stdout.readline())}"
            with (
                client_class(url, timeout=60, retry=ONCE) as client,
                pytest.raises(ConnectionFailedError, match=r"the connection to .* was lost, 0 of 1 images received"),
            ):
                client.generate("a", on_progress=lambda _: process.kill())
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, ConnectionFailedError),
        (grpc.StatusCode.CANCELLED, CancelledError),
        (grpc.StatusCode.INTERNAL, InternalError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, InternalError),
    ],
)
def test_a_streams_status_becomes_an_error(
    client: Client, fake: FakeTriton, code: grpc.StatusCode, kind: type[DiffuserveError]
) -> None:
    exchange = _exchange.Exchange(GenerateRequest(prompt="a"), url=fake.url, timeout=Timeout())
    error = exchange.failure(code, "what gRPC says")
    assert type(error) is kind
    assert "what gRPC says" in error.message
    assert type(exchange.failure(code, None)) is kind


def _short(infer: Any) -> None:
    infer.raw_output_contents[0] = b"\xff\xff\xff\xff"


def _long(infer: Any) -> None:
    infer.outputs[2].shape[0] = 77


def _few(infer: Any) -> None:
    del infer.raw_output_contents[3:]


def _strange(infer: Any) -> None:
    infer.outputs[2].datatype = "FOO"


@pytest.mark.parametrize("spoil", [_short, _long, _few, _strange])
def test_an_answer_that_cannot_be_read(client: Client, fake: FakeTriton, spoil: Callable[[Any], None]) -> None:
    spoilt = response(image(), final=True)
    spoil(spoilt.infer_response)
    fake.script = script_of(spoilt)
    with pytest.raises(InternalError, match=r"cannot be read"):
        client.generate("a")


def test_an_answer_whose_info_is_no_object(client: Client, fake: FakeTriton) -> None:
    info: Any = ["strange"]
    fake.script = script_of(response(replace(image(), info=info), final=True))
    with pytest.raises(InternalError, match="which is no object"):
        client.generate("a")


def test_a_picture_that_cannot_be_decoded() -> None:
    header = bytearray(picture()[12:29])
    header[4:12] = struct.pack(">II", 60_000, 60_000)
    bomb = picture()[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture()[33:]
    for data, why in ((b"", "cannot identify"), (b"picture", "cannot identify"), (bomb, "3600000000 pixels")):
        with pytest.raises(OSError, match=why):
            decoded(data)


def test_the_client_errors_are_in_the_shared_tree() -> None:
    for name in diffuserve_client.__all__:
        value = getattr(diffuserve_client, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, DiffuserveError)
