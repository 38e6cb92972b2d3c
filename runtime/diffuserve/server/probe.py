"""What a Triton says about itself over HTTP, with the standard library only."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Final

from diffuserve.server.options import PUBLIC_MODEL

__all__ = ["Probe"]

#: What a server, or a proxy before it, says where models are not to be loaded this way.
_NOT_HERE: Final = frozenset({401, 403, 404, 405})


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

    def load(self, model: str) -> str | None:
        """Load a model. Why it cannot be, in the server's words; empty once it is.

        None where nobody takes such requests at this address.
        """
        try:
            with self._opener.open(f"{self._url}/v2/repository/models/{model}/load", b"{}", self._timeout) as response:
                response.read()
        except urllib.error.HTTPError as error:
            return None if error.code in _NOT_HERE else _told(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            return None if isinstance(reason, ConnectionRefusedError) else f"the server does not answer: {reason!r}"
        return ""

    def _answer(self, path: str, body: bytes | None = None) -> Any:
        try:
            with self._opener.open(self._url + path, data=body, timeout=self._timeout) as response:
                text = response.read()
            return json.loads(text) if text else ""
        except (OSError, http.client.HTTPException, ValueError):
            return None


def _told(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, in one line."""
    text = error.read().decode(errors="replace")
    try:
        text = json.loads(text)["error"]
    except (KeyError, TypeError, ValueError):
        text = text or str(error)
    return " ".join(str(text).split())
