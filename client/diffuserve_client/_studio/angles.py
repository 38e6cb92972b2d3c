"""`diffuserve angles`: one product, from a picture of it, as seen from several sides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from diffuserve.errors import DiffuserveError, InvalidArgumentError
from diffuserve.request import DEFAULT_CONTROL_SCALE, DEFAULT_STRENGTH, GenerateRequest
from diffuserve_client._exits import errors_as_exit_codes
from diffuserve_client._options import AsJson, ConnectionOptions, open_client, with_options
from diffuserve_client._request_options import read_picture
from diffuserve_client._studio.batch import Batch
from diffuserve_client._studio.folder import Folder, encoded, filled_folder, slug
from diffuserve_client._studio.options import Concurrency, Overwrite, SettingOptions

if TYPE_CHECKING:
    import PIL.Image


__all__ = ["VIEWS", "angles"]

#: What is made where no view is named, in the order of a walk around the product.
VIEWS: Final = (
    "front view",
    "three-quarter view from the left",
    "side view from the left",
    "back view",
    "side view from the right",
    "three-quarter view from the right",
    "view from above",
)
MAX_VIEWS: Final = 64
SHEET: Final = "contact-sheet.png"
_PLACE: Final = "{view}"


class Method(StrEnum):
    """What the reference picture is to the request."""

    img2img = "img2img"
    control = "control"


@with_options
def angles(
    connection: ConnectionOptions,
    setting: SettingOptions,
    image: Annotated[Path, typer.Argument(help="A picture of the product: PNG, JPEG or WebP.")],
    prompt: Annotated[str, typer.Option(help="What it is; {view} stands for each view.")] = "product photo, {view}",
    view: Annotated[
        list[str] | None,
        typer.Option(help="A view in words, as often as needed.", show_default="seven views, from the front to above"),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="img2img begins with IMAGE; control gives it to the checkpoint's ControlNet.")
    ] = Method.img2img,
    strength: Annotated[
        float | None,
        typer.Option(help="Above 0 to 1: how much of IMAGE img2img makes anew.", show_default=f"{DEFAULT_STRENGTH}"),
    ] = None,
    control_scale: Annotated[
        float | None,
        typer.Option(help="0 to 2: how much IMAGE counts with control.", show_default=f"{DEFAULT_CONTROL_SCALE:g}"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to fill.")] = Path("angles"),
    overwrite: Overwrite = False,
    columns: Annotated[int | None, typer.Option(min=1, help="Pictures in a row of the contact sheet.")] = None,
    concurrency: Concurrency = 16,
    as_json: AsJson = False,
) -> None:
    """Make several views of one product at once, with one seed.

    The folder gets a picture of each view, and contact-sheet.png with IMAGE and the views in their order.
    """
    with errors_as_exit_codes():
        views = tuple(view or VIEWS)
        reference, data = _reference(image)
        parameters = {"seed": 0, **setting.given(), **_of_image(method, data, strength, control_scale)}
        requests = [GenerateRequest(prompt=text, **parameters) for text in _prompts(prompt, views)]
        files = [f"{number:02}-{slug(one)}.png" for number, one in enumerate(views, 1)]
        with filled_folder(output, overwrite=overwrite) as folder:
            with open_client(connection) as client:
                batch = folder.fill(client, requests, files, concurrency=concurrency, what="views")
            told = _written(folder, image, reference, views, files, batch, columns)
        typer.echo(json.dumps(told, ensure_ascii=False) if as_json else _as_text(told))
        batch.exit_unless_whole([f"of {one!r}" for one in views])


def _reference(path: Path) -> tuple[PIL.Image.Image, bytes]:
    """The picture, decoded and as it is. Raises InvalidArgumentError."""
    import PIL

    from diffuserve_client._events import decoded

    data = read_picture(path)
    try:
        return decoded(data), data
    except PIL.UnidentifiedImageError as error:
        raise InvalidArgumentError(f"{path} is no picture; give a picture's file") from error
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be used: {error}; give another picture") from error


def _of_image(
    method: Method, data: bytes, strength: float | None, control_scale: float | None
) -> dict[str, bytes | float]:
    """What the reference is to each request. Raises InvalidArgumentError for an option of the other method."""
    is_control = method is Method.control
    name, value = ("control_scale", control_scale) if is_control else ("strength", strength)
    other, unused = ("strength", strength) if is_control else ("control_scale", control_scale)
    if unused is not None:
        raise InvalidArgumentError(f"{other} is given, and method is {method.value}; leave one out", input=other)
    image: dict[str, bytes | float] = {"control_image" if is_control else "init_image": data}
    return image if value is None else {**image, name: value}


def _prompts(template: str, views: Sequence[str]) -> list[str]:
    """Raises InvalidArgumentError."""
    if _PLACE not in template:
        raise InvalidArgumentError(
            f"the prompt {template[:80]!r} has no {_PLACE}, so all views would be the same; write it into it",
            input="prompt",
        )
    if len(views) > MAX_VIEWS:
        raise InvalidArgumentError(
            f"{len(views)} views are asked for, and at most {MAX_VIEWS} are made; leave some out"
        )
    twice = next((one for one in views if views.count(one) > 1), None)
    if twice is not None:
        raise InvalidArgumentError(f"the view {twice!r} is given twice; give it once", input="view")
    return [template.replace(_PLACE, one) for one in views]


def _written(
    folder: Folder,
    path: Path,
    reference: PIL.Image.Image,
    views: Sequence[str],
    files: Sequence[str],
    batch: Batch,
    columns: int | None,
) -> dict[str, Any]:
    """Write the contact sheet. Returns what --json tells. Raises DiffuserveError."""
    from diffuserve_client._studio.contact_sheet import Cell, flowing_sheet

    cells = [Cell(reference, "reference")]
    for number, (view, outcome) in enumerate(zip(views, batch.outcomes, strict=True), 1):
        caption = f"{number} · {view}"
        if isinstance(outcome, DiffuserveError):
            cells.append(Cell(None, caption, f"Failed: {outcome.message}"))
        else:
            cells.append(Cell(outcome.image, caption))
    sheet = flowing_sheet(cells, columns)
    sheet_path = folder.write(SHEET, encoded(sheet.image, "png"))
    boxes = [box for row in sheet.boxes for box in row]
    told = []
    for view, file, outcome, box in zip(views, files, batch.outcomes, boxes[1:], strict=True):
        if isinstance(outcome, DiffuserveError):
            found: dict[str, Any] = {"error": {"code": outcome.code, "message": outcome.message}}
        else:
            found = {"path": str(folder.path / file), "seed": outcome.images[0].seed, "sheet_box": box}
        told.append({"view": view, **found})
    return {"contact_sheet": str(sheet_path), "reference": {"path": str(path), "sheet_box": boxes[0]}, "views": told}


def _as_text(told: dict[str, Any]) -> str:
    lines = [f"{one['path']}  seed {one['seed']}  {one['view']}" for one in told["views"] if "path" in one]
    return "\n".join([*lines, told["contact_sheet"]])
