"""`diffuserve storyboard`: scenes from a file, as a GIF, a film or a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from diffuserve.errors import CancelledError, DiffuserveError, InvalidArgumentError
from diffuserve_client._exits import errors_as_exit_codes
from diffuserve_client._files import FORMAT_OF_SUFFIX, check_writable
from diffuserve_client._options import AsJson, ConnectionOptions, open_client, with_options
from diffuserve_client._studio.batch import Batch, OnEvent, progress_shown, run_batch
from diffuserve_client._studio.film import FILM_SUFFIXES, check_encoder, film, frame_counts
from diffuserve_client._studio.folder import Folder, encoded, filled_folder, write_told
from diffuserve_client._studio.options import Concurrency, Overwrite, SettingOptions
from diffuserve_client._studio.scenes import Scene, read_scenes

if TYPE_CHECKING:
    from diffuserve_client._client import Client
    from diffuserve_client._results import GenerateResult

__all__ = ["storyboard"]

DEFAULT_FPS: Final = 25
_Told = TypeVar("_Told")
_SUFFIXES: Final = (*FILM_SUFFIXES, *FORMAT_OF_SUFFIX)


@with_options
def storyboard(
    connection: ConnectionOptions,
    setting: SettingOptions,
    file: Annotated[Path, typer.Argument(help="A prompt on each line, or YAML (.yaml): see the documentation.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .gif or .mp4, or a picture for a contact sheet.")
    ] = Path("storyboard.gif"),
    frames: Annotated[
        Path | None, typer.Option(help="The folder for the pictures.", show_default="NAME-frames")
    ] = None,
    overwrite: Overwrite = False,
    duration: Annotated[float | None, typer.Option(help="Seconds that a scene is shown.", show_default="1")] = None,
    fps: Annotated[
        int | None, typer.Option(min=1, max=60, help="Frames a second of an MP4.", show_default="25")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Of scenes that begin with the picture before: how much is made anew.")
    ] = None,
    concurrency: Concurrency = 16,
    as_json: AsJson = False,
) -> None:
    """Make the scenes of a file, with one seed and one style, and put them together in their order."""
    given = {**setting.given(), "duration": duration, "strength": strength}
    with errors_as_exit_codes():
        scenes = read_scenes(file, {name: value for name, value in given.items() if value is not None})
        _check_output(output, fps, duration)
        path = frames or output.with_name(f"{output.stem}-frames")
        with filled_folder(path, overwrite=overwrite, option="--frames") as folder:
            with open_client(connection) as client:
                batch = _made(client, folder, scenes, concurrency)
            batch.exit_unless_whole([f"of scene {number}" for number in range(1, len(scenes) + 1)])
            told = _written(output, folder, scenes, batch, fps or DEFAULT_FPS)
        typer.echo(json.dumps(told, ensure_ascii=False) if as_json else _as_text(told))


def _check_output(output: Path, fps: int | None, duration: float | None) -> None:
    """Raises InvalidArgumentError for what could only fail in the end; UnsupportedError where it cannot be written."""
    suffix = output.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InvalidArgumentError(f"{output.name!r} does not end in {', '.join(_SUFFIXES)}; let it", input="output")
    check_writable(output)
    if fps is not None and suffix != ".mp4":
        raise InvalidArgumentError(f"fps is given, and {output.name} is no .mp4; leave it out", input="fps")
    if suffix in FILM_SUFFIXES:
        check_encoder(suffix)
    elif duration is not None:
        raise InvalidArgumentError(f"duration is given, and {output.name} is no film; leave it out", input="duration")


def _name(place: int) -> str:
    return f"{place + 1:03}.png"


def _made(client: Client, folder: Folder, scenes: Sequence[Scene], concurrency: int) -> Batch:
    """Make the pictures; each is in the folder as soon as it is there."""

    def on_done(place: int, result: GenerateResult) -> None:
        folder.save(result, _name(place))

    with progress_shown(len(scenes), "scenes") as on_event:
        batch = _run_waves(client, scenes, concurrency, on_done, on_event)
    batch.raise_if_empty()
    return batch


def _run_waves(
    client: Client,
    scenes: Sequence[Scene],
    concurrency: int,
    on_done: Callable[[int, GenerateResult], None],
    on_event: OnEvent | None,
) -> Batch:
    """At once what can be: first every scene that needs no other, then those that begin with them, and so on."""
    outcomes: dict[int, GenerateResult | DiffuserveError] = {}
    for wave in _waves(scenes):
        ready = {}
        for place in wave:
            before = outcomes[place - 1] if scenes[place].from_previous else None
            if isinstance(before, DiffuserveError):
                outcomes[place] = CancelledError("not made: the picture before it was not")
            else:
                ready[place] = scenes[place].request(b"" if before is None else before.images[0].data)
        places = list(ready)
        batch = run_batch(
            client,
            list(ready.values()),
            concurrency=concurrency,
            on_done=_placed(places, on_done),
            on_event=None if on_event is None else _placed(places, on_event),
        )
        outcomes |= dict(zip(places, batch.outcomes, strict=True))
        if batch.interrupted:
            rest = CancelledError("not made: interrupted")
            return Batch([outcomes.get(place, rest) for place in range(len(scenes))], interrupted=True)
    return Batch([outcomes[place] for place in range(len(scenes))])


def _placed(places: Sequence[int], call: Callable[[int, _Told], None]) -> Callable[[int, _Told], None]:
    """The same call, for requests that stand at these places of the whole."""
    return lambda index, told: call(places[index], told)


def _waves(scenes: Sequence[Scene]) -> list[list[int]]:
    """The places of the scenes, by how many others each has to wait for."""
    waves: list[list[int]] = []
    depth = 0
    for place, scene in enumerate(scenes):
        depth = depth + 1 if scene.from_previous else 0
        if depth == len(waves):
            waves.append([])
        waves[depth].append(place)
    return waves


def _written(output: Path, folder: Folder, scenes: Sequence[Scene], batch: Batch, fps: int) -> dict[str, Any]:
    """Write the film or the sheet. Returns what --json tells. Raises DiffuserveError."""
    results = batch.results
    suffix = output.suffix.lower()
    durations = [one.duration for one in scenes]
    told: list[dict[str, Any]] = [
        {
            "path": str(folder.path / _name(place)),
            "prompt": scene.prompt,
            "seed": result.images[0].seed,
            "from_previous": scene.from_previous,
            "width": result.image.width,
            "height": result.image.height,
        }
        for place, (scene, result) in enumerate(zip(scenes, results, strict=True))
    ]
    if suffix in FILM_SUFFIXES:
        write_told(output, film([one.image for one in results], durations, suffix, fps))
        counts = frame_counts(durations, fps)
        for one, seconds, count in zip(told, durations, counts, strict=True):
            one |= {"seconds": seconds} | ({"frames": count} if suffix == ".mp4" else {})
        return {
            "output": str(output),
            "seconds": round(sum(durations), 6),
            **({"fps": fps, "frames": sum(counts)} if suffix == ".mp4" else {}),
            "scenes": told,
        }
    from diffuserve_client._studio.contact_sheet import Cell, flowing_sheet

    cells = [
        Cell(result.image, f"{number} · {scene.prompt}")
        for number, (scene, result) in enumerate(zip(scenes, results, strict=True), 1)
    ]
    sheet = flowing_sheet(cells)
    write_told(output, encoded(sheet.image, FORMAT_OF_SUFFIX[suffix]))
    boxes = [box for row in sheet.boxes for box in row]
    return {"output": str(output), "scenes": [{**one, "sheet_box": box} for one, box in zip(told, boxes, strict=True)]}


def _as_text(told: dict[str, Any]) -> str:
    lines = [f"{one['path']}  seed {one['seed']}  {one['prompt']}" for one in told["scenes"]]
    length = f"  {told['seconds']:g} s" if "seconds" in told else ""
    return "\n".join([*lines, f"{told['output']}{length}"])
