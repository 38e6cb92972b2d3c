"""Overload: long requests fill the server, and short ones come now and then."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffuserve.manifest import Manifest
from diffuserve.request import Event, GenerateRequest
from diffuserve.spec import TEXT_ENCODER, UNET
from measure.load import GUIDANCE
from measure.poisson import percentile
from measure.server import OurServer
from measure.tables import NO_TARGET, at_most, table
from shapes_recipe.world import trained_scenes

__all__ = ["Overload", "overload_table", "run_overload"]

LONG_REQUESTS = 32
PAUSE_SECONDS = 0.2
SLOWER_TARGET = at_most(5)
WAIT_TARGET = at_most(1)


@dataclass(frozen=True)
class Short:
    """One short request.

    When it was sent (monotonic clock), seconds until its first step was heard of and until its picture, and the number
    of the UNet call that it joined.
    """

    sent: float
    first_step: float
    total: float
    joined_at_step: int


@dataclass(frozen=True)
class Overload:
    """Short requests on the idle server, then among long ones; and the steps that each of these let pass."""

    idle: list[Short]
    among: list[Short]
    steps_waited: list[int]
    """UNet calls that began after the request's text encoding had ended and before the call that it joined."""


def run_overload(server: OurServer, manifest: Manifest, requests: int) -> Overload:
    idle = [_short(server, seed) for seed in range(10)]
    stop = threading.Event()
    # Guided, so that a text encoder call of one row is a short request's: those are not.
    long = GenerateRequest(
        prompt=trained_scenes()[0].caption, steps=50, guidance_scale=GUIDANCE, sampler="ddim", seed=1
    )

    def keep_busy(number: int) -> None:
        while not stop.is_set():
            server(replace(long, seed=number))

    threads = [threading.Thread(target=keep_busy, args=(number,), daemon=True) for number in range(LONG_REQUESTS)]
    for thread in threads:
        thread.start()
    time.sleep(2.0)  # until all of them step
    try:
        among = []
        for seed in range(requests):
            among.append(_short(server, 100 + seed))
            time.sleep(PAUSE_SECONDS)
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    return Overload(idle, among, _steps_waited(server.calls(), manifest, idle, among))


def _short(server: OurServer, seed: int) -> Short:
    """Four unguided steps of a prompt that no other request has."""
    scene = trained_scenes()[seed % len(trained_scenes())].caption
    request = GenerateRequest(prompt=f"{scene} {seed}", steps=4, guidance_scale=1.0, sampler="ddim", seed=seed)
    heard = list[float]()

    def on_progress(_: Event) -> None:
        heard.append(time.monotonic())

    sent = time.monotonic()
    picture = server.client.generate(request, on_progress=on_progress).images[0]
    total = time.monotonic() - sent
    return Short(sent, heard[0] - sent, total, int(picture.info["joined_at_step"]))


def _steps_waited(
    calls: Sequence[dict[str, Any]], manifest: Manifest, idle: Sequence[Short], among: Sequence[Short]
) -> list[int]:
    """For each short request whose text encoder call can be told from the others'."""
    unet, text_encoder = (manifest.components[name].model for name in (UNET, TEXT_ENCODER))
    starts = sorted(call["started"] for call in calls if call["model"] == unet)
    encoded = [
        (call["started"], call["started"] + call["seconds"])
        for call in calls
        if call["model"] == text_encoder and call["shapes"]["input_ids"][0] == 1
    ]
    # The server may have called the UNet before it counted: an idle server's first call after a request is its own.
    first_call = next(i for i, start in enumerate(starts) if start > idle[0].sent)
    uncounted = first_call - (idle[0].joined_at_step - 1)
    waited = []
    for one in among:
        joined = starts[one.joined_at_step - 1 + uncounted]
        ends = [end for start, end in encoded if start >= one.sent and end <= joined]
        if ends:
            waited.append(sum(min(ends) < start < joined for start in starts))
    return waited


def overload_table(result: Overload) -> str:
    usual = statistics.median(one.total for one in result.idle)
    totals, firsts = ([one.total for one in result.among], [one.first_step for one in result.among])
    slower = percentile(totals, 0.99) / usual
    waited = max(result.steps_waited, default=None)
    rows = [
        ("4 steps on the idle server, median", f"{usual:.3f} s", *NO_TARGET),
        ("4 steps among long requests, median", f"{statistics.median(totals):.3f} s", *NO_TARGET),
        ("4 steps among long requests, p99", f"{percentile(totals, 0.99):.3f} s", *NO_TARGET),
        ("its p99, times the idle server's", f"{slower:.1f}", *SLOWER_TARGET.cells(slower)),
        ("first step heard of, p99", f"{percentile(firsts, 0.99):.3f} s", *NO_TARGET),
        (
            f"steps begun between text encoding and first step, most of {len(result.steps_waited)} requests",
            "" if waited is None else str(waited),
            *WAIT_TARGET.cells(waited),
        ),
    ]
    return table(("", "measured", "target", "met"), rows)
