"""`diffuserve repository`: deployments to and from object storage. What speaks to storage is loaded when it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from diffuserve_client._exits import complain, errors_as_exit_codes

if TYPE_CHECKING:
    from diffuserve.repository import Listing, Progress, Pushed, Verified

__all__ = ["repository"]

_EXIT_CODES_HELP: Final = (
    "Exit codes: 0 done, and all is well; 1 a destination failed, something is damaged, or any other failure; 2 a bad "
    "value or usage, or something that is not stored; 130 Ctrl-C, after which the same command goes on where it was."
)
_PLACE: Final = "s3://bucket/prefix, gs://bucket/prefix, or a folder."

repository = typer.Typer(
    no_args_is_help=True,
    help=r"Store deployments, and restore them. Needs `pip install 'diffuserve\[storage]'`.",
    epilog=_EXIT_CODES_HELP,
)

Jobs = Annotated[int, typer.Option(min=1, max=64, help="Transfers at once, for each place.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]


@repository.command(epilog=_EXIT_CODES_HELP)
def push(
    deployment: Annotated[Path, typer.Argument(help="The folder that `make export` wrote.")],
    destinations: Annotated[list[str], typer.Argument(metavar="DESTINATION", help=_PLACE)],
    name: Annotated[str | None, typer.Option(help="What to store it as; by default the folder's name.")] = None,
    version: Annotated[
        str | None, typer.Option(help="By default made of the content: the same files are the same version.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read what is there, and send again what is damaged.")
    ] = False,
    jobs: Jobs = 8,
    as_json: AsJson = False,
) -> None:
    """Store a deployment at one or several places. What is there already is not sent again."""
    from diffuserve.repository import push

    with errors_as_exit_codes(), _progress() as progress:
        pushed = push(deployment, destinations, name=name, version=version, jobs=jobs, repair=repair, progress=progress)
    if as_json:
        typer.echo(json.dumps({"destinations": [asdict(one) for one in pushed]}, ensure_ascii=False))
    for one in pushed:
        if one.error:
            complain(one.error)
        elif not as_json:
            typer.echo(_pushed_text(one))
    if any(one.error for one in pushed):
        raise typer.Exit(1)


@repository.command(epilog=_EXIT_CODES_HELP)
def pull(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help=f"{_PLACE} Each is tried in turn.")],
    reference: Annotated[
        str, typer.Argument(metavar="NAME[@VERSION]", help="Without a version, the one whose first push was the last.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    jobs: Jobs = 8,
    as_json: AsJson = False,
) -> None:
    """Restore a deployment as a new folder, which appears when it is whole and checked.

    A deployment holds programs that the server runs: take it from places only that you trust.
    """
    from diffuserve.repository import pull

    with errors_as_exit_codes(), _progress() as progress:
        pulled = pull(sources, reference, out, jobs=jobs, progress=progress)
    for problem in pulled.problems:
        complain(problem)
    if as_json:
        typer.echo(json.dumps(asdict(pulled), ensure_ascii=False))
    else:
        typer.echo(
            f"{pulled.folder}: {pulled.name}@{pulled.version} of {pulled.created}, {pulled.files} files, "
            f"{_size(pulled.bytes)}; fetched {_size(pulled.fetched_bytes)} in {pulled.seconds:.1f} s"
        )


@repository.command(epilog=_EXIT_CODES_HELP)
def verify(
    place: Annotated[str, typer.Argument(help=f"A deployment's folder, or where deployments are stored: {_PLACE}")],
    reference: Annotated[
        str | None,
        typer.Argument(metavar="[NAME[@VERSION]]", help="Of a store: without it, everything that is stored."),
    ] = None,
    jobs: Jobs = 8,
    as_json: AsJson = False,
) -> None:
    """Read everything, and compare its digests with what was written down when it was made."""
    from diffuserve.manifest import Deployment
    from diffuserve.repository import verify_folder, verify_store

    with errors_as_exit_codes(), _progress() as progress:
        if reference is None and (Path(place) / Deployment.FILE).is_file():
            verified = verify_folder(Path(place), jobs, progress)
        else:
            verified = verify_store(place, reference, jobs=jobs, progress=progress)
    typer.echo(json.dumps(asdict(verified), ensure_ascii=False) if as_json else _verified_text(place, verified))
    if verified.problems:
        raise typer.Exit(1)


@repository.command("list", epilog=_EXIT_CODES_HELP)
def list_stored(
    place: Annotated[str, typer.Argument(help=_PLACE)],
    name: Annotated[str | None, typer.Argument(help="One deployment only.")] = None,
    jobs: Jobs = 8,
    as_json: AsJson = False,
) -> None:
    """Show names, versions, bytes and dates of what is stored, the newest of each name first."""
    from diffuserve.repository import list_versions

    with errors_as_exit_codes():
        listing = list_versions(place, name, jobs=jobs)
    if as_json:
        typer.echo(json.dumps(asdict(listing), ensure_ascii=False))
    else:
        _print_table(listing)
        for problem in listing.problems:
            complain(problem)
    if listing.problems:
        raise typer.Exit(1)


def _pushed_text(one: Pushed) -> str:
    newer = f"; `pull {one.name}` gets the newer {one.newest}" if one.is_outdated else ""
    return (
        f"{one.destination}: {one.name}@{one.version}, {one.files} files, {_size(one.bytes)}; sent "
        f"{_size(one.sent_bytes)} in {one.seconds:.1f} s, {one.kept} of {one.sent + one.kept} contents were there"
        f"{newer}"
    )


def _verified_text(place: str, verified: Verified) -> str:
    lines = [
        " ".join(filter(None, (one.of, f"{one.path}:" if one.path else "", one.problem))) for one in verified.problems
    ]
    found = f"{len(lines)} problems" if lines else "all as it was written"
    return "\n".join([*lines, f"{place}: {verified.files} files read, {_size(verified.bytes)}: {found}"])


def _print_table(listing: Listing) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "version", "pushed", "checkpoints", box=None, pad_edge=False)
    for column in ("files", "bytes", "its own"):
        table.add_column(column, justify="right")
    for one in listing.versions:
        numbers = str(one.files), _size(one.bytes), _size(one.own_bytes)
        table.add_row(one.name, one.version, one.created, ", ".join(one.checkpoints), *numbers)
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    if listing.versions:
        console.print(table)
    console.print(f"{len(listing.versions)} versions, {_size(listing.bytes)} stored")


def _size(count: int) -> str:
    """Bytes as people read them, in powers of 1000."""
    value, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.95 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


@contextmanager
def _progress() -> Iterator[Progress]:
    """Bars on stderr, one for each place, gone when done; none where nobody looks."""
    from diffuserve.repository import Progress

    if not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    class Shown(Progress):
        def began(self, label: str, total: int) -> None:
            tasks[label] = bars.add_task(escape(label[-60:]), total=total)

        def advanced(self, label: str, count: int) -> None:
            bars.advance(tasks[label], count)

    with bars:
        yield Shown()
