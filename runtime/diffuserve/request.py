"""What a client asks and what it gets back: frozen values, checked when they are made.

Limits that depend on the checkpoint (sizes) are checked at admission, against its manifest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from diffuserve.errors import InvalidArgumentError
from diffuserve.lora.choice import parse_loras
from diffuserve.spec import MOST_CLIP_SKIP

__all__ = [
    "DEFAULT_CONTROL_SCALE",
    "DEFAULT_STRENGTH",
    "EVENT_KINDS",
    "IMAGE_ENCODINGS",
    "IMAGE_FORMATS",
    "INPUT_PICTURES",
    "MAX_IMAGES",
    "MAX_IMAGE_BYTES",
    "MAX_PROMPT_BYTES",
    "MAX_SEED",
    "MAX_STEPS",
    "MIN_HEARTBEAT_MS",
    "PROMPT_SYNTAXES",
    "RANDOM_SEED",
    "Event",
    "EventKind",
    "GenerateRequest",
    "ResolvedRequest",
]

MAX_PROMPT_BYTES: Final = 8192
MAX_NAME_BYTES: Final = 256
MAX_IMAGES: Final = 16
MAX_IMAGE_BYTES: Final = 32 << 20  # of each picture that a request brings
MAX_STEPS: Final = 150
MAX_PRIORITY: Final = 100
MAX_DEADLINE_MS: Final = 24 * 3600 * 1000
MIN_HEARTBEAT_MS: Final = 1000
DEFAULT_STRENGTH: Final = 0.8  # as in the protocol; also of diffusers' image-to-image
DEFAULT_CONTROL_SCALE: Final = 1.0
MAX_CONTROL_SCALE: Final = 2.0
MAX_SEED: Final = 2**63 - 1
RANDOM_SEED: Final = -1
PROMPT_SYNTAXES: Final = ("plain", "a1111")
IMAGE_FORMATS: Final = ("png", "jpeg", "webp")
IMAGE_ENCODINGS: Final = ("binary", "base64")

EventKind = Literal["queued", "progress", "preview", "image", "snapshot", "heartbeat", "status"]
EVENT_KINDS: Final[tuple[EventKind, ...]] = (
    "queued",
    "progress",
    "preview",
    "image",
    "snapshot",
    "heartbeat",
    "status",
)

INPUT_PICTURES: Final = ("init_image", "mask_image", "control_image")
_BYTES: Final = (*INPUT_PICTURES, "resume")
#: What may be asked of a request that is resumed; all else is in its snapshot.
_BESIDE_RESUME: Final = (
    "progress_every",
    "preview_every",
    "heartbeat_ms",
    "image_encoding",
    "priority",
    "deadline_ms",
    "client_tag",
)


def _check_range(name: str, value: float, low: float, high: float, remedy: str = "") -> None:
    # Written so that NaN fails: every comparison with it is false.
    if not low <= value <= high:
        hint = f"; {remedy}" if remedy else ""
        raise InvalidArgumentError(
            f"{name} is {value}, and must be from {low} to {high}{hint}",
            input=name,
            value=value if isinstance(value, int) or math.isfinite(value) else str(value),
            minimum=low,
            maximum=high,
        )


def _check_integer(name: str, value: object) -> None:
    # The wire's arrays would cut 2.5 steps down to 2 and say nothing.
    if not isinstance(value, int):
        raise InvalidArgumentError(f"{name} is {value!r}, and must be a whole number", input=name, value=str(value))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidArgumentError(
            f"{name} is {value[:64]!r}, and must be one of {', '.join(choices)}",
            input=name,
            value=value[:64],
            choices=choices,
        )


def _check_text(name: str, value: str, limit: int) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        # A command line with bytes that are not UTF-8 gives these.
        raise InvalidArgumentError(
            f"{name} cannot be UTF-8 (character {error.start}: {error.reason}); correct its encoding", input=name
        ) from error
    if size > limit:
        raise InvalidArgumentError(
            f"{name} has {size} bytes, and at most {limit} are taken; shorten it", input=name, value=size, maximum=limit
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One request for pictures. None means: the checkpoint's own value.

    `clip_skip` counts the text encoders' last layers that are left out; `prompt_syntax` says what brackets in both
    prompts mean. `init_image` is an encoded picture to begin with, or none, and `strength` how much of it is made anew;
    `mask_image`, an encoded picture of its size, or none, is white where that happens and black where it is kept.
    `loras` are files of LoRA, each as `name`, `name:weight` or `name:weight:truncate`. `control_image`, an encoded
    picture or none, is what the checkpoint's ControlNet looks at, and `control_scale` how much that counts. `resume` is
    a snapshot's bytes, or none; with one, everything but how it is answered is the snapshot's.

    Raises InvalidArgumentError with the value, the limit and the remedy.
    """

    prompt: str
    negative_prompt: str = ""
    prompt_syntax: str = "plain"
    clip_skip: int = 0
    checkpoint: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    sampler: str | None = None
    sigma_schedule: str | None = None
    eta: float = 0.0
    seed: int = RANDOM_SEED
    num_images: int = 1
    init_image: bytes = b""
    mask_image: bytes = b""
    strength: float = DEFAULT_STRENGTH
    loras: Sequence[str] = ()
    control_image: bytes = b""
    control_scale: float = DEFAULT_CONTROL_SCALE
    progress_every: int = 0
    preview_every: int = 0
    heartbeat_ms: int = 0
    image_format: str = "png"
    image_encoding: str = "binary"
    priority: int = 0
    deadline_ms: int = 0
    client_tag: str = ""
    resume: bytes = b""

    def __post_init__(self) -> None:
        self._check_loras()
        self._check_resume()
        _check_text("prompt", self.prompt, MAX_PROMPT_BYTES)
        _check_text("negative_prompt", self.negative_prompt, MAX_PROMPT_BYTES)
        for name in ("checkpoint", "sampler", "sigma_schedule", "client_tag"):
            _check_text(name, getattr(self, name) or "", MAX_NAME_BYTES)
        _check_choice("prompt_syntax", self.prompt_syntax, PROMPT_SYNTAXES)
        for name in (
            "clip_skip",
            "num_images",
            "seed",
            "progress_every",
            "preview_every",
            "heartbeat_ms",
            "priority",
            "deadline_ms",
        ):
            _check_integer(name, getattr(self, name))
        for name in ("width", "height", "steps"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name))
        _check_range("clip_skip", self.clip_skip, 0, MOST_CLIP_SKIP, "0 leaves out no layer")
        if self.steps is not None:
            _check_range("steps", self.steps, 1, MAX_STEPS)
        if self.guidance_scale is not None:
            _check_range("guidance_scale", self.guidance_scale, 0, 50)
        _check_range("guidance_rescale", self.guidance_rescale, 0, 1)
        _check_range("eta", self.eta, 0, 1)
        self._check_pictures()
        _check_range("num_images", self.num_images, 1, MAX_IMAGES)
        _check_range("seed", self.seed, RANDOM_SEED, MAX_SEED, "-1 lets the server draw one")
        if self.seed + self.num_images - 1 > MAX_SEED:
            raise InvalidArgumentError(
                f"seed is {self.seed} and num_images {self.num_images}: image i uses seed + i, which must not exceed "
                f"{MAX_SEED}; use a smaller seed",
                input="seed",
                value=self.seed,
                maximum=MAX_SEED - self.num_images + 1,
            )
        _check_range("progress_every", self.progress_every, 0, MAX_STEPS, "0 is off")
        _check_range("preview_every", self.preview_every, 0, MAX_STEPS, "0 is off")
        if self.heartbeat_ms:
            _check_range("heartbeat_ms", self.heartbeat_ms, MIN_HEARTBEAT_MS, MAX_DEADLINE_MS, "0 is off")
        _check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY, "higher goes first")
        _check_range("deadline_ms", self.deadline_ms, 0, MAX_DEADLINE_MS, "0 is none")
        _check_choice("image_format", self.image_format, IMAGE_FORMATS)
        _check_choice("image_encoding", self.image_encoding, IMAGE_ENCODINGS)

    def _check_resume(self) -> None:
        given = [
            one.name
            for one in fields(self)
            if one.name not in ("prompt", "resume", *_BESIDE_RESUME) and getattr(self, one.name) != one.default
        ]
        if self.resume and (given or self.prompt):
            name = "prompt" if self.prompt else given[0]
            raise InvalidArgumentError(
                f"{name} is given beside resume, and the snapshot holds it; leave it out (of the prompt: the empty "
                "string)",
                input=name,
            )

    def _check_loras(self) -> None:
        given: object = self.loras
        if not isinstance(given, (tuple, list)) or not all(isinstance(one, str) for one in given):
            raise InvalidArgumentError(
                f"loras is {str(self.loras)[:96]!r}, and must be a list of texts, one for each LoRA", input="loras"
            )
        object.__setattr__(self, "loras", tuple(self.loras))  # JSON and callers bring lists
        parse_loras(self.loras)

    def _check_pictures(self) -> None:
        if self.strength == 0:
            raise InvalidArgumentError(
                "strength is 0, which would leave the picture as it is; it must be above 0, to 1",
                input="strength",
                value=0,
            )
        _check_range("strength", self.strength, 0, 1)
        _check_range("control_scale", self.control_scale, 0, MAX_CONTROL_SCALE, "at 0 control_image has no part in it")
        if self.mask_image and not self.init_image:
            raise InvalidArgumentError(
                "mask_image is given without init_image, the picture that it is a mask of; give both, or neither",
                input="mask_image",
            )

    @classmethod
    def from_image(
        cls,
        path: str | os.PathLike[str],
        *,
        init_image: bytes = b"",
        mask_image: bytes = b"",
        control_image: bytes = b"",
    ) -> GenerateRequest:
        """The request that makes the picture of a file again: one that `GeneratedImage.save` wrote.

        The pictures that it was made with are not in the file: they are given, and checked by their digests. Of a
        picture that a web UI of Stable Diffusion saved, what its text says is asked for.

        Raises InvalidArgumentError for a file that does not say how it was made, and for pictures that are missing
        or are others.
        """
        from diffuserve.metadata import read_record

        pictures = {"init_image": init_image, "mask_image": mask_image, "control_image": control_image}
        return read_record(path).request(**pictures)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    def parameters(self) -> dict[str, Any]:
        """Every field that JSON can hold, by its name: what makes the request again, but for pictures and snapshots."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _BYTES}

    @property
    def given_bytes(self) -> int:
        """The bytes of its pictures and its snapshot."""
        return sum(len(getattr(self, name)) for name in _BYTES)

    def answered_as(self, other: GenerateRequest) -> GenerateRequest:
        """The same pictures, reported and scheduled as `other` asks."""
        return replace(self, **{name: getattr(other, name) for name in _BESIDE_RESUME})


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request with nothing left to default: what `info` reports, and what makes the same picture again.

    `alias` is what the request named where that stands for `checkpoint`. `rows` is how many rows each of its images has
    in a UNet call: with guidance 2, the prompt's and the negative prompt's. `embeddings` are the textual inversions in
    its prompts, as name:digest. `loras` is what lora.folder.CheckpointLoras told of its LoRAs, and `adapter` the
    lora.packing.Adapter that they make, while its images wait for it. `image`, `mask` and `control` are the decoded
    `init_image`, `mask_image` and `control_image`, PIL pictures of this size, or None; `reading` is a prompts.Reading,
    what the text encoders read.
    """

    request: GenerateRequest
    checkpoint: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    sigma_schedule: str | None
    seed: int
    rows: int
    embeddings: tuple[str, ...] = ()
    loras: tuple[Mapping[str, Any], ...] = ()
    adapter: Any = None
    alias: str | None = None
    image: Any = None
    mask: Any = None
    control: Any = None
    reading: Any = None

    @property
    def eta(self) -> float:
        return self.request.eta

    def without_pictures(self) -> ResolvedRequest:
        """The same without what has become latents, for it takes megabytes. The control is needed to the end."""
        nothing: dict[str, Any] = dict.fromkeys(_BYTES, b"")
        return replace(self, request=replace(self.request, **nothing), image=None, mask=None, adapter=None)

    def parameters(self, index: int) -> dict[str, object]:
        """Every parameter that made image `index`."""
        return {
            **self.request.parameters(),
            **({"alias": self.alias} if self.alias else {}),
            "checkpoint": self.checkpoint,
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "sigma_schedule": self.sigma_schedule,
            "embeddings": list(self.embeddings),
            "loras": list(self.request.loras),
            "lora_files": [dict(one) for one in self.loras],
            "seed": self.seed + index,
            "num_images": 1,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One response of the server's stream.

    `data` holds the encoded picture of an image or a preview, or a snapshot; `index` says which image of the request;
    `step` counts denoising steps done of `steps`; `info` is what the server tells of it, as JSON can hold it.
    """

    kind: EventKind
    index: int = 0
    step: int = 0
    steps: int = 0
    seed: int = 0
    data: bytes = b""
    info: dict[str, Any]

    def info_json(self) -> str:
        return json.dumps(self.info, ensure_ascii=False, separators=(",", ":"))
