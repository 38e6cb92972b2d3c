"""Start the real server on free ports, ask for one picture over gRPC, and say what an oracle sees in it."""

from __future__ import annotations

import sys
from pathlib import Path

from diffuserve.server import ServerOptions, TritonServer
from diffuserve_client import Client
from shapes_recipe.oracle import judge
from shapes_recipe.world import Scene

DEPLOYMENT = Path("build/deployments/shapes")
OUTPUT = Path("build/demo.png")
SEED = 7


def main(prompt: str) -> int:
    options = ServerOptions(
        deployment=DEPLOYMENT, http_port=0, grpc_port=0, metrics_port=0, log_file=Path("build/demo.log")
    )
    print("starting Triton ...")
    with TritonServer(options) as server:
        server.wait_ready()
        print(f"serving on {server.grpc_url} (gRPC); asking for {prompt!r}")
        with Client(server.grpc_url) as client:
            picture = client.generate(prompt, seed=SEED).images[0]
    picture.save(OUTPUT)
    print(f"wrote {OUTPUT}: seed {picture.seed}, {picture.info['run_s']:.2f} s in the engine's loop")
    return _judge(prompt, picture.image)


def _judge(prompt: str, image: object) -> int:
    verdict = judge(image)
    seen = verdict.seen.caption if verdict.seen else f"none of its scenes: {verdict.reason}"
    print(f"the oracle sees {seen}")
    try:
        asked = Scene.from_caption(prompt)
    except ValueError:
        print("the prompt is beyond the reference checkpoint's small world, so no verdict")
        return 0
    return 0 if verdict.matches(asked) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
