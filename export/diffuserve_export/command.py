"""`python -m diffuserve_export`."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from diffuserve.spec import FAMILIES
from diffuserve_export.engines.options import PROVIDERS, EngineOptions
from diffuserve_export.errors import ExportError
from diffuserve_export.export import export_checkpoint
from diffuserve_export.options import DEFAULT_MAX_ROWS, TARGETS, ExportOptions
from diffuserve_export.quantize import QuantizeOptions
from diffuserve_export.report import Report

if TYPE_CHECKING:
    from diffuserve_export.verify import Verified

__all__ = ["app"]

_INTERRUPTED: Final = 130  # as a shell says of what SIGINT ended

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"max_content_width": 120})


class ConsoleReport(Report):
    """Progress while it works, lines of it where nobody watches a terminal, and a table of the errors at the end."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self.console, self.progress, self.start = console, progress, monotonic()
        self.task: Any = None
        self.table = Table("component", "output", "shape", "relative error", title="graphs against torch")

    def started(self, name: str, components: int) -> None:
        self.task = self.progress.add_task(f"exporting {name}", total=components)

    def stage(self, component: str, stage: str) -> None:
        self.progress.update(self.task, description=f"{stage} {component}")
        if not self.console.is_terminal:
            self.note(f"{monotonic() - self.start:6.0f} s  {stage} {component}")

    def verified(self, results: list[Verified]) -> None:
        for one in results:
            self.table.add_row(one.component, one.output, " x ".join(map(str, one.shape)), f"{one.error:.1e}")
        self.progress.advance(self.task)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="the deployment folder; what is there already stays")],
    checkpoint: Annotated[
        str, typer.Option(help="a diffusers folder, a .safetensors file, or a hub id like owner/name")
    ] = "",
    family: Annotated[str, typer.Option(help=f"of the checkpoint, or of random weights: {', '.join(FAMILIES)}")] = "",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="full-size models of the family, without a checkpoint")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="a diffusers folder with the configs of a single file")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights, which can run code")] = False,
    target: Annotated[str, typer.Option(help=f"where the graphs run: {', '.join(TARGETS)}")] = "onnxruntime-cpu",
    name: Annotated[str, typer.Option(help="the checkpoint's name in the deployment [default: from checkpoint]")] = "",
    precision: Annotated[str, typer.Option(help="of the weights and of what is computed")] = "fp32",
    vae_precision: Annotated[str, typer.Option(help="the autoencoder's own [default: what the family needs]")] = "",
    sizes: Annotated[str, typer.Option(help="min:opt:max in pixels [default: from the checkpoint]")] = "",
    max_rows: Annotated[int, typer.Option(help="the most rows of one UNet call")] = DEFAULT_MAX_ROWS,
    vae_tile: Annotated[
        int, typer.Option(help="pixels of the largest side that is decoded in one piece; 0: what the family allows")
    ] = 0,
    preview_vae: Annotated[Path | None, typer.Option(help="the folder of an AutoencoderTiny for previews")] = None,
    lora_rank: Annotated[int, typer.Option(help="rank of the LoRA adapters that requests may bring; 0: none")] = 0,
    controlnet: Annotated[
        str, typer.Option(help="a ControlNet to build in: a diffusers folder, a .safetensors file, or a hub id")
    ] = "",
    compute_capability: Annotated[
        str, typer.Option(help="tensorrt-rtx: the cards, like 80,86,89,120 [default: this machine's]")
    ] = "",
    workspace: Annotated[float, typer.Option(help="GB that one layer of an engine may use; 0: no limit")] = 0.0,
    memory_budget: Annotated[float, typer.Option(help="GB of device memory that all engines may need")] = (
        EngineOptions().memory_budget_gb
    ),
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="tensorrt: static profiles, one a row bucket")] = (
        False
    ),
    provider: Annotated[str, typer.Option(help=f"onnxruntime: {' or '.join(PROVIDERS)}")] = PROVIDERS[0],
    calibration: Annotated[
        Path | None, typer.Option(help="quantized: a file with a prompt on each line [default: the checkpoint's own]")
    ] = None,
    calibration_steps: Annotated[int, typer.Option(help="quantized: steps of a picture; 0: the checkpoint's")] = 0,
    quality_gate: Annotated[
        float, typer.Option(help="quantized: the least PSNR of its pictures against float32's, in dB")
    ] = QuantizeOptions().gate,
    quality_pictures: Annotated[int, typer.Option(help="quantized: how many are compared; 0: none")] = (
        QuantizeOptions().pictures
    ),
) -> None:
    """Export a Stable Diffusion checkpoint into a deployment folder that Triton serves."""
    console, start = Console(stderr=False), monotonic()
    try:
        options = ExportOptions(
            checkpoint=checkpoint,
            family=family,
            random_weights=random_weights,
            config=config,
            allow_pickle=allow_pickle,
            out=out,
            target=target,
            name=name,
            precision=precision,
            vae_precision=vae_precision,
            sizes=sizes,
            max_rows=max_rows,
            vae_tile=vae_tile,
            preview_vae=preview_vae,
            lora_rank=lora_rank,
            controlnet=controlnet,
            engine=EngineOptions(
                compute_capability=compute_capability,
                workspace_gb=workspace,
                memory_budget_gb=memory_budget,
                cuda_graphs=cuda_graphs,
                provider=provider,
            ),
            quantize=QuantizeOptions(
                calibration=calibration,
                steps=calibration_steps,
                gate=quality_gate,
                pictures=quality_pictures,
            ),
        )
        report = _run(options, console)
    except ExportError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        found = str(error) or f"what was in {out} before is as it was"
        Console(stderr=True).print(f"interrupted: {found}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None
    if report.table.rows:
        console.print(report.table)
        console.print(f"{options.deployed_name} is in {out} after {monotonic() - start:.0f} s", soft_wrap=True)


def _run(options: ExportOptions, console: Console) -> ConsoleReport:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        report = ConsoleReport(console, progress)
        export_checkpoint(options, report)
    return report
