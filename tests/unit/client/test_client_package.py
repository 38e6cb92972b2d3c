"""What the package shows, and what it must not load."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import subprocess
import sys
from typing import get_type_hints

import pytest

import diffuserve_client
from diffuserve_client import Event, GenerateParameters, GenerateRequest, Timeout
from diffuserve_client._exchange import CHANNEL_OPTIONS
from diffuserve_client._results import result_from

HEAVY = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "tokenizers", "transformers", "diffusers"}
SLOW = {"grpc", "tritonclient", "numpy", "PIL", "rich", "fsspec", "s3fs", "gcsfs"}


def loaded_by(statement: str) -> set[str]:
    program = f"{statement}\nimport json, sys\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_client_loads_nothing_heavy_or_slow() -> None:
    assert loaded_by("import diffuserve_client") & (HEAVY | SLOW) == set()


def test_a_client_in_use_loads_nothing_heavy() -> None:
    loaded = loaded_by("import diffuserve_client, diffuserve_client._exchange\ndiffuserve_client.Client().close()")
    assert loaded & HEAVY == set()
    assert {"grpc", "tritonclient"} <= loaded


def test_the_commands_help_loads_no_grpc() -> None:
    assert loaded_by("import diffuserve_client._command") & (HEAVY | SLOW - {"rich"}) == set()


def test_all_is_complete_and_sorted() -> None:
    assert diffuserve_client.__all__ == sorted(diffuserve_client.__all__)
    public = {
        name
        for name, value in vars(diffuserve_client).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public | {"__version__"} == set(diffuserve_client.__all__)


def test_every_module_is_private_and_says_what_it_shows() -> None:
    for module in pkgutil.iter_modules(diffuserve_client.__path__):
        assert module.name.startswith("_")
        if module.name == "__main__":
            continue
        loaded = importlib.import_module(f"diffuserve_client.{module.name}")
        assert loaded.__doc__
        for name in loaded.__all__:
            assert hasattr(loaded, name)


def test_the_keywords_are_the_requests_fields() -> None:
    keywords = get_type_hints(GenerateParameters)
    fields = get_type_hints(GenerateRequest)
    assert keywords == {name: kind for name, kind in fields.items() if name not in ("prompt", "resume")}
    assert GenerateParameters.__required_keys__ == frozenset()


def test_values_are_frozen() -> None:
    result = result_from(GenerateRequest(prompt="a"), [Event(kind="image", info={})])
    for value, name in ((Timeout(), "total"), (result, "images"), (result.images[0], "data")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)


def test_a_default_server_tolerates_the_keepalive() -> None:
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] > 300_000
    assert options["grpc.keepalive_permit_without_calls"] == 0
    assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == -1
