"""SDXL on one H100, from the logs that NVIDIA published with its MLPerf Inference v4.1 results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from diffuserve.engine import CALIBRATION_ROWS
from simulator.costs import CostTable, Line

__all__ = ["MLPERF", "NAME", "MlperfRun", "h100_table"]

NAME: Final = "sdxl-h100"


@dataclass(frozen=True)
class MlperfRun:
    """SDXL on a DGX H100, closed division: 1024 x 1024 pixels, 20 guided steps, UNet in fp8. Times are seconds.

    Offline gives all requests at once, Server sends them as a Poisson process. A GPU runs one batch at a time, taken
    from one queue: 32 pictures offline; 8 in Server, which waits for them at most `server_window`. So the shortest
    latency of each scenario is that of a whole batch which did not wait.
    """

    gpus: int = 8
    steps: int = 20
    offline_rate: float = 16.3484
    offline_batch: int = 32
    offline_requests: int = 10560
    offline_shortest: float = 15.322
    server_rate: float = 16.17
    server_completed: float = 15.72
    server_batch: int = 8
    server_window: float = 5.0
    server_seconds: float = 600.0
    server_shortest: float = 3.921
    server_p50: float = 8.377
    server_p99: float = 16.800


MLPERF: Final = MlperfRun()

# Stability AI's page of TensorRT engines for SDXL 1.0, one picture at once, fp16 and an fp32 VAE on an H100.
_VAE_FP32: Final = 0.12695
_TEXT: Final = 0.00078


def h100_table(fixed_factor: float = 1.0) -> CostTable:
    """The table, derived from the two shortest latencies: two batch sizes, so the fixed part of a UNet call and a row.

    The VAE, int8 and fp32 in MLPerf, is taken to take half of its fp32 time. With another factor the fixed part is so
    many times as large, and rows are such that an offline batch takes the same time.
    """
    vae = _VAE_FP32 / 2
    large, small = (
        (seconds - batch * (vae + 2 * _TEXT)) / MLPERF.steps
        for seconds, batch in (
            (MLPERF.offline_shortest, MLPERF.offline_batch),
            (MLPERF.server_shortest, MLPERF.server_batch),
        )
    )
    row = (large - small) / (2 * (MLPERF.offline_batch - MLPERF.server_batch))
    fixed = fixed_factor * (small - 2 * MLPERF.server_batch * row)
    row = (large - fixed) / (2 * MLPERF.offline_batch)
    return CostTable(
        name=NAME,
        source=(
            "UNet: NVIDIA, MLPerf Inference v4.1, closed, 8 x H100 SXM 80 GB, SDXL, fp8: a batch of 32 pictures took "
            "15.322 s (Offline), one of 8 took 3.921 s (Server); github.com/mlcommons/inference_results_v4.1, "
            "closed/NVIDIA/results/DGX-H100_H100-SXM-80GBx8_TRT/stable-diffusion-xl/*/performance/run_1, "
            "mlperf_log_summary.txt; batch sizes: closed/NVIDIA/configs/stable-diffusion-xl/*/__init__.py",
            "assumed: the line through these two, 16 and 64 rows, holds for fewer rows",
            "text encoding, the VAE in fp32, 126.95 ms: huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt",
            "assumed: MLPerf's int8 VAE takes half of that; calls side by side make no more progress than one alone",
            "max_rows: what an export of SDXL allows at 1024 x 1024 pixels",
            "between: docs/benchmarks.md, two CPU cores; file: a PNG of 1024 x 1024 pixels on one CPU core",
            "assumed: before, join and reply",
            "made by bench/simulator/h100.py",
        ),
        size=(1024, 1024),
        max_rows=16,
        unet={rows: round(fixed + row * rows, 6) for rows in CALIBRATION_ROWS},
        text_encoder=Line(0.0, _TEXT),
        vae_decoder=round(vae, 6),
        between=Line(0.00069, 0.00002),
        before=0.003,
        join=0.002,
        file=0.23,
        reply=0.003,
        sharing=1.0,
    )
