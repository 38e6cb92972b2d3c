"""This service beside diffusers' pipeline behind a lock and the bare engines, in one run on one machine.

The same requests go, all at once, (a) to a real Triton with diffuserve, (b) to diffusers' pipeline behind a lock,
as web servers around it do, and (c) the calls that (a) made of its engines are replayed on bare ONNX Runtime
sessions in this process, each model's calls one after another and the models side by side, with nothing in between:
the time that no server can go below with these engines and batches. Runs alternate, and medians over the rounds are
reported.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from diffuserve.manifest import Deployment
from diffuserve.onnx_session import open_session
from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client
from shapes_recipe.world import trained_scenes

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


@dataclass(frozen=True)
class Run:
    """One system's run: wall seconds, and each request's latency in seconds."""

    wall: float
    latencies: list[float]


def make_requests(count: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [
        {
            "prompt": rng.choice(trained_scenes()).caption,
            "steps": rng.choice([4, 8, 20, 50]),
            "sampler": rng.choice(list(SCHEDULERS)),
            "guidance_scale": rng.choice([1.0, 7.5]),
            "seed": i,
        }
        for i in range(count)
    ]


def run_at_once(requests: list[dict[str, Any]], serve: Callable[[dict[str, Any]], None], concurrency: int) -> Run:
    def timed(request: dict[str, Any]) -> float:
        started = time.perf_counter()
        serve(request)
        return time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        latencies = list(pool.map(timed, requests))
    return Run(time.perf_counter() - started, latencies)


def locked_pipeline(checkpoint: Path) -> Callable[[dict[str, Any]], None]:
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    schedulers = {name: one.from_config(pipeline.scheduler.config) for name, one in SCHEDULERS.items()}
    lock = threading.Lock()

    def serve(request: dict[str, Any]) -> None:
        with lock:
            pipeline.scheduler = schedulers[request["sampler"]]
            pipeline(
                request["prompt"],
                num_inference_steps=request["steps"],
                guidance_scale=request["guidance_scale"],
                generator=torch.Generator().manual_seed(request["seed"]),
            )

    return serve


class BareEngines:
    """The deployment's ONNX graphs in plain sessions, opened as the component models open them."""

    def __init__(self, deployment: Deployment) -> None:
        self._sessions = {}
        manifest = deployment.manifest(deployment.checkpoints[0])
        for component in manifest.components.values():
            graph = deployment.models / component.model / "1" / "model.onnx"
            self._sessions[component.model] = open_session(graph, threads=0)

    def replay(self, calls: list[dict[str, Any]]) -> float:
        """Seconds of all the calls, on inputs of the same shapes; one lane a model, as Triton has one instance."""
        rng = np.random.default_rng(0)
        lanes: dict[str, list[dict[str, Any]]] = {}
        for call in calls:
            lanes.setdefault(call["model"], []).append(self._inputs(call, rng))

        def run(model: str) -> None:
            for feed in lanes[model]:
                self._sessions[model].run(None, feed)

        started = time.perf_counter()
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(run, lanes))
        return time.perf_counter() - started

    def _inputs(self, call: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        types = {one.name: one.type for one in self._sessions[call["model"]].get_inputs()}
        feed: dict[str, Any] = {}
        for name, shape in call["shapes"].items():
            if types[name] == "tensor(float)":
                feed[name] = rng.standard_normal(shape, dtype=np.float32)
            else:
                integer = np.int64 if types[name] == "tensor(int64)" else np.int32
                feed[name] = np.full(shape, 320, dtype=integer)
        return feed


def percentile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share))


def table(ours: list[Run], peer: list[Run], bare: list[float], count: int) -> str:
    rows = ["| system | images/s | p50 s | p99 s |", "|---|---|---|---|"]
    for name, runs in (("diffuserve", ours), ("diffusers behind a lock", peer)):
        rate = count / statistics.median(run.wall for run in runs)
        latencies = [latency for run in runs for latency in run.latencies]
        rows.append(f"| {name} | {rate:.2f} | {percentile(latencies, 0.5):.2f} | {percentile(latencies, 0.99):.2f} |")
    rows.append(f"| bare engines, diffuserve's calls | {count / statistics.median(bare):.2f} | | |")
    faster = statistics.median(b.wall / a.wall for a, b in zip(ours, peer, strict=True))
    share = statistics.median(1 - engine / run.wall for engine, run in zip(bare, ours, strict=True))
    rows += ["", f"diffuserve makes {faster:.2f} times the images/s of diffusers behind a lock (median of rounds)."]
    rows.append(f"Share of diffuserve's wall time that is not engine: {share:.0%} (median of rounds).")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, default=Path("build/deployments/shapes"))
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/shapes"))
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    requests = make_requests(arguments.requests)
    engines = BareEngines(Deployment.load(arguments.deployment))
    serve_locked = locked_pipeline(arguments.checkpoint)
    ours, peer, bare = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "calls.jsonl"
        options = ServerOptions(
            deployment=arguments.deployment,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            log_file=Path(folder) / "triton.log",
            environment={"DIFFUSERVE_CALL_LOG": str(log)},
        )
        with TritonServer(options) as server, Client(server.grpc_url) as client:
            server.wait_ready()
            client.generate("warm up", steps=2)
            serve_locked({**requests[0], "steps": 2})
            for number in range(arguments.rounds):
                before = len(log.read_text().splitlines())
                ours.append(run_at_once(requests, lambda one: _discard(client.generate(**one)), arguments.concurrency))
                calls = [json.loads(line) for line in log.read_text().splitlines()[before:]]
                peer.append(run_at_once(requests, serve_locked, arguments.concurrency))
                bare.append(engines.replay(calls))
                print(f"round {number + 1}: {len(calls)} engine calls for {sum(r['steps'] for r in requests)} steps")
    print(f"\n{arguments.requests} requests, {arguments.concurrency} at once, steps 4, 8, 20 or 50, half unguided:\n")
    print(table(ours, peer, bare, arguments.requests))


def _discard(_: object) -> None:
    return None


if __name__ == "__main__":
    main()
