"""Logs as JSON: one object a line, and one line for each request that is accepted or ended.

No line holds what a request asked for: prompts stay out of the logs.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final

from diffuserve.telemetry import Telemetry

__all__ = ["JsonFormatter", "LogTelemetry", "log_as_json"]

_log: Final = logging.getLogger(__name__)

_STANDARD: Final = frozenset((*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"))


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message and request_id, then whatever a call gave as `extra`, then the exception."""

    def format(self, record: logging.LogRecord) -> str:
        extras = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": extras.pop("request_id", None),
            **extras,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value is not None}, default=str)


def log_as_json(level: str) -> None:
    """Write every logger's lines, and Python's warnings, to standard error. Raises ValueError for an unknown level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    try:
        logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    except ValueError as error:
        raise ValueError(f"the log level is {level!r}, and must be DEBUG, INFO, WARNING, ERROR or CRITICAL") from error
    logging.captureWarnings(True)


class LogTelemetry(Telemetry):
    """One line when a request is accepted, and one when it ends."""

    def accepted(self, request_id: str, checkpoint: str, eta: float) -> None:
        _log.info(
            "request accepted", extra={"request_id": request_id, "checkpoint": checkpoint, "eta_s": round(eta, 3)}
        )

    def ended(self, request_id: str, checkpoint: str, outcome: str, eta: float, seconds: float) -> None:
        facts = {"checkpoint": checkpoint, "outcome": outcome, "eta_s": round(eta, 3), "seconds": round(seconds, 3)}
        _log.info("request ended", extra={"request_id": request_id, **facts})
