"""What a client does with several servers, servers that come back, TLS, credentials and traces."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from opentelemetry import context, propagate, trace

from blocking import Blocking
from diffuserve_client import (
    CancelledError,
    Client,
    ConnectionFailedError,
    DrainingError,
    Event,
    GenerateRequest,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    QueueFullError,
    Retry,
    Timeout,
    Tls,
)
from unit.client.conftest import Serve
from unit.client.fake_triton import FakeTriton, answer, failure, image, progress, response, silence

#: Retries at once, as far as a clock allows.
SOON = Retry(retries=10, first=0.01, most=0.05)
PATIENT = Timeout(total=60, connect=30)


def test_one_of_two_servers_is_not_there(client_class: Any, serve: Serve) -> None:
    here, gone = serve(answer), serve(answer)
    gone.stop()
    with client_class([gone.url, here.url], timeout=PATIENT, retry=SOON) as client:
        assert [len(client.generate("a").images) for _ in range(3)] == [1, 1, 1]
        assert client.urls == (gone.url, here.url)
    assert len(here.requests) == 3


def test_a_server_that_comes_back_is_used_again(client_class: Any, serve: Serve) -> None:
    first = serve(answer)
    with client_class(first.url, timeout=PATIENT, retry=Retry(retries=100, first=0.01, most=0.2)) as client:
        client.generate("a")
        port = first.port
        first.stop()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.generate, "b")
            again = FakeTriton(answer, f"localhost:{port}")
            try:
                assert len(waiting.result(60).images) == 1
                assert [request.prompt for request in again.requests] == ["b"]
            finally:
                again.stop()


def test_a_shutdown_goes_on_elsewhere_with_one_result(client_class: Any, serve: Serve) -> None:
    def hand_over(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        if request.resume:
            assert request.resume == b"left"
            yield response(image(1, b"second"), final=True)
        else:
            yield response(image(0, b"first"))
            yield response(Event(kind="snapshot", data=b"left", info={}), final=True)

    servers = [serve(hand_over), serve(hand_over)]
    with client_class([one.url for one in servers], timeout=PATIENT, retry=SOON) as client:
        kinds = [event.kind for event in client.stream(GenerateRequest(prompt="a", num_images=2))]
        assert kinds == ["image", "snapshot", "image"]
        result = client.generate("a", num_images=2, request_id="mine")
    assert [one.data for one in result.images] == [b"first", b"second"]
    assert result.request_id == "mine"
    assert sorted(one.ids.count("mine") for one in servers) == [1, 1], "both tries have the request's name"


def test_a_full_server_is_asked_again(client_class: Any, fake: FakeTriton) -> None:
    left = [QueueFullError("full", eta_ms=1), QueueFullError("full", eta_ms=1), DrainingError("no")]

    def full(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        yield from [failure(left.pop())] if left else answer(fake, request)

    fake.script = full
    with client_class(fake.url, timeout=PATIENT, retry=SOON) as client:
        assert len(client.generate("a").images) == 1
    assert len({request.seed for request in fake.requests}) == 1
    assert len(fake.requests) == 4


def test_a_request_is_cancelled_by_its_name(client_class: Any, fake: FakeTriton) -> None:
    begun = threading.Event()

    def begin(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        begun.set()
        yield from silence(fake, request)

    fake.script = begin
    with client_class(fake.url, timeout=PATIENT, retry=SOON) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "a", request_id="mine")
        assert begun.wait(10)
        assert not client.cancel("yours")
        with pytest.raises(RuntimeError, match="'mine' of this client is under way"):
            client.generate("b", request_id="mine")
        assert client.cancel("mine")
        with pytest.raises(CancelledError):
            waiting.result(10)
        assert fake.over.wait(10)
        assert not client.cancel("mine"), "it is over"
    assert fake.ids == ["mine"]


def test_a_request_that_waits_for_its_next_try_is_cancelled_too(client_class: Any, fake: FakeTriton) -> None:
    asked = threading.Event()

    def full(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        asked.set()
        yield failure(QueueFullError("full", eta_ms=30_000))

    fake.script = full
    with client_class(fake.url, timeout=PATIENT) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "a", request_id="mine")
        assert asked.wait(10)
        while not waiting.done():
            client.cancel("mine")
        with pytest.raises(CancelledError):
            waiting.result(10)


def test_closing_ends_what_waits_for_its_next_try(client_class: Any) -> None:
    client = client_class("localhost:1", retry=Retry(retries=5, first=50, most=50), timeout=1000)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "a")
        while not waiting.running():
            pass
        client.close()
        with pytest.raises((CancelledError, RuntimeError)):
            waiting.result(20)


@pytest.mark.parametrize("request_id", ["", "a" * 257])
def test_a_request_id_has_limits(client: Client, request_id: str) -> None:
    with pytest.raises(InvalidArgumentError, match="must have from 1 to 256 bytes"):
        client.generate("a", request_id=request_id)
    with pytest.raises(InvalidArgumentError, match="cannot be UTF-8"):
        client.generate("a", request_id="\ud800")


STATUS: dict[str, Any] = {
    "state": "serving",
    "waiting": 2,
    "active": 3,
    "version": "1.2",
    "checkpoints": {
        "shapes": {
            "state": "resident",
            "resident": True,
            "bytes": 10,
            "samplers": ["ddim", "euler"],
            "loras": ["night"],
            "limits": {"max_images": 16},
        }
    },
}


def tell(_: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
    yield response(Event(kind="status", info=STATUS), final=True)


def test_models_and_health(client_class: Any, serve: Serve) -> None:
    here, gone, odd = serve(tell), serve(answer), serve(lambda *_: iter([failure(NotFoundError("no model"))]))
    gone.stop()
    with client_class([gone.url, here.url, odd.url], timeout=PATIENT) as client:
        (only,) = client.models()
        health = client.health()
        assert client.status() == STATUS
    assert (only.name, only.state, only.resident, only.bytes) == ("shapes", "resident", True, 10)
    assert (only.samplers, only.loras, only.limits) == (("ddim", "euler"), ("night",), {"max_images": 16})
    assert [(one.url, one.state, one.is_serving) for one in health] == [
        (gone.url, "unreachable", False),
        (here.url, "serving", True),
        (odd.url, "unreachable", False),
    ]
    assert (health[1].waiting, health[1].active, health[1].version, health[1].error) == (2, 3, "1.2", None)
    assert isinstance(health[0].error, ConnectionFailedError)
    assert isinstance(health[2].error, NotFoundError)
    with client_class(gone.url, timeout=PATIENT) as client, pytest.raises(ConnectionFailedError, match="cannot reach"):
        client.models()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def pem(authority: trustme.CA, tmp_path: Path) -> dict[str, Any]:
    """The authority, and a client's certificate and key, as files."""
    ours = authority.issue_cert("client.test")
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    ours.cert_chain_pems[0].write_to_path(paths["cert"])
    ours.private_key_pem.write_to_path(paths["key"])
    return paths


