"""On a real Triton: a deployment that was lost and restored, and a new version of its checkpoint under traffic."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffuserve.repository import pull, push
from diffuserve.rollout import read_table
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.server.snapshot_key import with_snapshot_key
from diffuserve_client import Client
from diffuserve_client._command import app
from integration.versions import add_version

READY = "/v2/models/diffusion/ready"


@pytest.fixture(scope="module")
def restored(deployment: Path, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deployment as a machine has it that never exported it: by way of S3."""
    place, out = f"s3://{s3.make_bucket()}/prod", tmp_path_factory.mktemp("restored") / "shop"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        (report,) = push(deployment, [place], name="shop")
        assert report.error == ""
        pull([place], "shop", out)
    return out


@pytest.fixture(scope="module")
def shop(restored: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("triton") / "triton.log"
    options = ServerOptions(deployment=restored, http_port=0, grpc_port=0, metrics_port=0, log_file=log)
    with TritonServer(with_snapshot_key(options)) as running:
        running.wait_ready()
        yield running


class Traffic:
    """Clients that ask for the shop's pictures all the time, and whether the server says that it is ready."""

    def __init__(self, server: TritonServer, client: Client) -> None:
        self._server, self._client = server, client
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.served, self.failed, self.unready = Counter[str](), list[str](), list[str]()

    def __enter__(self) -> Traffic:
        self._threads = [threading.Thread(target=act) for act in (self._ask, self._ask, self._look)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._over.is_set():
            try:
                info = self._client.generate("a ring", steps=3, checkpoint="shop").images[0].info
            except Exception as error:
                self.failed.append(repr(error))
            else:
                with self._lock:
                    self.served[str(info["checkpoint"])] += 1

    def _look(self) -> None:
        while not self._over.wait(0.05):
            try:
                with urllib.request.urlopen(self._server.http_url + READY, timeout=20) as response:
                    response.read()
            except OSError as error:
                self.unready.append(repr(error))


def status(server: TritonServer) -> dict[str, Any]:
    told = server.status(timeout=20)
    assert told is not None
    return dict(told["rollout"])


def wait(server: TritonServer, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    until = time.monotonic() + 90
    while not condition(told := status(server)):
        assert time.monotonic() < until, told
        time.sleep(0.1)
    return told


def rollout(server: TritonServer, *arguments: str) -> str:
    """Run the command, until the server follows."""
    command, *others = arguments
    where = (str(server.options.deployment), *others, "--server", server.http_url)
    result = CliRunner().invoke(app, ["rollout", command, *where])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_restored_deployment_serves_identical_pictures(shop: TritonServer, client: Client) -> None:
    with Client(shop.grpc_url) as theirs:
        for options in ({"seed": 5}, {"seed": 6, "steps": 4, "sampler": "euler_ancestral"}):
            one = client.generate("a large red circle on a blue background", **options).images[0]
            assert theirs.generate("a large red circle on a blue background", **options).images[0].data == one.data


def test_a_new_version_is_tried_promoted_and_rolled_back_under_traffic(shop: TritonServer, restored: Path) -> None:
    with Client(shop.grpc_url) as client:
        asked: dict[str, Any] = {"prompt": "a ring", "seed": 1, "steps": 3}
        first = client.generate(**asked).images[0]
        assert "alias" not in first.info
        assert "shop: shapes 100 %" in rollout(shop, "set", "shop=shapes", "--default")
        with Traffic(shop, client) as traffic:
            add_version(restored, "shapes", "shapes-v2", brightness=0.2)
            wait(shop, lambda told: told["checkpoints"] == ["shapes", "shapes-v2"])
            assert set(traffic.served) <= {"shapes"}
            second = client.generate(**asked, checkpoint="shapes-v2").images[0]
            assert second.data != first.data

            assert "shapes-v2 30 %" in rollout(shop, "set", "shop=shapes:70,shapes-v2:30")
            table, _ = read_table(restored)

            def served(tag: str) -> Any:
                return client.generate(**asked, checkpoint="shop", client_tag=tag).images[0]

            tags = [f"client {number}" for number in range(30)]
            with ThreadPoolExecutor(8) as pool:
                pictures = dict(zip(tags, pool.map(served, tags), strict=True))
            for tag, picture in pictures.items():
                expected = table.choose("shop", f"tag\0{tag}")[0]
                assert (picture.info["checkpoint"], picture.info["alias"]) == (expected, "shop")
                assert picture.data == (second if expected == "shapes-v2" else first).data
            shares = Counter(picture.info["checkpoint"] for picture in pictures.values())
            assert 4 <= shares["shapes-v2"] <= 14, "30 % of 30 are 9, give or take two standard deviations"

            add_version(restored, "shapes", "shapes-v3", broken=True)
            told = wait(shop, lambda told: told["failed"])
            assert "shapes-v3 cannot be loaded: shapes-v3_unet" in told["failed"]["shapes-v3"]
            assert told["checkpoints"] == ["shapes", "shapes-v2"]

            assert "shop: shapes-v2 100 %" in rollout(shop, "promote", "shop", "shapes-v2")
            assert {served(tag).info["checkpoint"] for tag in tags[:8]} == {"shapes-v2"}
            assert client.generate(**asked).images[0].data == second.data, "the default follows"
            assert "shop: shapes 100 %" in rollout(shop, "rollback", "shop")
            assert {served(tag).info["checkpoint"] for tag in tags[:8]} == {"shapes"}
        assert traffic.failed == []
        assert traffic.unready == []
        assert min(traffic.served[name] for name in ("shapes", "shapes-v2")) > 0
    metrics = urllib.request.urlopen(shop.metrics_url, timeout=20).read().decode()
    assert re.search(r'diffuserve_requests_accepted_total\{checkpoint="shapes-v2"\} [1-9]', metrics)


def test_a_table_that_is_no_table_changes_nothing_and_the_command_says_so(shop: TritonServer, restored: Path) -> None:
    before = status(shop)
    whole = (restored / "rollout.json").read_text()
    try:
        (restored / "rollout.json").write_text(
            json.dumps({"format_version": 1, "aliases": {"shop": 5}, "default": None})
        )
        told = wait(shop, lambda told: told["problem"])
        assert told["aliases"] == before["aliases"]
    finally:
        (restored / "rollout.json").write_text(whole)
    wait(shop, lambda told: not told["problem"])
    result = CliRunner().invoke(
        app, ["rollout", "set", str(restored), "shop=shapes-v3", "--server", shop.http_url, "--timeout", "60"]
    )
    assert result.exit_code == 1
    assert "goes on as before: the alias shop names shapes-v3" in result.stderr
    assert status(shop)["aliases"] == before["aliases"]
