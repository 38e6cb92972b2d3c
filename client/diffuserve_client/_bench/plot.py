"""A bench's figures as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from diffuserve.errors import InvalidArgumentError
from diffuserve_client._bench.figures import figures_of
from diffuserve_client._bench.record import Run
from diffuserve_client._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLOT_SUFFIXES", "check_plot", "drawn", "pictures_over_time"]

PLOT_SUFFIXES: Final = (".png", ".svg")
_MOST_BINS: Final = 60


def check_plot(path: Path) -> None:
    """Raises InvalidArgumentError for a file that is no plot's, UnsupportedError where matplotlib is not installed."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InvalidArgumentError(f"{path.name!r} does not end in {' or '.join(PLOT_SUFFIXES)}; let it", input="plot")
    require("tools", "matplotlib.figure")


def drawn(runs: Sequence[Run], suffix: str, title: str) -> bytes:
    """The share of requests done by each latency, and images/s over time; of several loads, their rates as well."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = 3 if len(runs) > 1 else 2
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, panels))
    figure.suptitle(title)
    for run in runs:
        _draw_latencies(axes[0], run)
        _draw_timeline(axes[1], run)
    if len(runs) == 1:
        axes[1].axvspan(0, runs[0].begin, alpha=0.06, color="black", label="warm-up")
        axes[1].legend(fontsize="small")
    axes[0].set(title="latency", xlabel="seconds from arrival", ylabel="share of the requests done", ylim=(0, 1.02))
    axes[1].set(title="throughput", xlabel="seconds since the run began", ylabel="images/s", ylim=(0, None))
    axes[0].legend(fontsize="small", loc="lower right")
    if len(runs) > 1:
        _draw_rates(axes[2], runs)
    for one in axes:
        one.grid(alpha=0.3)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "diffuserve"}):  # the same figures make the same file
        figure.savefig(file, format=suffix.lower().removeprefix("."), dpi=120, metadata=_metadata(suffix))
    return file.getvalue()


def _metadata(suffix: str) -> dict[str, str | None]:
    return {"Date": None} if suffix.lower() == ".svg" else {}


def _draw_latencies(panel: Axes, run: Run) -> None:
    latencies = sorted(one.latency for one in run.measured if one.latency is not None)
    if latencies:
        panel.ecdf(latencies, label=str(run.load))


def _draw_timeline(panel: Axes, run: Run) -> None:
    edges, rates = pictures_over_time(run)
    panel.stairs(rates, edges, label=str(run.load))
    failed = [one.done for one in run.records if one.done is not None and one.error is not None]
    if failed:
        panel.plot(failed, [0.0] * len(failed), "rx", clip_on=False)


def _draw_rates(panel: Axes, runs: Sequence[Run]) -> None:
    known = [(one.images_per_s, one.latency) for one in map(figures_of, runs) if one.latency is not None]
    for share in ("p50", "p90", "p99"):
        panel.plot([rate for rate, _ in known], [getattr(latency, share) for _, latency in known], "o-", label=share)
    panel.set(title="latency against throughput", xlabel="images/s", ylabel="seconds", ylim=(0, None))
    panel.legend(fontsize="small")


def pictures_over_time(run: Run) -> tuple[list[float], list[float]]:
    """Bins' edges in seconds since the run began, and in each the images/s that were done, warm-up included."""
    done = [(one.done, one.images) for one in run.records if one.done is not None and one.error is None]
    end = max([run.end, *(at for at, _ in done)], default=0.0) or 1.0
    bins = max(1, min(_MOST_BINS, len(done) // 8))
    width = end / bins
    images = [0] * bins
    for at, count in done:
        images[min(int(at / width), bins - 1)] += count
    return [number * width for number in range(bins + 1)], [count / width for count in images]
