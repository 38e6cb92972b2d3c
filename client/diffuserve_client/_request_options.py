"""Options that say what picture to make, declared once for all commands that make one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from diffuserve.errors import InvalidArgumentError
from diffuserve.metadata.infotext import SAMPLER_LABELS, SCHEDULE_LABELS
from diffuserve.request import MAX_IMAGE_BYTES, PROMPT_SYNTAXES, GenerateRequest
from diffuserve_client._exits import complain
from diffuserve_client._files import read_limited

__all__ = ["FromImage", "Prompt", "RequestOptions", "one_of", "read_picture", "request_from_options"]

Prompt = Annotated[
    str | None, typer.Argument(help="What the picture should show. With --from-image, that picture's unless given.")
]
FromImage = Annotated[
    Path | None,
    typer.Option(
        help="Make the picture of this file again, with what else is given changed. Of diffuserve or a web UI.",
        rich_help_panel="Picture",
    ),
]


def one_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """For typer's `autocompletion`."""

    def complete(incomplete: str) -> list[str]:
        return [one for one in choices if one.startswith(incomplete)]

    return complete


def _option(text: str, *names: str, choices: Iterable[str] | None = None) -> Any:
    completion = None if choices is None else one_of(choices)
    return typer.Option(*names, help=text, rich_help_panel="Picture", autocompletion=completion)


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """GenerateRequest's fields of these names. None: not said."""

    negative_prompt: Annotated[str | None, _option("What it should not show.")] = None
    prompt_syntax: Annotated[
        str | None,
        _option(r"plain, or a1111 for (weights:1.3), \[less] and BREAK in both prompts.", choices=PROMPT_SYNTAXES),
    ] = None
    checkpoint: Annotated[str | None, _option("A deployed checkpoint.")] = None
    clip_skip: Annotated[int | None, _option("The text encoder's last layers to leave out.")] = None
    width: Annotated[int | None, _option("In pixels.")] = None
    height: Annotated[int | None, _option("In pixels.")] = None
    steps: Annotated[int | None, _option("Denoising steps.")] = None
    guidance_scale: Annotated[float | None, _option("How closely to follow the prompt.")] = None
    guidance_rescale: Annotated[float | None, _option("0 to 1: against over-exposure by guidance.")] = None
    sampler: Annotated[str | None, _option("Such as euler, unipc, 'DPM++ 2M Karras'.", choices=SAMPLER_LABELS)] = None
    sigma_schedule: Annotated[
        str | None, _option("normal, karras, exponential, beta or sgm_uniform.", choices=SCHEDULE_LABELS)
    ] = None
    eta: Annotated[float | None, _option("0 to 1: fresh noise of ddim and tcd.")] = None
    seed: Annotated[int | None, _option("Image i uses SEED + i; one is drawn otherwise, and for -1.")] = None
    num_images: Annotated[int | None, _option("How many.", "--num-images", "-n")] = None
    strength: Annotated[
        float | None, _option("Above 0 to 1: how much of the picture that it begins with is made anew.")
    ] = None
    control_image: Annotated[
        Path | None, _option("A picture for the checkpoint's ControlNet: PNG, JPEG or WebP.", "--control")
    ] = None
    control_scale: Annotated[float | None, _option("0 to 2: how much CONTROL counts.")] = None
    loras: Annotated[
        list[str] | None,
        _option("A LoRA of the server's, as NAME, NAME:WEIGHT or NAME:WEIGHT:truncate; as often as needed.", "--lora"),
    ] = None
    priority: Annotated[int | None, _option("Higher goes first where the server is full.")] = None
    deadline_ms: Annotated[int | None, _option("Refuse, or drop, what is not done by then.")] = None
    client_tag: Annotated[str | None, _option("Who asks: tags get equal shares of a full server.")] = None


def request_from_options(
    prompt: str | None,
    options: RequestOptions,
    *,
    init_image: Path | None = None,
    mask_image: Path | None = None,
    from_image: Path | None = None,
    **more: Any,
) -> GenerateRequest:
    """The request that a command line means; `more` are further fields, None where they are not said.

    Raises InvalidArgumentError.
    """
    said = {one.name: getattr(options, one.name) for one in fields(options)} | more
    given: dict[str, Any] = {name: value for name, value in said.items() if value is not None and value != []}
    pictures = {"init_image": init_image, "mask_image": mask_image, "control_image": options.control_image}
    given |= {name: read_picture(path) for name, path in pictures.items() if path is not None}
    if prompt is not None:
        given["prompt"] = prompt
    if from_image is not None:
        return GenerateRequest(**(_told(from_image, given) | given))
    if prompt is None:
        raise InvalidArgumentError("no prompt is given; give one, or --from-image", input="prompt")
    return GenerateRequest(**given)


def read_picture(path: Path) -> bytes:
    """An input picture's file. Raises InvalidArgumentError."""
    content = read_limited(path, MAX_IMAGE_BYTES, "a picture's file")
    if not content:  # which the server would take for none
        raise InvalidArgumentError(f"{path} is empty; give a picture's file")
    return content


def _told(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What a file says of its picture. Raises InvalidArgumentError where an input picture is missing."""
    from diffuserve.metadata import read_record

    record = read_record(path)
    pictures = {name: value for name, value in given.items() if isinstance(value, bytes)}
    for name in record.missing(pictures):
        how = {"init_image": "img2img, or --init-image", "mask_image": "inpaint, or --mask"}.get(name, "--control")
        raise InvalidArgumentError(f"{path} was made with a picture as {name}, which is not in it; give it ({how})")
    for name in record.strangers(pictures):
        complain(f"note: {path} was made with another {name}, or none; the picture will differ")
    return dict(record.parameters)
