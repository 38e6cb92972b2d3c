"""The `diffuserve` command.

gRPC, numpy, Pillow and rich are imported only when a request is sent, so that --help and mistakes answer at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffuserve import __version__
from diffuserve.errors import InvalidArgumentError
from diffuserve.request import Event, GenerateRequest
from diffuserve_client._client import DEFAULT_URL, Client
from diffuserve_client._doctor import DOCTOR_EXIT_CODES_HELP, doctor
from diffuserve_client._exits import EXIT_CODES_HELP, complain, errors_as_exit_codes, exit_code
from diffuserve_client._files import FORMAT_OF_SUFFIX, check_writable, numbered, write_atomically
from diffuserve_client._models import models
from diffuserve_client._repository import repository
from diffuserve_client._rollout import rollout
from diffuserve_client._timeout import Timeout

if TYPE_CHECKING:
    from rich.console import Console

    from diffuserve_client._events import PictureEvent
    from diffuserve_client._results import GenerateResult

__all__ = ["app", "exit_code"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make pictures from prompts on a diffuserve server.",
    epilog=EXIT_CODES_HELP,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffuserve {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # A command of its own for `generate` needs a callback beside it; its help is the Typer's.
    pass


app.command(epilog=EXIT_CODES_HELP)(models)
app.command(epilog=DOCTOR_EXIT_CODES_HELP)(doctor)
app.add_typer(repository, name="repository")
app.add_typer(rollout, name="rollout")


@app.command(epilog=EXIT_CODES_HELP)
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file; several images become NAME-0, NAME-1 and so on.")
    ] = Path("out.png"),
    url: Annotated[
        str, typer.Option(envvar="DIFFUSERVE_URL", help="host:port of the server's gRPC port.")
    ] = DEFAULT_URL,
    checkpoint: Annotated[str | None, typer.Option(help="A deployed checkpoint.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    prompt_syntax: Annotated[
        str | None, typer.Option(help="plain, or a1111 for (weights:1.3), [less] and BREAK in both prompts.")
    ] = None,
    clip_skip: Annotated[int | None, typer.Option(help="The text encoder's last layers to leave out.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="0 to 1: against over-exposure by guidance.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Such as euler, unipc, 'DPM++ 2M Karras'.")] = None,
    sigma_schedule: Annotated[
        str | None, typer.Option(help="normal, karras, exponential, beta or sgm_uniform.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="0 to 1: fresh noise of ddim and tcd.")] = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses SEED + i; the server draws one otherwise.")] = None,
    num_images: Annotated[int | None, typer.Option("--num-images", "-n", help="How many.")] = None,
    init_image: Annotated[Path | None, typer.Option(help="A picture to begin with: PNG, JPEG or WebP.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture of INIT_IMAGE's size: white is made anew, black is kept.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Above 0 to 1: how much of INIT_IMAGE is made anew.")] = None,
    control: Annotated[
        Path | None, typer.Option(help="A picture for the checkpoint's ControlNet: PNG, JPEG or WebP.")
    ] = None,
    control_scale: Annotated[float | None, typer.Option(help="0 to 2: how much CONTROL counts.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA of the server's, as NAME, NAME:WEIGHT or NAME:WEIGHT:truncate; as often as needed."),
    ] = None,
    image_format: Annotated[
        str | None, typer.Option("--format", help="png, jpeg or webp; else what the file's suffix says.")
    ] = None,
    priority: Annotated[int | None, typer.Option(help="Higher goes first where the server is full.")] = None,
    deadline_ms: Annotated[int | None, typer.Option(help="Refuse, or drop, what is not done by then.")] = None,
    client_tag: Annotated[str | None, typer.Option(help="Who asks: tags get equal shares of a full server.")] = None,
    preview_every: Annotated[
        int | None, typer.Option(help="Every n steps, write what it is becoming to NAME.preview, until it is done.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that the request may take in all.")] = Timeout().total,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Make a picture from a prompt. Prints each file with its seed and the seconds that the request took."""
    given: dict[str, object] = {
        "checkpoint": checkpoint,
        "negative_prompt": negative_prompt,
        "prompt_syntax": prompt_syntax,
        "clip_skip": clip_skip,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "sampler": sampler,
        "sigma_schedule": sigma_schedule,
        "eta": eta,
        "seed": seed,
        "num_images": num_images,
        "strength": strength,
        "control_scale": control_scale,
        "loras": tuple(lora) if lora else None,
        "priority": priority,
        "deadline_ms": deadline_ms,
        "client_tag": client_tag,
        "preview_every": preview_every,
    }
    with errors_as_exit_codes():
        pictures = {"init_image": init_image, "mask_image": mask, "control_image": control}
        given |= {name: _read(path) for name, path in pictures.items() if path is not None}
        request = GenerateRequest(
            prompt=prompt,
            image_format=image_format or _format_of(output),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
        paths = numbered(output, request.num_images)
        for path in paths:
            check_writable(path)
        previews = [path.with_name(f"{path.stem}.preview{path.suffix}") for path in paths]
        result, seconds = _run(request, url, timeout, previews)
        _write(paths, [image.data for image in result.images])
        for path in previews if request.preview_every else ():
            path.unlink(missing_ok=True)
        typer.echo(_as_json(result, paths, seconds) if as_json else _as_text(result, paths, seconds))


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}; give a picture's file") from error
    if not content:  # which the server would take for none
        raise InvalidArgumentError(f"{path} is empty; give a picture's file")
    return content


