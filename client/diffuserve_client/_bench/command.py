"""`diffuserve bench`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from diffuserve import __version__
from diffuserve.errors import InvalidArgumentError
from diffuserve_client._bench.load import ClosedLoop, Extent, Load, OpenLoop
from diffuserve_client._bench.mix import DEFAULT_PROMPTS, Mix, read_prompts
from diffuserve_client._bench.plot import check_plot, drawn
from diffuserve_client._bench.record import Record
from diffuserve_client._bench.report import Bench
from diffuserve_client._bench.run import run_load
from diffuserve_client._exits import EXIT_INTERRUPTED, complain, errors_as_exit_codes
from diffuserve_client._files import check_writable, write_atomically
from diffuserve_client._options import ConnectionOptions, connection_arguments, with_options
from diffuserve_client._retry import NO_RETRY

if TYPE_CHECKING:
    from diffuserve_client._async_client import AsyncClient
    from diffuserve_client._deployed import Health

__all__ = ["LoadOptions", "MixOptions", "bench"]

_STDOUT: Final = Path("-")
_DEFAULT_REQUESTS: Final = 50


def _option(panel: str, text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **more)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How much is asked, when, and for how long."""

    concurrency: Annotated[
        str | None,
        _option("Load", "Closed loop: requests under way at once; with commas, one run for each.", show_default="1"),
    ] = None
    rate: Annotated[
        str | None,
        _option("Load", "Open loop: requests a second, Poisson arrivals; with commas, one run for each."),
    ] = None
    requests: Annotated[
        int | None, _option("Load", "Requests that each run measures.", show_default=str(_DEFAULT_REQUESTS))
    ] = None
    duration: Annotated[float | None, _option("Load", "Seconds for which each run sends, instead.")] = None
    warm_up: Annotated[int, _option("Load", "Requests that each run begins with and does not count.")] = 8

    def loads(self) -> list[Load]:
        """Raises InvalidArgumentError."""
        if self.concurrency is not None and self.rate is not None:
            raise InvalidArgumentError(
                "--concurrency asks for a closed loop and --rate for an open one; give one of them", input="rate"
            )
        if self.rate is not None:
            return [OpenLoop(rate) for rate in _listed("rate", self.rate, float)]
        return [ClosedLoop(one) for one in _listed("concurrency", self.concurrency or "1", int)]

    def extent(self) -> Extent:
        """Raises InvalidArgumentError."""
        default = _DEFAULT_REQUESTS if self.duration is None and self.requests is None else self.requests
        return Extent(default, self.duration, self.warm_up)


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """What is asked for."""

    prompt: Annotated[list[str] | None, _option("Mix", "A prompt; as often as needed.")] = None
    prompts: Annotated[
        Path | None,
        _option("Mix", "A file of prompts: text, one a line; or .jsonl or .yaml, with parameters of their own."),
    ] = None
    steps: Annotated[str | None, _option("Mix", "Denoising steps, such as 4,8,20,50: drawn for each request.")] = None
    sampler: Annotated[str | None, _option("Mix", "Samplers, with commas.")] = None
    checkpoint: Annotated[str | None, _option("Mix", "Deployed checkpoints, with commas.")] = None
    size: Annotated[str | None, _option("Mix", "Sizes in pixels, such as 512x512,768x512.")] = None
    guidance_scale: Annotated[float | None, _option("Mix", "How closely to follow the prompt.")] = None
    guided_share: Annotated[float | None, _option("Mix", "0 to 1: this share has guidance, the others have none.")] = (
        None
    )
    num_images: Annotated[int, _option("Mix", "Pictures of each request.")] = 1
    deadline_ms: Annotated[
        int, _option("Mix", "Each request's deadline, which the server keeps or refuses; 0 is none.")
    ] = 0
    client_tag: Annotated[str, _option("Mix", "Who asks, for the server's fair shares.")] = ""
    progress_every: Annotated[
        int, _option("Mix", "Every n steps, be told of it, and once when to expect the picture; 0 is never.")
    ] = 1
    preview_every: Annotated[int, _option("Mix", "Every n steps, be sent a preview; 0 is never.")] = 0
    seed: Annotated[int, _option("Mix", "Of the mix and the arrivals: the same seed sends the same.")] = 0

    def mix(self) -> Mix:
        """Raises InvalidArgumentError."""
        prompts: list[dict[str, Any]] = [{"prompt": one} for one in self.prompt or ()]
        prompts += read_prompts(self.prompts) if self.prompts is not None else []
        fixed = ("num_images", "deadline_ms", "client_tag", "progress_every", "preview_every")
        return Mix(
            prompts=prompts or [{"prompt": one} for one in DEFAULT_PROMPTS],
            steps=_listed("steps", self.steps, int),
            samplers=_listed("sampler", self.sampler, str),
            checkpoints=_listed("checkpoint", self.checkpoint, str),
            sizes=_listed("size", self.size, _size),
            guided_share=self.guided_share,
            guidance_scale=self.guidance_scale,
            fixed={name: getattr(self, name) for name in fixed},
            seed=self.seed,
        )


