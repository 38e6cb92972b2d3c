"""What a Triton says about itself over HTTP, with the standard library only."""

from __future__ import annotations

import http.client
import json
import urllib.request
from typing import Any

from diffuserve.server.options import PUBLIC_MODEL

__all__ = ["Probe"]


class Probe:
    """Asks one server; an answer of None means that it does not answer (yet)."""

    def __init__(self, http_url: str, timeout: float = 5.0) -> None:
        self._url = http_url
        self._timeout = timeout
        # Never through a proxy: the server is on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def server_id(self) -> str | None:
        """The `--id` that the server was started with."""
        answer = self._answer("/v2")
        return answer["name"] if isinstance(answer, dict) else None

    def is_ready(self) -> bool:
        """Whether the server is up and all its models are available."""
        return self._answer("/v2/health/ready") is not None

    def model_states(self) -> dict[str, tuple[str, str]] | None:
        """State and reason of each model: `READY`, `LOADING`, `UNLOADING`, `UNAVAILABLE` or nothing."""
        index = self._answer("/v2/repository/index", body=b"{}")
        if not isinstance(index, list):
            return None
        return {entry["name"]: (entry.get("state", ""), entry.get("reason", "")) for entry in index}

    def operate(self, operation: str, **parameters: Any) -> dict[str, Any] | None:
        """What the public model answers to an operation, in words of its own; None where it does not."""
        asked = {"prompt": "", "operation": operation, **parameters}
        answer = self._answer(f"/v2/models/{PUBLIC_MODEL}/generate", json.dumps(asked).encode())
        try:
            info = json.loads(answer["info"])
        except (KeyError, TypeError, ValueError):
            return None
        return info if isinstance(info, dict) else None

    def _answer(self, path: str, body: bytes | None = None) -> Any:
        try:
            with self._opener.open(self._url + path, data=body, timeout=self._timeout) as response:
                text = response.read()
            return json.loads(text) if text else ""
        except (OSError, http.client.HTTPException, ValueError):
            return None
