"""The client of a diffuserve server: prompts in, pictures out, over Triton's gRPC.

    from diffuserve_client import Client

    with Client("localhost:8001") as client:
        client.generate("a red circle", steps=20).image.save("circle.png")

Importing this package loads neither gRPC nor numpy: the first Client does.
"""

from diffuserve import __version__
from diffuserve.errors import (
    CancelledError,
    ComponentFailedError,
    DeadlineError,
    DiffuserveError,
    DrainingError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    QueueFullError,
    UnavailableError,
    UnsupportedError,
)
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._client import Client
from diffuserve_client._errors import ConnectionFailedError
from diffuserve_client._parameters import GenerateParameters
from diffuserve_client._results import GeneratedImage, GenerateResult, PictureEvent
from diffuserve_client._timeout import Timeout

__all__ = [
    "CancelledError",
    "Client",
    "ComponentFailedError",
    "ConnectionFailedError",
    "DeadlineError",
    "DiffuserveError",
    "DrainingError",
    "Event",
    "GenerateParameters",
    "GenerateRequest",
    "GenerateResult",
    "GeneratedImage",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "PictureEvent",
    "QueueFullError",
    "Timeout",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
]
