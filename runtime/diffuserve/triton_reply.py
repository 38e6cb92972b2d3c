"""A request's way back to its client through Triton."""

from __future__ import annotations

import logging
import threading
from typing import Any, Final

import triton_python_backend_utils as pb_utils

from diffuserve import errors, wire
from diffuserve.cancellation import CancelWatch
from diffuserve.request import Event

__all__ = ["TritonReply"]

_log: Final = logging.getLogger(__name__)

# Names and not values: Triton puts its classes into pb_utils only after it has imported the model.
_STATUS: Final = {
    "invalid_argument": "INVALID_ARG",
    "not_found": "NOT_FOUND",
    "unsupported": "UNSUPPORTED",
    "cancelled": "CANCELLED",
    "unavailable": "UNAVAILABLE",
    "queue_full": "UNAVAILABLE",
    "deadline": "UNAVAILABLE",
    "draining": "UNAVAILABLE",
}


class TritonReply:
    """One request's response sender, let go with its last response: Triton cannot unload while one is held.

    Triton frees what a question about cancelling reads when the last response is sent: asking meanwhile ends the
    server's process with a segmentation fault. Hence the lock.
    """

    def __init__(self, sender: Any, watch: CancelWatch) -> None:
        self._sender: Any = sender
        self._lock = threading.Lock()
        self._cancelled = False
        self._watch = watch
        watch.add(self)

    def send(self, event: Event, *, final: bool) -> None:
        """Raises InternalError where Triton does not take it; of a last one, that is what the client gets instead."""
        try:
            tensors = [pb_utils.Tensor(name, array) for name, array in wire.encode_event(event).items()]
            self._send(pb_utils.InferenceResponse(output_tensors=tensors), final)
        except Exception as error:
            failure = errors.InternalError(
                f"a response cannot be handed to Triton ({error}); where memory is short, give the server more of it, "
                "and its container more shared memory (--shm-size)"
            )
            if not final:
                raise failure from error
            _log.exception("a last response could not be sent")
            self.fail(failure)

    def fail(self, error: errors.DiffuserveError) -> None:
        status = getattr(pb_utils.TritonError, _STATUS.get(error.code, "INTERNAL"))
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(error.to_wire(), status))
        try:
            self._send(response, final=True)
        finally:
            with self._lock:
                self._let_go()

    def is_cancelled(self) -> bool:
        return self._cancelled or self._sender is None

    def ask(self) -> bool:
        with self._lock:
            if self._sender is None:
                return False
            self._cancelled = bool(self._sender.is_cancelled())
            return not self._cancelled

    def _send(self, response: Any, final: bool) -> None:
        with self._lock:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
            if final:
                self._let_go()

    def _let_go(self) -> None:
        self._sender = None
        self._watch.discard(self)