def secured(authority: trustme.CA, name: str = "localhost", *, asks: bool = False) -> FakeTriton:
    theirs = authority.issue_cert(name)
    pair = (theirs.private_key_pem.bytes(), theirs.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes() if asks else None, asks)
    return FakeTriton(answer, credentials=credentials)


ONCE = Retry(retries=0)


def test_tls_with_a_token_and_a_clients_certificate(
    client_class: Any, authority: trustme.CA, pem: dict[str, Any]
) -> None:
    fake = secured(authority, asks=True)
    try:
        with client_class(fake.url, tls=Tls(**pem), token="secret", headers={"X-Team": "shop"}) as client:
            assert len(client.generate("a").images) == 1
        assert fake.headers[0]["authorization"] == "Bearer secret"
        assert fake.headers[0]["x-team"] == "shop"
        with (
            client_class(fake.url, tls=Tls(ca=pem["ca"]), retry=ONCE, timeout=20) as nobody,
            pytest.raises(ConnectionFailedError),
        ):
            nobody.generate("a")
    finally:
        fake.stop()


def test_a_name_that_is_not_the_certificates(client_class: Any, authority: trustme.CA, pem: dict[str, Any]) -> None:
    fake = secured(authority, "pictures.test")
    try:
        with client_class(fake.url, tls=Tls(ca=pem["ca"], server_name="pictures.test")) as client:
            assert len(client.generate("a").images) == 1
        with (
            client_class(fake.url, tls=Tls(ca=pem["ca"]), retry=ONCE) as client,
            pytest.raises(ConnectionFailedError, match=r"TLS"),
        ):
            client.generate("a")
    finally:
        fake.stop()


def test_tls_on_one_side_only_is_told(client_class: Any, authority: trustme.CA, fake: FakeTriton, pem: Any) -> None:
    with client_class(fake.url, tls=Tls(ca=pem["ca"]), retry=ONCE) as client:
        with pytest.raises(ConnectionFailedError, match=r"TLS") as caught:
            client.generate("a")
        assert "\n" not in caught.value.message
    theirs = secured(authority)
    try:
        with client_class(theirs.url, retry=ONCE) as client, pytest.raises(ConnectionFailedError, match="TLS"):
            client.generate("a")
        with (
            client_class(theirs.url, tls=Tls(), retry=ONCE) as distrustful,
            pytest.raises(ConnectionFailedError, match=r"TLS"),
        ):
            distrustful.generate("a")
    finally:
        theirs.stop()


