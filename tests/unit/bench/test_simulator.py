"""The simulator: nothing is lost, the same seed is the same run, the policy is the one that serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from diffuserve.engine import Step, StepPolicy
from simulator.calibrate import LoggedCall, engine_costs
from simulator.clock import Clock, Device, Lane
from simulator.costs import TABLES, CostTable, Line
from simulator.experiments import SYSTEMS, Published, make_server, published
from simulator.fleet import Result, Router, least_work, random_server, run_at_once, run_open
from simulator.h100 import MLPERF, NAME, h100_table
from simulator.inflight import InFlightServer
from simulator.lockstep import LockstepServer
from simulator.report import write_section
from simulator.workload import MIXED, UNIFORM, SimRequest, poisson

TABLE = CostTable(
    name="made up",
    source=("made up",),
    size=(64, 64),
    max_rows=16,
    unet={1: 0.02, 2: 0.03, 16: 0.17},
    text_encoder=Line(0.003, 0.001),
    vae_decoder=0.04,
    between=Line(0.001, 0.0001),
    before=0.005,
    join=0.002,
    file=0.006,
    reply=0.007,
    sharing=1.0,
)
REQUESTS = poisson(MIXED, 120, rate=3.0, seed=4)
WINDOW = 0.1


def alone(steps: int, rows: int) -> float:
    """Seconds of a request that nobody else is beside."""
    around = TABLE.before + TABLE.text_encoder(rows) + TABLE.join + TABLE.vae_decoder + TABLE.file + TABLE.reply
    return around + steps * (TABLE.unet_call(rows) + TABLE.between(rows))


def serve(system: str, servers: int = 1, requests: Sequence[SimRequest] = REQUESTS) -> Result:
    clock = Clock()
    return run_open(clock, [make_server(system, clock, TABLE) for _ in range(servers)], requests)


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_request_ends_once_and_no_row_is_lost(system: str, servers: int) -> None:
    result = serve(system, servers)

    assert Counter(one.request.key for one in result.served) == Counter(one.key for one in REQUESTS)
    assert not result.refused
    assert all(one.latency > 0 and one.sent == one.request.arrives for one in result.served)
    assert result.calls.useful == sum(one.rows * one.steps for one in REQUESTS)
    assert result.calls.rows >= result.calls.useful
    assert (result.calls.rows > result.calls.useful) == (system == "lockstep, mixed"), "only mixed batches carry rows"


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_seed_is_the_same_run(system: str) -> None:
    assert serve(system) == serve(system)
    assert poisson(MIXED, len(REQUESTS), 3.0, seed=4) == REQUESTS
    assert poisson(MIXED, len(REQUESTS), 3.0, seed=5) != REQUESTS


def test_requests_are_of_the_mix_and_come_at_the_rate() -> None:
    assert Counter(one.steps for one in REQUESTS) == dict.fromkeys(MIXED.steps, 30)
    assert sum(one.guided for one in REQUESTS) == 60
    assert sum(one.rows * one.steps for one in REQUESTS) == pytest.approx(120 * MIXED.row_steps, rel=0.1)
    assert REQUESTS[-1].arrives == pytest.approx(120 / 3.0)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_request_alone_takes_the_sum_of_its_parts(system: str, guided: bool) -> None:
    texts = ("a prompt", "")[: 1 + guided]
    result = serve(system, requests=[SimRequest(0, 20, guided, texts)])

    waited = 0.0 if system == SYSTEMS[0] else 2 * TABLE.unet_call(16)  # for others that did not come
    assert result.served[0].latency == pytest.approx(alone(20, 1 + guided) + waited)


def test_a_text_that_is_known_is_not_encoded_again() -> None:
    apart = [SimRequest(key, 4, False, ("the same",), 10.0 * key) for key in range(2)]
    first, second = serve(SYSTEMS[0], requests=apart).served
    assert first.latency - second.latency == pytest.approx(TABLE.text_encoder(1))


def test_what_steps_next_is_the_serving_policy_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    choose: Callable[..., Step | None] = StepPolicy.choose

    def noting(policy: StepPolicy, candidates: Sequence[object], now: float) -> Step | None:
        step = choose(policy, candidates, now)
        chosen.extend([step.rows] if step else [])
        return step

    clock = Clock()
    server = InFlightServer(clock, TABLE)
    assert type(server.policy) is StepPolicy
    monkeypatch.setattr(StepPolicy, "choose", noting)
    result = run_open(clock, [server], REQUESTS)
    assert len(chosen) == result.calls.calls
    assert sum(chosen) == result.calls.rows


def test_the_policy_refuses_what_is_too_much() -> None:
    clock = Clock()
    at_once = [replace(one, arrives=0.0) for one in poisson(MIXED, 300, 3.0, seed=4)]
    result = run_open(clock, [server := InFlightServer(clock, TABLE)], at_once)
    assert result.refused == 300 - server.policy.max_images
    assert result.calls.useful == sum(one.request.rows * one.request.steps for one in result.served if not one.refused)
    assert server.work == pytest.approx(0.0)


def test_short_requests_leave_while_long_ones_go_on() -> None:
    together = [SimRequest(key, steps, True, (f"{key}", "")) for key, steps in enumerate((50, 50, 4))]
    assert next(one.request.key for one in serve(SYSTEMS[0], requests=together).served) == 2
    ends = {one.request.key: one.ended for one in serve(SYSTEMS[1], requests=together).served}
    assert ends[2] == ends[0], "a mixed batch ends together"


def test_batches_of_what_is_alike_keep_to_their_steps_and_size() -> None:
    at_once = [SimRequest(key, 4 + key % 2, False, (f"{key}",)) for key in range(20)]
    clock = Clock()
    server = LockstepServer(clock, TABLE, size=8, window=WINDOW, alike=True)
    result = run_open(clock, [server], at_once)
    # Ten of each: a full batch and a rest of two.
    assert len({one.ended for one in result.served}) == 4
    assert result.calls.calls == 2 * 4 + 2 * 5
    assert result.calls.rows == result.calls.useful


def test_a_batch_waits_for_its_window_and_no_longer_than_it_is_full() -> None:
    clock = Clock()
    server = LockstepServer(clock, TABLE, size=8, window=WINDOW, alike=False)
    full = [SimRequest(key, 4, False, (f"{key}",), 0.001 * key) for key in range(8)]
    result = run_open(clock, [server], [*full, SimRequest(8, 4, False, ("8",), 50.0)])
    of_the_full = alone(4, 1) + 4 * (TABLE.unet_call(8) - TABLE.unet_call(1) + 7 * TABLE.between.each)
    of_the_full += 7 * (TABLE.text_encoder.each + TABLE.vae_decoder)
    assert result.served[0].ended == pytest.approx(0.007 + of_the_full)
    assert result.served[-1].latency == pytest.approx(WINDOW + alone(4, 1))


def test_less_work_is_a_shorter_wait_than_any_server() -> None:
    def p95(router: Router) -> float:
        clock = Clock()
        servers = [InFlightServer(clock, TABLE) for _ in range(4)]
        return run_open(clock, servers, poisson(MIXED, 200, 6.0, seed=1), router).latency(0.95)

    assert p95(least_work) < 0.9 * p95(random_server(1))


def test_at_once_keeps_so_many_in_the_server() -> None:
    clock = Clock()
    result = run_at_once(clock, [InFlightServer(clock, TABLE)], UNIFORM.requests([0.0] * 30, 1), at_once=5)
    times = sorted((time, change) for one in result.served for time, change in ((one.sent, 1), (one.ended, -1)))
    present, most = 0, 0
    for _, change in times:
        present += change
        most = max(most, present)
    assert most == 5
    assert len(result.served) == 30


def test_calls_side_by_side_share_the_device() -> None:
    ends: dict[str, float] = {}

    def run(sharing: float) -> None:
        clock = Clock()
        device = Device(clock, sharing)
        for name, seconds in (("long", 1.0), ("short", 0.3)):
            Lane(device).call(seconds, lambda name=name: ends.update({name: clock.now}))  # type: ignore[misc]
        clock.run()
        assert device.busy == pytest.approx(ends["long"])

    run(1.0)
    assert ends == {"short": pytest.approx(0.6), "long": pytest.approx(1.3)}
    run(1.5)
    assert ends == {"short": pytest.approx(0.4), "long": pytest.approx(1.1)}


def test_costs_are_found_again_in_a_log_of_calls_that_overlapped() -> None:
    clock, calls = Clock(), list[LoggedCall]()
    device = Device(clock, sharing=1.4)

    def make(component: str, rows: int, seconds: float, at: float) -> None:
        def begin() -> None:
            device.start(seconds, lambda: calls.append(LoggedCall(component, rows, at, clock.now)))

        clock.at(at, begin)

    for number in range(60):
        rows = (1, 2, 4, 8, 16)[number % 5]
        make("unet", rows, 0.01 + 0.005 * rows, at=number)
        make("vae_decoder", 1, 0.012, at=number + (0.005 if number % 2 else 0.5))
        make("text_encoder", 1 + number % 3, 0.002 + 0.001 * (number % 3), at=number + 0.7)
    clock.run()
    found = engine_costs(sorted(calls, key=lambda call: call.started))

    assert found.sharing == pytest.approx(1.4)
    assert found.unet == {rows: pytest.approx(0.01 + 0.005 * rows) for rows in (1, 2, 4, 8, 16)}
    assert found.vae_decoder == pytest.approx(0.012)
    assert found.text_encoder(2) == pytest.approx(0.003)


def test_the_h100_s_table_is_what_its_derivation_makes_and_gives_back_its_batches() -> None:
    table = CostTable.load(NAME)
    assert table == h100_table()
    for batch, seconds in (
        (MLPERF.offline_batch, MLPERF.offline_shortest),
        (MLPERF.server_batch, MLPERF.server_shortest),
    ):
        texts = table.text_encoder(2 * batch)
        made = MLPERF.steps * table.unet_call(2 * batch) + batch * table.vae_decoder + texts
        assert made == pytest.approx(seconds, rel=1e-3)


def test_the_h100_s_table_reproduces_the_published_throughput() -> None:
    rates = [one for one in published(seeds=(1,)) if one.unit == "pictures/s"]
    assert [one.published for one in rates] == [16.3484, 16.3484, 15.72]
    assert all(abs(one.off) < 0.1 for one in rates), rates
    assert Published("", 2.0, 1.0, "").off == -0.5


def test_tables_are_whole_and_say_where_they_are_from() -> None:
    names = {file.stem for file in TABLES.glob("*.json")}
    assert names == {"sdxl-h100", "shapes-cpu"}
    for name in names:
        table = CostTable.load(name)
        assert table.name == name
        assert all(table.source)
        seconds = [table.unet_call(rows) for rows in range(1, 2 * table.max_rows)]
        assert seconds == sorted(seconds)


def test_a_section_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one: written by bench/simulate.py -->\nold\n<!-- end of one -->\nafter\n")
    write_section("one", "new", page)
    write_section("one", "newer", page)
    assert page.read_text() == (
        "before\n<!-- one: written by bench/simulate.py -->\n\nnewer\n\n<!-- end of one -->\nafter\n"
    )
    with pytest.raises(ValueError, match="lacks the line"):
        write_section("two", "new", page)
