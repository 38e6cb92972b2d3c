"""moto's S3 server on a free port of loopback: what s3fs speaks to in tests."""

from __future__ import annotations

import itertools
import logging
from typing import Any

__all__ = ["S3Server"]


class S3Server:
    """Runs in a thread of this process. `environment` is what s3fs and boto3 find it by."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
        self._server: Any = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._numbers = itertools.count()

    def __enter__(self) -> S3Server:
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.stop()

    def make_bucket(self) -> str:
        """The name of a new and empty bucket."""
        from moto.s3.models import s3_backends

        name = f"bucket-{next(self._numbers)}"
        s3_backends["123456789012"]["aws"].create_bucket(name, "us-east-1")
        return name
