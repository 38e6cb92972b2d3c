"""`diffuserve models` and `diffuserve health`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from diffuserve.errors import UnavailableError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._command import app
from unit.client.fake_triton import FakeTriton, Script, failure, response

CHECKPOINTS: dict[str, Any] = {
    "sd15": {
        "state": "resident",
        "resident": True,
        "bytes": 2_500_000_000,
        "pinned": True,
        "requests": 2,
        "waiting": 0,
        "last_use_s": 3.2,
        "loads": 4,
        "unloads": 3,
        "load_s": 1.54,
        "weight": 2.0,
        "limits": {
            "width": {"minimum": 64, "default": 512, "maximum": 768, "step": 64},
            "steps": 150,
            "init_image": True,
            "needs_mask": False,
            "control_image": False,
            "lora_rank": 0,
        },
        "defaults": {"steps": 20, "guidance_scale": 7.5, "sampler": None},
        "samplers": ["euler", "dpmpp_2m"],
        "loras": ["night[2]"],
    },
    "broken[1]": {
        "state": "absent",
        "resident": False,
        "bytes": 1_000_000_000,
        "pinned": False,
        "requests": 0,
        "waiting": 1,
        "last_use_s": None,
        "loads": 0,
        "unloads": 0,
        "load_s": 0.0,
        "weight": 1.0,
        "error": "no model.onnx",
    },
}
STATUS = {
    "state": "serving",
    "version": "0.1.0",
    "active": 3,
    "waiting": 1,
    "resident_bytes": 2_500_000_000,
    "memory_budget": 4_000_000_000,
    "checkpoints": CHECKPOINTS,
}


def telling(**changes: Any) -> Script:
    return lambda *_: iter([response(Event(kind="status", info={**STATUS, **changes}), final=True)])


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # the command sets it, and would leave it to later tests


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_models_are_listed_as_a_table_and_as_json(fake: FakeTriton) -> None:
    fake.script = telling()
    result = run("models", "--json", "--url", fake.url)
    assert (result.exit_code, json.loads(result.stdout)) == (0, STATUS)
    assert fake.requests == [GenerateRequest(prompt="")]
    shown = run("models", "--url", fake.url).stdout
    for text in ("sd15", "resident, pinned", "2.50", "3 s ago", "1.5 s", "broken[1]", "never"):
        assert text in shown
    assert shown.splitlines()[-6:] == [
        "2.50 GB are in memory of 4.00 GB",
        "sd15: takes width 64 to 768 by 64, steps up to 150, init image, no control image, no lora rank",
        "sd15: by default steps 20, guidance scale 7.5",
        "sd15: samplers euler, dpmpp_2m",
        "sd15: LoRAs night[2]",
        "broken[1]: no model.onnx",
    ]


def test_the_table_of_models_fits_into_80_characters(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    fake.script = telling(checkpoints={"sdxl-turbo": {**CHECKPOINTS["sd15"], "pinned": False}})
    titles, row, *_ = run("models", "--url", fake.url).stdout.splitlines()
    assert titles.split() == [
        "checkpoint",
        "state",
        "GB",
        "last",
        "use",
        "weight",
        "active",
        "waiting",
        "loads",
        "load",
    ]
    assert row.split() == ["sdxl-turbo", "resident", "2.50", "3", "s", "ago", "2", "2", "0", "4", "1.5", "s"]


def test_models_of_a_server_that_is_not_there_is_an_error_in_one_line() -> None:
    result = run("models", "--url", "localhost:1")
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1


def test_health_tells_of_every_server(fake: FakeTriton) -> None:
    fake.script = telling()
    result = run("health", "--url", f"{fake.url},localhost:1")
    works, lost = result.stdout.splitlines()
    assert works.startswith(f"{fake.url}  serving  3 active, 1 waiting  ")
    assert lost.startswith("localhost:1  unreachable  cannot reach a server at localhost:1 (")
    assert result.exit_code == 3
    result = run("health", "--url", fake.url, "--url", "localhost:1", "--json")
    works, lost = json.loads(result.stdout)["servers"]
    assert works.pop("latency_s") > 0
    assert works == {
        "url": fake.url,
        "state": "serving",
        "active": 3,
        "waiting": 1,
        "version": "0.1.0",
        "error": None,
    }
    assert (lost["state"], lost["error"]["code"]) == ("unreachable", "connection_failed")
    assert run("health", "--url", fake.url).exit_code == 0


def test_health_of_servers_that_do_not_serve(fake: FakeTriton) -> None:
    fake.script = telling(state="draining")
    result = run("health", "--url", fake.url)
    assert (result.exit_code, "  draining  3 active" in result.stdout) == (4, True)
    fake.script = lambda *_: iter([failure(UnavailableError("it loads"))])
    result = run("health", "--url", fake.url)
    assert (result.exit_code, "  unreachable  it loads" in result.stdout) == (4, True)
