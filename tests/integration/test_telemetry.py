"""What a real server tells of itself under load: every metric of the table moves, logs name requests, traces go on."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from diffuserve.metrics import LOAD_SECONDS, LOADS, LOADS_FAILED, MEMORY, METRICS, RESIDENT, UNLOADS, Metric
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.wire import WIRE_VERSION
from diffuserve_client import Client, GenerateRequest, InvalidArgumentError, Retry

SECRET = "a scene that nobody else may read about"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
# A component that says which request parameters its calls bring.
COMPONENT = """
from diffuserve.onnx_component import OnnxComponentModel


class TritonPythonModel(OnnxComponentModel):
    def execute(self, requests):
        for request in requests:
            print("CALLED", self.name, request.parameters(), flush=True)
        return super().execute(requests)
"""


def open_url(url: str, body: dict[str, Any] | None = None, **headers: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with opener.open(request, timeout=120) as answer:
        text: str = answer.read().decode()
        return text


@dataclass
class Watched:
    """A server that traces every request, and what a collector got of its spans."""

    server: TritonServer
    spans: list[dict[str, Any]] = field(default_factory=list)

    def samples(self) -> dict[str, float]:
        """Every sample at the metrics port by its name and labels, as they are written there."""
        lines = open_url(self.server.metrics_url).splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def lines(self, **wanted: str) -> list[dict[str, Any]]:
        """The JSON lines of the log that have these fields."""
        text = self.server.log_file.read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
        return [line for line in found if wanted.items() <= line.items()]

    def calls(self, trace_id: str) -> list[str]:
        """The components whose calls brought a trace's context."""
        text = self.server.log_file.read_text(encoding="utf-8")
        called = re.findall(r"^CALLED (\w+) (.*)$", text, re.MULTILINE)
        return [name for name, parameters in called if json.loads(parameters).get("traceparent", "")[3:35] == trace_id]