def _format_of(output: Path) -> str:
    image_format = FORMAT_OF_SUFFIX.get(output.suffix.lower())
    if image_format is None:
        raise InvalidArgumentError(
            f"{output.name!r} does not end in {', '.join(FORMAT_OF_SUFFIX)}; let it, or give --format",
            input="output",
        )
    return image_format


def _run(request: GenerateRequest, url: str, timeout: float, previews: list[Path]) -> tuple[GenerateResult, float]:
    def on_preview(event: PictureEvent) -> None:
        _write([previews[event.index]], [event.data])

    # gRPC's core writes lines of its own to stderr, where an error should be one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with _interrupts_held_back():
        client = Client(url, timeout=timeout)
    with client, _progress_bar(request.prompt) as on_progress:
        started = time.monotonic()
        result = client.generate(
            request, on_progress=on_progress, on_preview=on_preview if request.preview_every else None
        )
        return result, time.monotonic() - started


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C wait: in the middle of importing numpy or gRPC it would come out as their ImportError."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def _progress_bar(prompt: str) -> Iterator[Callable[[Event], None] | None]:
    """A bar on stderr, gone when done; None, and no progress asked of the server, where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console: Console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    label = " ".join(prompt.split())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(escape(label if len(label) <= 40 else f"{label[:39]}…"), total=None)
        yield lambda event: progress.update(task, completed=event.step, total=event.steps)


def _write(paths: list[Path], pictures: list[bytes]) -> None:
    for path, data in zip(paths, pictures, strict=True):
        try:
            write_atomically(path, data)
        except OSError as error:
            complain(f"cannot write {path}: {error.strerror}; choose another place with --output")
            raise typer.Exit(1) from error


def _as_text(result: GenerateResult, paths: list[Path], seconds: float) -> str:
    return "\n".join(
        f"{path}  seed {image.seed}  {seconds:.2f} s" for path, image in zip(paths, result.images, strict=True)
    )


def _as_json(result: GenerateResult, paths: list[Path], seconds: float) -> str:
    images: list[dict[str, Any]] = [
        {"path": str(path), "index": image.index, "seed": image.seed, "info": dict(image.info)}
        for path, image in zip(paths, result.images, strict=True)
    ]
    return json.dumps(
        {"images": images, "seconds": round(seconds, 3), "request": result.request.parameters()}, ensure_ascii=False
    )
