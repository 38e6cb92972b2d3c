"""What a run's records say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from diffuserve_client._bench.record import INTERRUPTED, Record, Run

__all__ = ["PERCENTILES", "Distribution", "EtaError", "Figures", "figures_of", "percentile"]

PERCENTILES: Final = (50, 90, 95, 99)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a `share` of them lies, 0 to 1; between two of them, linear."""
    import numpy as np  # slow to import, and this module is loaded with the command's help

    return float(np.quantile(values, share))


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of `count` values: seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Distribution | None:
        """Of the values that are not None; None where there is none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        p50, p90, p95, p99 = (percentile(known, share / 100) for share in PERCENTILES)
        return cls(len(known), sum(known) / len(known), p50, p90, p95, p99, max(known))


@dataclass(frozen=True, slots=True)
class EtaError:
    """How far the server's forecast of each request was from what came, as a share of what came.

    `p50` and `p90` of the error without its sign; `bias` is the median with it, above 0 where less time was needed than
    forecast.
    """

    count: int
    p50: float
    p90: float
    bias: float

    @classmethod
    def of(cls, records: Sequence[Record]) -> EtaError | None:
        known = [(one.eta_s, one.served_s) for one in records if one.is_done]
        errors = [eta / served - 1 for eta, served in known if eta is not None and served]
        if not errors:
            return None
        sizes = [abs(error) for error in errors]
        return cls(len(errors), percentile(sizes, 0.5), percentile(sizes, 0.9), percentile(errors, 0.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of the requests that count: `requests` were sent, `done` answered, `errors` counted by their code, and
    `interrupted` under way when the run was ended.

    `images`, and `image_steps`, the denoising steps in them, were done in the window's `seconds`, also those of warm-up
    requests that were under way when it began. Times are in seconds from a request's arrival, of those that were done:
    to the last picture (`latency`), to the server's word that it has it (`queued`), to the first step and preview heard
    of. `queue` is the server's own: from admission to the first step. `lag` is how late the load generator itself was.
    `deadline_met` is the share of requests that were done within the deadline; None where none was set.
    """

    seconds: float
    requests: int
    done: int
    errors: Mapping[str, int]
    interrupted: int
    images: int
    images_per_s: float
    image_steps_per_s: float
    latency: Distribution | None
    queued: Distribution | None
    queue: Distribution | None
    first_step: Distribution | None
    first_preview: Distribution | None
    lag: Distribution | None
    eta_error: EtaError | None
    deadline_met: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def figures_of(run: Run, deadline_s: float | None = None) -> Figures:
    measured = run.measured
    done = [one for one in measured if one.is_done]
    ended = [one for one in measured if one.error != INTERRUPTED]
    seconds = run.end - run.begin
    in_window = [one for one in run.records if one.done is not None and run.begin < one.done <= run.end]
    pictured = [one for one in in_window if one.is_done]
    images = sum(one.images for one in pictured)
    image_steps = sum(one.images * (one.steps or 0) for one in pictured)
    return Figures(
        seconds=seconds,
        requests=len(measured),
        done=len(done),
        errors=dict(sorted(Counter(one.error for one in ended if one.error is not None).items())),
        interrupted=len(measured) - len(ended),
        images=images,
        images_per_s=images / seconds if seconds > 0 else 0.0,
        image_steps_per_s=image_steps / seconds if seconds > 0 else 0.0,
        latency=Distribution.of([one.latency for one in done]),
        queued=Distribution.of([_since_arrival(one, one.queued) for one in done]),
        queue=Distribution.of([one.queue_s for one in done]),
        first_step=Distribution.of([_since_arrival(one, one.first_step) for one in done]),
        first_preview=Distribution.of([_since_arrival(one, one.first_preview) for one in done]),
        lag=Distribution.of([one.sent - one.arrived for one in measured]),
        eta_error=EtaError.of(measured),
        deadline_met=_deadline_met(ended, deadline_s),
    )


def _since_arrival(record: Record, at: float | None) -> float | None:
    return None if at is None else at - record.arrived


def _deadline_met(ended: Sequence[Record], deadline_s: float | None) -> float | None:
    if deadline_s is None or not ended:
        return None
    return sum(one.latency is not None and one.latency <= deadline_s for one in ended) / len(ended)