def eventually(what: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


class Collector(http.server.ThreadingHTTPServer):
    """Takes OpenTelemetry's spans over HTTP."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Collecting)


class _Collecting(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert isinstance(self.server, Collector)
        for resource in body["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                self.server.spans.extend(scope["spans"])
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def watched(deployment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("telemetry")
    shutil.copytree(deployment, folder / "shapes")
    for model in (folder / "shapes" / "models").iterdir():
        (model / "1" / "model.py").write_text(COMPONENT, encoding="utf-8")
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{collector.server_address[1]}/v1/traces"
        settings = ("mode=opentelemetry", f"opentelemetry,url={url}", "level=TIMESTAMPS", "rate=1")
        options = ServerOptions(
            deployment=folder / "shapes",
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            log_file=folder / "triton.log",
            triton_arguments=(
                *(f"--trace-config={one}" for one in settings),
                "--trace-config=opentelemetry,bsp_schedule_delay=200",
            ),
        )
        with TritonServer(options) as server:
            server.wait_ready()
            yield Watched(server, collector.spans)
        collector.shutdown()


def generate_over_http(watched: Watched, **headers: str) -> None:
    prompt = f"{SECRET} {time.monotonic_ns()}"  # one that was not encoded lately
    body = {"prompt": prompt, "steps": 2, "sampler": "ddim", "image_encoding": "base64"}
    open_url(f"{watched.server.http_url}/v2/models/diffusion/generate", body, **headers)


@contextlib.contextmanager
def scraping(watched: Watched, peaks: dict[str, float]) -> Iterator[None]:
    """Keep each sample's highest value, as it is seen meanwhile."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(0.1):
            for name, value in watched.samples().items():
                peaks[name] = max(value, peaks.get(name, value))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        yield
    finally:
        ended.set()
        scraper.join()


def test_every_metric_of_the_table_moves_under_load(watched: Watched) -> None:
    before = watched.samples()
    peaks: dict[str, float] = {}
    with (
        scraping(watched, peaks),
        Client(watched.server.grpc_url, retry=Retry(retries=0)) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        # Its steps take longer than the gauges' half second, and what matters less waits for all of them.
        done = [pool.submit(client.generate, SECRET, steps=50, width=160, height=160, num_images=4)]
        assert eventually(lambda: peaks.get("diffuserve_requests_active"))
        done += [pool.submit(client.generate, f"{SECRET} {i}", steps=8, seed=i, priority=-50) for i in range(6)]
        # Before there is another request of their size, whose calls they would fill up.
        assert eventually(lambda: peaks.get("diffuserve_requests_waiting"))
        with pytest.raises(InvalidArgumentError):
            client.generate(SECRET, width=63)
        stream = client.stream(GenerateRequest(prompt=SECRET, steps=150, progress_every=1))
        assert any(event.kind == "progress" for event in stream)
        stream.close()
        for one in done:
            one.result()
        assert eventually(lambda: not still(before, peaks)), still(before, peaks)
    assert eventually(
        lambda: (now := watched.samples())["diffuserve_requests_active"] == now["diffuserve_requests_waiting"] == 0
    )


#: Of components that come and go, which test_residency looks at: here they stay.
OF_RESIDENCY = {one.name for one in (LOADS, LOADS_FAILED, UNLOADS, LOAD_SECONDS, RESIDENT, MEMORY)}


def still(before: dict[str, float], peaks: dict[str, float]) -> list[str]:
    """The metrics of the table of which no series has moved."""

    def moved(metric: Metric) -> bool:
        name = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
        series = [one for one in peaks if one.partition("{")[0] == name]
        assert set(series) <= set(before), "a series came late"
        return any(peaks[one] > before[one] for one in series)

    # Those of LoRAs and of residency move where there are some: see test_loras_served and test_residency.
    elsewhere = {one.name for one in METRICS if one.name.startswith("diffuserve_lora")} | OF_RESIDENCY
    return [one.name for one in METRICS if one.name not in elsewhere and not moved(one)]


def test_the_samples_agree_with_each_other(watched: Watched) -> None:
    generate_over_http(watched)
    shapes = '{checkpoint="shapes"}'
    time.sleep(1.2)  # two flushes
    now = watched.samples()
    steps, seconds = now[f"diffuserve_step_seconds_count{shapes}"], now[f"diffuserve_step_seconds_sum{shapes}"]
    assert steps == now[f"diffuserve_step_rows_count{shapes}"] > 0
    assert now['diffuserve_step_seconds_bucket{checkpoint="shapes",le="+Inf"}'] == steps
    assert 0 < now[f"diffuserve_engine_seconds_total{shapes}"] <= seconds
    accepted = now[f"diffuserve_requests_accepted_total{shapes}"]
    assert accepted == sum(value for name, value in now.items() if name.startswith("diffuserve_requests_ended_total{"))


def test_a_request_s_lines_carry_its_id_and_not_its_prompt(watched: Watched) -> None:
    inputs = []
    for name, datatype, value in (("prompt", "BYTES", SECRET.encode()), ("steps", "INT32", 2)):
        tensor = triton.InferInput(name, [1], datatype)
        tensor.set_data_from_numpy(np.array([value], dtype=np.object_ if datatype == "BYTES" else np.int32))
        inputs.append(tensor)
    answered = threading.Semaphore(0)
    with triton.InferenceServerClient(watched.server.grpc_url) as raw:
        raw.start_stream(lambda result, error: answered.release())
        for request_id, some in (("mine-7", inputs), ("mine-8", inputs[1:])):
            raw.async_stream_infer("diffusion", some, request_id=request_id, model_version=str(WIRE_VERSION))
            assert answered.acquire(timeout=120)
    (ended,) = eventually(lambda: watched.lines(request_id="mine-7", message="request ended"))
    (accepted,) = watched.lines(request_id="mine-7", message="request accepted")
    assert (accepted["checkpoint"], ended["outcome"]) == ("shapes", "done")
    assert ended["seconds"] > 0
    assert ended["eta_s"] == accepted["eta_s"]
    before = len(watched.lines(message="request ended"))
    generate_over_http(watched)
    (made,) = {line["request_id"] for line in eventually(lambda: watched.lines(message="request ended")[before:])}
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert SECRET not in watched.server.log_file.read_text(encoding="utf-8")


def test_a_trace_goes_on_through_the_component_calls(watched: Watched) -> None:
    generate_over_http(watched, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
    calls = eventually(lambda: len(found := watched.calls(TRACE_ID)) >= 4 and found)
    assert [calls.count(f"shapes_{name}") for name in ("text_encoder", "unet", "vae_decoder")] == [1, 2, 1]
    (line,) = [one for one in watched.lines(message="request traced") if one["traceparent"][3:35] == TRACE_ID]
    assert eventually(lambda: watched.lines(message="request ended", request_id=line["request_id"]))

    def mine() -> dict[str, Any]:
        return {span["name"]: span for span in list(watched.spans) if span["traceId"] == TRACE_ID}

    spans = eventually(lambda: len(found := mine()) >= 2 and "InferRequest" in found and found)
    assert spans["InferRequest"]["parentSpanId"] == PARENT_ID
    assert spans["diffusion"]["spanId"] == line["traceparent"][36:52]


def test_metrics_that_are_switched_off_do_not_stop_the_server(deployment: Path, tmp_path: Path) -> None:
    options = ServerOptions(
        deployment=deployment,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        log_file=tmp_path / "triton.log",
        triton_arguments=("--allow-metrics=false",),
    )
    with TritonServer(options) as server, Client(server.grpc_url, retry=Retry(retries=0)) as client:
        server.wait_ready()
        assert client.generate("a circle", steps=1).image.size == (64, 64)
