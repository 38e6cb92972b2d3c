"""`diffuserve generate`, `img2img` and `inpaint`: one request, and its pictures as files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from diffuserve.errors import InvalidArgumentError
from diffuserve.request import IMAGE_FORMATS, GenerateRequest
from diffuserve_client._exits import complain, errors_as_exit_codes
from diffuserve_client._files import FORMAT_OF_SUFFIX, check_writable, numbered, write_atomically
from diffuserve_client._options import AsJson, ConnectionOptions, open_client, with_options
from diffuserve_client._request_options import FromImage, Prompt, RequestOptions, one_of, request_from_options
from diffuserve_client._terminal import watching

if TYPE_CHECKING:
    from diffuserve_client._events import PictureEvent
    from diffuserve_client._results import GenerateResult

__all__ = ["generate", "img2img", "inpaint"]

_SHOWN_PREVIEWS: Final = 5  # steps between two, where nobody asked for a number


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What becomes of the pictures."""

    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file; several images become NAME-0, NAME-1 and so on.")
    ] = Path("out.png")
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="png, jpeg or webp; else what the file's suffix says.",
            autocompletion=one_of(IMAGE_FORMATS),
        ),
    ] = None
    metadata: Annotated[
        bool,
        typer.Option(
            "--metadata/--no-metadata", help="Write into the file how it was made, for --from-image and the web UIs."
        ),
    ] = True
    preview_every: Annotated[
        int | None, typer.Option(help="Every n steps, write what it is becoming to NAME.preview, until it is done.")
    ] = None
    show: Annotated[
        bool | None,
        typer.Option(
            "--show/--no-show",
            help="Show in the terminal what it is becoming, and then the picture.",
            show_default="where the terminal can",
        ),
    ] = None
    as_json: AsJson = False

    @property
    def format_or_suffix(self) -> str:
        """Raises InvalidArgumentError where neither says a format."""
        image_format = self.image_format or FORMAT_OF_SUFFIX.get(self.output.suffix.lower())
        if image_format is None:
            raise InvalidArgumentError(
                f"{self.output.name!r} does not end in {', '.join(FORMAT_OF_SUFFIX)}; let it, or give --format",
                input="output",
            )
        return image_format


@with_options
def generate(
    *,
    prompt: Prompt = None,
    init_image: Annotated[
        Path | None,
        typer.Option(help="A picture to begin with: PNG, JPEG or WebP.", rich_help_panel="Picture"),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="A picture of INIT_IMAGE's size: white is made anew, black is kept.", rich_help_panel="Picture"
        ),
    ] = None,
    from_image: FromImage = None,
    options: RequestOptions,
    output: OutputOptions,
    connection: ConnectionOptions,
) -> None:
    """Make a picture from a prompt. Prints each file with its seed and the seconds that the request took."""
    _make(prompt, options, output, connection, init_image=init_image, mask_image=mask, from_image=from_image)


@with_options
def img2img(
    *,
    init: Annotated[Path, typer.Argument(help="The picture to begin with: PNG, JPEG or WebP.")],
    prompt: Prompt = None,
    from_image: FromImage = None,
    options: RequestOptions,
    output: OutputOptions,
    connection: ConnectionOptions,
) -> None:
    """Make a picture from a picture and a prompt; --strength says how much of it is made anew."""
    _make(prompt, options, output, connection, init_image=init, from_image=from_image)


@with_options
def inpaint(
    *,
    init: Annotated[Path, typer.Argument(help="The picture to begin with: PNG, JPEG or WebP.")],
    mask: Annotated[Path, typer.Argument(help="A picture of its size: white is made anew, black is kept.")],
    prompt: Prompt = None,
    from_image: FromImage = None,
    options: RequestOptions,
    output: OutputOptions,
    connection: ConnectionOptions,
) -> None:
    """Make a part of a picture anew, from a prompt."""
    _make(prompt, options, output, connection, init_image=init, mask_image=mask, from_image=from_image)


def _make(
    prompt: str | None,
    options: RequestOptions,
    output: OutputOptions,
    connection: ConnectionOptions,
    **pictures: Path | None,
) -> None:
    with errors_as_exit_codes():
        request = request_from_options(
            prompt, options, image_format=output.format_or_suffix, preview_every=output.preview_every, **pictures
        )
        paths = numbered(output.output, request.num_images)
        for path in paths:
            check_writable(path)
        result, seconds = _run(request, output, connection, paths)
        _write(paths, [image.to_bytes(metadata=output.metadata) for image in result.images])
        typer.echo(_as_json(result, paths, seconds) if output.as_json else _as_text(result, paths, seconds))


def _run(
    request: GenerateRequest, output: OutputOptions, connection: ConnectionOptions, paths: Sequence[Path]
) -> tuple[GenerateResult, float]:
    writes = bool(request.preview_every)
    with open_client(connection) as client, watching(request, show=output.show) as watcher:
        if watcher.shows and not writes:
            request = replace(request, preview_every=_SHOWN_PREVIEWS)
        with _preview_files(paths if writes else ()) as write_preview:

            def on_preview(event: PictureEvent) -> None:
                if writes:
                    write_preview(event)
                watcher.show(event.index, event.data)

            started = time.monotonic()
            result = client.generate(
                request,
                on_progress=watcher.on_progress,
                on_preview=on_preview if request.preview_every else None,
            )
        seconds = time.monotonic() - started
        for image in result.images:
            watcher.show(image.index, image.data)
    return result, seconds


@contextmanager
def _preview_files(paths: Sequence[Path]) -> Iterator[Callable[[PictureEvent], None]]:
    """Writes previews into files of their own, which are gone at the end.

    Raises InvalidArgumentError where such a file is there already: whose name nobody gave is not written over.
    """
    previews = [path.with_name(f"{path.stem}.preview{path.suffix}") for path in paths]
    for path in previews:
        check_writable(path)
        if path.exists():
            raise InvalidArgumentError(
                f"{path} is there already, and is no preview of this request; move it away, or choose another --output",
                input="output",
            )
    written = set[Path]()

    def write(event: PictureEvent) -> None:
        path = previews[event.index]
        _write([path], [event.data])
        written.add(path)

    try:
        yield write
    finally:
        for path in written:
            with suppress(OSError):
                path.unlink()


def _write(paths: Sequence[Path], pictures: Sequence[bytes]) -> None:
    for path, data in zip(paths, pictures, strict=True):
        try:
            write_atomically(path, data)
        except OSError as error:
            complain(f"cannot write {path}: {error.strerror}; choose another place with --output")
            raise typer.Exit(1) from error


def _as_text(result: GenerateResult, paths: Sequence[Path], seconds: float) -> str:
    return "\n".join(
        f"{path}  seed {image.seed}  {seconds:.2f} s" for path, image in zip(paths, result.images, strict=True)
    )


def _as_json(result: GenerateResult, paths: Sequence[Path], seconds: float) -> str:
    images: list[dict[str, Any]] = [
        {"path": str(path), "index": image.index, "seed": image.seed, "info": dict(image.info)}
        for path, image in zip(paths, result.images, strict=True)
    ]
    told = {"images": images, "seconds": round(seconds, 3), "request": result.request.parameters()}
    return json.dumps(told, ensure_ascii=False)
