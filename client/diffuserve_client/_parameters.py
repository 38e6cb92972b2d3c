"""What `generate` takes, as keywords."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

from diffuserve.request import GenerateRequest

__all__ = ["GenerateParameters", "ResumeParameters", "request_from"]


class ResumeParameters(TypedDict, total=False):
    """What may be said beside a snapshot."""

    progress_every: int
    preview_every: int
    heartbeat_ms: int
    image_encoding: str
    priority: int
    deadline_ms: int
    client_tag: str


class GenerateParameters(ResumeParameters, total=False):
    """GenerateRequest's fields but the prompt and `resume`, for type checkers; a test holds the two together."""

    negative_prompt: str
    prompt_syntax: str
    clip_skip: int
    checkpoint: str | None
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float
    sampler: str | None
    sigma_schedule: str | None
    eta: float
    seed: int
    num_images: int
    init_image: bytes
    mask_image: bytes
    strength: float
    control_image: bytes
    control_scale: float
    loras: Sequence[str]
    image_format: str


def request_from(
    prompt: str | GenerateRequest,
    parameters: GenerateParameters,
    *,
    wants_progress: bool,
    wants_previews: bool = False,
) -> GenerateRequest:
    """The request that a call of `generate` means.

    Raises InvalidArgumentError for bad values, TypeError for keywords that are none or that come beside a request.
    """
    if isinstance(prompt, GenerateRequest):
        if parameters:
            raise TypeError(
                f"{', '.join(parameters)}: a GenerateRequest holds every parameter already; "
                "use dataclasses.replace(request, ...)"
            )
        request = prompt
    else:
        request = GenerateRequest(prompt=prompt, **parameters)
    if wants_progress and request.progress_every == 0:
        # Without this the caller's function would be taken and never called.
        request = replace(request, progress_every=1)
    if wants_previews and request.preview_every == 0:
        request = replace(request, preview_every=1)
    return request