def test_credentials_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"a token would go to gpu-1:8001 in clear text; give tls"):
        Client(["localhost:8001", "gpu-1:8001"], token="secret")
    with pytest.raises(InvalidArgumentError, match=r"in clear text"):
        Client("gpu-1:8001", headers={"Authorization": "Bearer secret"})
    for url in ("localhost:1", "127.0.0.1:1", "[::1]:1"):
        Client(url, token="secret").close()
    odd: Any = {"a": b"b"}
    for headers in ({"bad name": "a"}, {"a": "b\n"}, {"ümlaut": "a"}, {"a-bin": "b"}, {"grpc-a": "b"}, odd):
        with pytest.raises(InvalidArgumentError, match="cannot be sent"):
            Client(headers=headers)
    with pytest.raises(InvalidArgumentError, match="give both"):
        Tls(cert="a.pem")
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*none\.pem: No such file"):
        Client(tls=Tls(ca=tmp_path / "none.pem"))
    (tmp_path / "text.pem").write_text("hello")
    with pytest.raises(InvalidArgumentError, match="holds no PEM"):
        Client(tls=Tls(ca=tmp_path / "text.pem"))
    assert "secret" not in repr(Client("localhost:1", token="secret")._session.security)


class Strict(FakeTriton):
    """As behind a proxy that checks tokens, which answers `where` with `code`."""

    def __init__(self, where: str, code: grpc.StatusCode) -> None:
        self.where, self.code, self.asked = where, code, 0
        super().__init__(tell)

    def _refuse(self, where: str, context: Any) -> None:
        if where == self.where:
            self.asked += 1
            context.abort(self.code, "no such token")

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._refuse("ServerLive", context)
        return super().ServerLive(request, context)

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        self._refuse("ModelStreamInfer", context)
        return super().ModelStreamInfer(request_iterator, context)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
@pytest.mark.parametrize("where", ["ServerLive", "ModelStreamInfer"])
def test_a_token_that_is_refused_is_not_sent_again(client_class: Any, where: str, code: grpc.StatusCode) -> None:
    strict = Strict(where, code)
    try:
        with (
            client_class(strict.url, token="wrong", retry=SOON) as client,
            pytest.raises(InvalidArgumentError, match=r"refuses .* \(no such token\); correct the token") as caught,
        ):
            client.generate("a")
        # grpc.aio loses the status now and then of a call that is ended while it is sent, which is then tried again.
        assert strict.asked == 1 or (client_class is Blocking and where == "ModelStreamInfer")
        assert "wrong" not in caught.value.message
    finally:
        strict.stop()


def test_loopback_is_not_asked_of_a_proxy(client_class: Any, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://localhost:1")
    with client_class(fake.url, token="secret", retry=ONCE) as client:
        assert len(client.generate("a").images) == 1


def test_a_propagator_may_have_capitals_in_its_headers(
    client_class: Any, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propagate, "inject", lambda carrier: carrier.update({"X-Amzn-Trace-Id": "Root=1"}))
    with client_class(fake.url, retry=ONCE) as client:
        client.generate("a")
    assert fake.headers[0]["x-amzn-trace-id"] == "Root=1"


@pytest.mark.parametrize("told", [[], [STATUS, STATUS]])
def test_a_status_comes_once(client: Client, fake: FakeTriton, told: list[Any]) -> None:
    events = [response(Event(kind="status", info=one)) for one in told]
    fake.script = lambda *_: iter([*events, response(None, final=True)])
    with pytest.raises(InternalError, match=rf"told its status {len(told)} times"):
        client.status()


def test_a_status_of_another_release(client: Client, fake: FakeTriton) -> None:
    fake.script = lambda *_: iter([response(Event(kind="status", info={"checkpoints": {"a": {}}}), final=True)])
    (health,) = client.health()
    assert not health.is_serving
    assert isinstance(health.error, InternalError)
    with pytest.raises(InternalError, match=r"cannot be read \(KeyError\('state'\)\)"):
        client.models()


def test_a_callers_trace_goes_with_its_requests(fake: FakeTriton) -> None:
    span = trace.NonRecordingSpan(trace.SpanContext(0x11, 0x22, is_remote=False, trace_flags=trace.TraceFlags(1)))
    with Client(fake.url) as client:
        token = context.attach(trace.set_span_in_context(span))
        try:
            client.generate("a")
            list(client.generate_many(["b"]))
            fake.script = tell
            client.health()
            fake.script = answer
        finally:
            context.detach(token)
        client.generate("c")
    ours = f"00-{0x11:032x}-{0x22:016x}-01"
    assert [one.get("traceparent") for one in fake.headers] == [ours, ours, ours, None]


def test_a_server_that_dies_after_a_picture_is_not_asked_for_it_again(client_class: Any, serve: Serve) -> None:
    seen: list[tuple[int, int]] = []

    def breaks_once(fake: FakeTriton, request: GenerateRequest) -> Iterator[Any]:
        seen.append((request.seed, request.num_images))
        if len(seen) == 1:
            yield response(progress(1, 4))
            yield response(image(0, b"first"))
            yield failure("Stub process 'diffusion_0_0' is not healthy.")
            return
        yield response(image(0, b"second"))
        yield response(image(1, b"third"), final=True)

    fake = serve(breaks_once)
    with client_class(fake.url, timeout=PATIENT, retry=SOON) as client:
        result = client.generate("a", num_images=3, seed=20)
    assert [(one.index, one.data) for one in result.images] == [(0, b"first"), (1, b"second"), (2, b"third")]
    assert seen == [(20, 3), (21, 2)]
