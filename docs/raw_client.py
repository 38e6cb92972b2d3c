"""A request with tritonclient alone, without a line of diffuserve: pip install 'tritonclient[grpc]'.

python raw_client.py [HOST:PORT] [FILE]

It makes the picture of the README's first request, tells its progress, and writes it to a PNG file.
"""

import json
import queue
import sys
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

url = sys.argv[1] if len(sys.argv) > 1 else "localhost:8001"
path = Path(sys.argv[2] if len(sys.argv) > 2 else "circle.png")


def tensor(name: str, datatype: str, value: object) -> InferInput:
    """An input of one value. docs/architecture.md lists them; all but `prompt` may be left out."""
    one = InferInput(name, [1], datatype)
    kind = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}[datatype]
    one.set_data_from_numpy(np.array([value], dtype=kind))  # texts become UTF-8
    return one


inputs = [
    tensor("prompt", "BYTES", "a large red circle on a blue background"),
    tensor("steps", "INT32", 20),
    tensor("seed", "INT64", 7),
    tensor("progress_every", "INT32", 5),  # 0, the default, leaves only the picture
]

# The model is decoupled: one request, as many responses as there are events. They come in a thread of tritonclient's.
# Such a stream's errors do not say which request they are of, so each request should have a stream of its own.
answers = queue.SimpleQueue()
client = InferenceServerClient(url)
client.start_stream(callback=lambda result, error: answers.put((result, error)))
# The version is the wire's: a server that speaks another one refuses it. The empty final response tells the end.
client.async_stream_infer("diffusion", inputs, model_version="1", enable_empty_final_response=True)

try:
    while True:
        result, error = answers.get(timeout=60)
        if error is not None:
            sys.exit(error.message())  # [code] sentence {"detail": ...}
        if result.as_numpy("event") is not None:
            event = result.as_numpy("event")[0].decode()
            info = json.loads(result.as_numpy("info")[0])
            if event == "queued":
                print(f"accepted; expected in {info['eta_ms'] / 1000:.2f} s")
            elif event == "progress":
                print(f"step {result.as_numpy('step')[0]} of {result.as_numpy('steps')[0]}")
            elif event == "image":
                path.write_bytes(result.as_numpy("data")[0])
                print(f"{path}, seed {result.as_numpy('seed')[0]}, {info['queued_s'] + info['run_s']:.2f} s")
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
finally:
    client.stop_stream(cancel_requests=True)
    client.close()
