"""A real export into the folder of a server under traffic, and a rollout that changes its mind many times."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch

from diffuserve.rollout import Alias, RolloutTable, change_table, read_table
from diffuserve.server import ServerOptions, TritonServer
from diffuserve.server.snapshot_key import with_snapshot_key
from diffuserve_client import Client
from integration.test_rollout import Traffic, rollout, status, wait

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "shapes"
CHECKPOINTS = ("shapes", "shapes-v2")
DECISIONS = 60
REQUESTS = 400


def brighter(folder: Path) -> Path:
    """The reference checkpoint with an autoencoder that decodes a little brighter."""
    shutil.copytree(CHECKPOINT, folder)
    (file,) = (folder / "vae").glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    weights["decoder.conv_out.bias"] += 0.2
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_an_export_and_many_decisions_under_traffic(deployment: Path, tmp_path: Path) -> None:
    served = tmp_path / "shop"
    shutil.copytree(deployment, served, ignore=shutil.ignore_patterns("__pycache__", "snapshot.key"))
    options = ServerOptions(deployment=served, http_port=0, grpc_port=0, metrics_port=0, log_file=tmp_path / "log")
    with TritonServer(with_snapshot_key(options)) as server:
        server.wait_ready()
        with Client(server.grpc_url) as client:
            rollout(server, "set", "shop=shapes", "--default")
            with Traffic(server, client) as traffic:
                export = [sys.executable, "-m", "diffuserve_export", "--checkpoint", str(brighter(tmp_path / "v2"))]
                started = time.monotonic()
                subprocess.run([*export, "--out", str(served), "--name", "shapes-v2"], check=True, timeout=900)
                exported = time.monotonic() - started
                wait(server, lambda told: told["checkpoints"] == list(CHECKPOINTS))
                decide(server, served)
                shares = ask_many(server, client, served)
            assert traffic.failed == []
            assert traffic.unready == []
            print(
                f"exported in {exported:.0f} s, {DECISIONS} decisions; "
                f"{sum(traffic.served.values())} requests meanwhile, none failed; shares of {REQUESTS}: {shares}"
            )


def decide(server: TritonServer, served: Path) -> None:
    """Change weights, promote and roll back at random; the last table is in effect at the end."""
    chance = random.Random(7)

    def change(table: RolloutTable) -> RolloutTable:
        alias = table.aliases["shop"]
        share = chance.uniform(0.05, 0.95)
        ways: list[Any] = [
            lambda: alias.changed({"shapes": 1 - share, "shapes-v2": share}),
            lambda: alias.promoted(chance.choice(list(alias.weights))),
            lambda: alias.rolled_back() if len(alias.stable) > 1 else alias,
        ]
        return table.with_alias("shop", chance.choice(ways)())

    for _ in range(DECISIONS):
        change_table(served, CHECKPOINTS, change)
        time.sleep(chance.uniform(0.0, 0.7))  # decisions that the server sees, and some that it does not
    digest = read_table(served)[1]
    wait(server, lambda told: told["table"] == digest)


def ask_many(server: TritonServer, client: Client, served: Path) -> dict[str, int]:
    """What requests without a tag get at 80 to 20: within four standard deviations."""
    weights = {"shapes": 80.0, "shapes-v2": 20.0}
    change_table(served, CHECKPOINTS, lambda table: table.with_alias("shop", Alias.new(weights)))
    wait(
        server, lambda told: told["aliases"]["shop"]["shapes-v2"] == 0.2 if len(told["aliases"]["shop"]) > 1 else False
    )
    assert status(server)["problem"] == ""
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda _: client.generate("a ring", steps=1, checkpoint="shop").images[0].info, range(REQUESTS))
        found = Counter(str(info["checkpoint"]) for info in made)
    assert abs(found["shapes-v2"] - 0.2 * REQUESTS) < 4 * (REQUESTS * 0.2 * 0.8) ** 0.5
    return dict(found)