@with_options
def bench(
    connection: ConnectionOptions,
    load: LoadOptions,
    mix: MixOptions,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write figures and raw records as JSON; - is stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw latencies and throughput: .png or .svg; extra `tools`.")
    ] = None,
) -> None:
    """Put a load on a server, and tell latencies and throughput. Ctrl-C ends it early, and tells what was measured."""
    with errors_as_exit_codes():
        _refuse_retries(connection)
        asked, loads, extent = mix.mix(), load.loads(), load.extent()
        _check_files(json_file, plot)
        arguments = connection_arguments(connection) | {"retry": NO_RETRY}
        # gRPC's core writes lines of its own to stderr, where an error should be one line.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        done = asyncio.run(_measure(arguments, loads, extent, asked, mix.deadline_ms))
    _tell(done, json_file, plot)
    if any(run.interrupted for run in done.runs):
        complain("interrupted; these are the figures until then")
        raise typer.Exit(EXIT_INTERRUPTED)
    if not any(done.figures(run).done for run in done.runs):
        first = next(one for run in done.runs for one in run.records if one.error is not None)
        complain(f"no request was done; the first one's error: {first.message}")
        raise typer.Exit(1)


def _refuse_retries(connection: ConnectionOptions) -> None:
    if connection.retries:
        raise InvalidArgumentError(
            f"--retries, or DIFFUSERVE_RETRIES, is {connection.retries}, and bench never tries again, for its figures "
            "would be of both tries; give --retries 0",
            input="retries",
        )


def _check_files(json_file: Path | None, plot: Path | None) -> None:
    """A load that took minutes should not end with a file that cannot be written."""
    if json_file is not None and json_file != _STDOUT:
        check_writable(json_file)
    if plot is not None:
        check_plot(plot)
        check_writable(plot)


async def _measure(
    arguments: dict[str, Any], loads: Sequence[Load], extent: Extent, mix: Mix, deadline_ms: int
) -> Bench:
    from diffuserve_client._async_client import AsyncClient

    async with AsyncClient(**arguments) as client:
        servers = await _reached(client)
        runs = []
        with _stopped_by_interrupt() as stop:
            for load in loads:
                with _progress_bar(str(load), extent) as on_record:
                    requests = mix.requests()
                    run = await run_load(client, load, extent, requests, seed=mix.seed, stop=stop, on_record=on_record)
                runs.append(run)
                if stop.is_set():
                    break
        return Bench(_description(client, servers, extent, mix), deadline_ms / 1000 if deadline_ms else None, runs)


async def _reached(client: AsyncClient) -> tuple[Health, ...]:
    """Every server must be there, for what is left of a fleet is another fleet. Raises DiffuserveError."""
    servers = await client.health()
    for one in servers:
        if one.error is not None:
            raise one.error
    return servers


def _description(client: AsyncClient, servers: Sequence[Health], extent: Extent, mix: Mix) -> dict[str, Any]:
    return {
        "client_version": __version__,
        "server_versions": [one.version for one in servers],
        "urls": len(servers),
        "timeout": asdict(client.timeout),
        "extent": asdict(extent),
        "mix": mix.described(),
    }


@contextmanager
def _stopped_by_interrupt() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C sets; the second one is a KeyboardInterrupt."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    with contextlib.suppress(NotImplementedError):  # on Windows, where it is a KeyboardInterrupt at once
        loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        with contextlib.suppress(NotImplementedError):
            loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _progress_bar(label: str, extent: Extent) -> Iterator[Callable[[Record], None] | None]:
    """A bar on stderr, gone when done; None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    ended = failed = 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = None if extent.requests is None else extent.requests + extent.warm_up
        task = progress.add_task(label, total=total, told="")

        def on_record(record: Record) -> None:
            nonlocal ended, failed
            ended, failed = ended + 1, failed + (record.error is not None)
            progress.update(task, completed=ended, told=f"{ended} ended, {failed} errors")

        yield on_record


def _tell(done: Bench, json_file: Path | None, plot: Path | None) -> None:
    from rich.console import Console

    # Where stdout is for the JSON, the tables are for whoever looks on.
    done.print(Console(stderr=json_file == _STDOUT))
    if json_file == _STDOUT:
        typer.echo(done.as_json())
    elif json_file is not None:
        _write(json_file, f"{done.as_json()}\n".encode())
    if plot is not None:
        title = f"diffuserve {__version__}, {done.description['urls']} server(s)"
        _write(plot, drawn(done.runs, plot.suffix, title))


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        complain(f"cannot write {path}: {error.strerror}; choose another place")
        raise typer.Exit(1) from error


def _listed(name: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    """A list with commas. Raises InvalidArgumentError."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    values = []
    for part in parts:
        try:
            if not part:
                raise ValueError
            values.append(kind(part))
        except ValueError as error:
            raise InvalidArgumentError(
                f"--{name} has {part!r}, and must be {_WORDS[kind]}, or several with commas", input=name, value=part
            ) from error
    return values


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


_WORDS: Final[dict[Callable[[str], Any], str]] = {
    int: "a whole number",
    float: "a number",
    str: "a name",
    _size: "a size such as 512x512",
}
