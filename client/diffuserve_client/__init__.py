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
from diffuserve_client._async_client import AsyncClient
from diffuserve_client._client import Client
from diffuserve_client._deployed import Checkpoint, Health
from diffuserve_client._errors import ConnectionFailedError
from diffuserve_client._events import (
    ImageEvent,
    PictureEvent,
    PreviewEvent,
    ProgressEvent,
    QueuedEvent,
    SnapshotEvent,
)
from diffuserve_client._parameters import GenerateParameters
from diffuserve_client._results import GeneratedImage, GenerateResult
from diffuserve_client._retry import Retry
from diffuserve_client._security import Tls
from diffuserve_client._timeout import Timeout

__all__ = [
    "AsyncClient",
    "CancelledError",
    "Checkpoint",
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
    "Health",
    "ImageEvent",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "PictureEvent",
    "PreviewEvent",
    "ProgressEvent",
    "QueueFullError",
    "QueuedEvent",
    "Retry",
    "SnapshotEvent",
    "Timeout",
    "Tls",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
]
