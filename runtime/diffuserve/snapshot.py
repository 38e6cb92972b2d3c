"""A request in the middle of its steps, as bytes that another server can go on from.

    magic, format version | CRC-32 of the rest | HMAC-SHA256 of the rest | safetensors

It holds what the next step needs and nothing else: the rest of the compiled table, each unfinished image's latents and
the history that the table still uses, with a mask what is kept of the given picture, how far the noise generator has
come, and the hash of the weights. Prompts are encoded anew where it is resumed. Of a request that was not begun it
holds the given pictures as they came, instead of latents. What a ControlNet looks at is needed at every step, and goes
along in the picture's size, without loss. A snapshot comes back from a client, so it is untrusted until
its signature is checked, and is parsed within limits after that.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from diffuserve.engine import Masked
from diffuserve.errors import InvalidArgumentError
from diffuserve.images import encode_image, read_image
from diffuserve.request import GenerateRequest, ResolvedRequest
from diffuserve.sampling import HISTORY, Trajectory

__all__ = ["MAX_SNAPSHOT_BYTES", "ImageState", "Snapshot", "decode_snapshot", "encode_snapshot", "lags_used", "rest_of"]

#: 16 images of 1536 x 1536 pixels with a full history and what a mask keeps, or two given pictures of 32 MiB; with
#: either a control of that size, however little it can be packed; and room for the table.
MAX_SNAPSHOT_BYTES: Final = 73 << 20
_MAX_BASE64_BYTES: Final = -(-MAX_SNAPSHOT_BYTES // 3) * 4

_MAGIC: Final = b"dfsv"
_VERSION: Final = 3
_HEAD: Final = struct.Struct(f">{len(_MAGIC)}sBI32s")
_MAX_EVALUATIONS: Final = 2 * 150  # Heun and DPM2 take two a step
_MAX_DRAWS: Final = 16 * _MAX_EVALUATIONS
_MAX_FACTS_BYTES: Final = 128 << 10  # two prompts of 8 KiB in JSON's escapes, and the rest
_NUMBERS: Final = ("timestep", "input_scale", "p", "q", "a", "c", "p0", "q0", "kept_image", "kept_noise")
_COUNTS: Final = ("remember", "draws", "steps_done")
_MAX_TABLE_BYTES: Final = _MAX_EVALUATIONS * (4 * (len(_NUMBERS) + 1 + HISTORY) + len(_COUNTS))
_ABOUT_TABLE: Final = ("sampler", "steps", "schedule", "eta", "residual", "initial_scale", "image_scale", "strength")
_ASKED: Final = ("checkpoint", "width", "height", "steps", "guidance_scale", "sampler", "sigma_schedule", "seed")
_PICTURES: Final = ("init_image", "mask_image")
_CONTROL: Final = "control"


@dataclass(frozen=True, slots=True, eq=False)
class ImageState:
    """One image between two UNet evaluations.

    index       its place in the request
    evaluation  UNet evaluations that it has had
    steps       denoising steps that are complete
    draws       how many times [1, C, h, w] of standard noise were drawn from its seed, the first latents included; 0
                of an image that was not begun
    latents     [C, h, w] float32; of an image that was not begun [0, 0, 0]
    history     [n, C, h, w] float32, the newest first: what later evaluations still read
    masked      of an image with a mask that was begun
    """

    index: int
    evaluation: int
    steps: int
    draws: int
    latents: torch.Tensor
    history: torch.Tensor
    masked: Masked | None = None

    @classmethod
    def new(cls, index: int) -> ImageState:
        """Of an image that was not begun."""
        return cls(index, 0, 0, 0, torch.empty(0, 0, 0), torch.empty(0, 0, 0, 0))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Snapshot:
    """A request and what is left of it: all of it, when it is new.

    `weights` is the manifest's key. `trajectory` begins at `first`, the evaluation of the image that has had fewest.
    """

    resolved: ResolvedRequest
    weights: str
    trajectory: Trajectory
    first: int
    images: tuple[ImageState, ...]

    def cut(self) -> Snapshot:
        """The same with no more of the table and the histories than is still needed."""
        first = min(image.evaluation for image in self.images)
        trajectory = rest_of(self.trajectory, first - self.first)
        lags = lags_used(trajectory)
        images = tuple(replace(image, history=image.history[:lags]) for image in self.images)
        return replace(self, trajectory=trajectory, first=first, images=images)

    def remaining(self, image: ImageState) -> Trajectory:
        """The table of an image's evaluations that are still to come."""
        return rest_of(self.trajectory, image.evaluation - self.first)


def rest_of(trajectory: Trajectory, first: int) -> Trajectory:
    """The table from evaluation `first` on."""
    return replace(trajectory, **{name: getattr(trajectory, name)[first:] for name in (*_NUMBERS, "b", *_COUNTS)})


def lags_used(trajectory: Trajectory) -> int:
    """How many of the u from before its first evaluation the table reads."""
    used, remembered = 0, 0
    for evaluation in range(trajectory.evaluations):
        lags = np.flatnonzero(trajectory.b[evaluation, 1:]) + 1
        if len(lags):
            used = max(used, int(lags[-1]) - remembered)
        remembered += bool(trajectory.remember[evaluation])
    return used


def encode_snapshot(snapshot: Snapshot, key: bytes) -> bytes:
    """The bytes, signed with `key`. Beside the latents and a control they take less than 16 kB, long prompts aside."""
    tensors = {"facts": _packed(_facts(snapshot)), "table": _packed(_table_bytes(snapshot.trajectory))}
    for image in snapshot.images:
        tensors[f"latents.{image.index}"] = image.latents.cpu().contiguous()
        tensors[f"history.{image.index}"] = image.history.cpu().contiguous()
        if image.masked is not None:  # one mask for all of them
            tensors["mask"] = _packed(np.packbits(image.masked.mask.numpy()).tobytes())
            given = (image.masked.latents, image.masked.noise)
            tensors[f"given.{image.index}"] = torch.stack([one for one in given if one is not None])
    if not all(image.draws for image in snapshot.images):
        pictures = {name: getattr(snapshot.resolved.request, name) for name in _PICTURES}
        tensors |= {name: _bytes(content) for name, content in pictures.items() if content}
    if snapshot.resolved.control is not None:
        tensors[_CONTROL] = _bytes(encode_image(snapshot.resolved.control, "png"))
    body: bytes = safetensors.torch.save(tensors)
    return _HEAD.pack(_MAGIC, _VERSION, zlib.crc32(body), _signature(body, key)) + body


def decode_snapshot(data: bytes, key: bytes) -> Snapshot:
    """Read what `encode_snapshot` wrote; base64 of it is taken too, as JSON brings it.

    Raises InvalidArgumentError for bytes that are no snapshot, are damaged, or were signed with another key.
    """
    body = _checked_body(data, key)
    try:
        tensors = safetensors.torch.load(body)
        return _snapshot(json.loads(_unpacked(tensors["facts"], _MAX_FACTS_BYTES)), tensors)
    except Exception as error:  # whatever nonsense makes of it
        # A server with this key signed it, so it is of another release rather than forged.
        raise _refused(f"the snapshot cannot be read ({error!r}); resume it on a server of its release") from error


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _packed(content: bytes) -> torch.Tensor:
    return _bytes(zlib.compress(content, 9))


def _unpacked(tensor: torch.Tensor, limit: int) -> bytes:
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(tensor.numpy().tobytes(), limit)
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError(f"more than {limit} bytes are packed in it")
    return content


def _facts(snapshot: Snapshot) -> bytes:
    resolved = {
        one.name: getattr(snapshot.resolved, one.name)
        for one in fields(snapshot.resolved)
        if one.name not in ("image", "mask", "control", "reading", "adapter")
    }
    facts = {
        "resolved": {**resolved, "request": snapshot.resolved.request.parameters()},
        "weights": snapshot.weights,
        "table": {name: getattr(snapshot.trajectory, name) for name in _ABOUT_TABLE},
        "first": snapshot.first,
        "images": [[one.index, one.evaluation, one.steps, one.draws] for one in snapshot.images],
    }
    return json.dumps(facts).encode()


def _table_bytes(table: Trajectory) -> bytes:
    """Column after column: float32, as the loop takes the numbers, and bytes for the counts."""
    numbers = [*(getattr(table, name) for name in _NUMBERS), *table.b.T]
    columns = [np.asarray(column, dtype="<f4").tobytes() for column in numbers]
    return b"".join([*columns, *(np.asarray(getattr(table, name), dtype=np.uint8).tobytes() for name in _COUNTS)])


def _table(content: bytes, about: Mapping[str, Any]) -> Trajectory:
    columns = len(_NUMBERS) + 1 + HISTORY
    evaluations, left = divmod(len(content), 4 * columns + len(_COUNTS))
    if left or not evaluations:
        raise ValueError(f"its table has {len(content)} bytes")
    split = 4 * columns * evaluations
    numbers = np.frombuffer(content[:split], dtype="<f4").reshape(columns, evaluations).astype(np.float64)
    scales = [float(about[name]) for name in ("eta", "residual", "initial_scale", "image_scale")]
    if not np.isfinite(numbers).all() or not np.isfinite(scales).all():
        raise ValueError("its table holds numbers that are not finite")
    if not isinstance(about["steps"], int) or not 0 < about["steps"] <= _MAX_EVALUATIONS:
        raise ValueError(f"its table is of {about['steps']} steps")
    counts = dict(zip(_COUNTS, np.frombuffer(content[split:], dtype=np.uint8).reshape(-1, evaluations), strict=True))
    return Trajectory(
        **{name: about[name] for name in _ABOUT_TABLE},
        **dict(zip(_NUMBERS, numbers, strict=False)),
        b=numbers[len(_NUMBERS) :].T.copy(),
        remember=counts["remember"].astype(np.bool_),
        draws=counts["draws"].astype(np.int64),
        steps_done=counts["steps_done"].astype(np.int64),
    )


def _snapshot(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Snapshot:
    pictures: dict[str, Any] = {name: tensors[name].numpy().tobytes() for name in _PICTURES if name in tensors}
    resolved = replace(_resolved(facts["resolved"], pictures), control=_control(facts["resolved"], tensors))
    table = _table(_unpacked(tensors["table"], _MAX_TABLE_BYTES), facts["table"])
    first, images = int(facts["first"]), []
    for numbers in facts["images"]:
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"it has an image {numbers}")
        index, evaluation, steps, draws = numbers
        latents, history = tensors[f"latents.{index}"], tensors[f"history.{index}"]
        if not 0 <= index < resolved.request.num_images or not 0 <= evaluation - first < table.evaluations:
            raise ValueError(f"its image {index} is at evaluation {evaluation} of {first + table.evaluations}")
        if not 0 <= steps <= table.steps:
            raise ValueError(f"its image {index} is at step {steps} of {table.steps}")
        if not 0 <= draws <= _MAX_DRAWS or latents.ndim != 3 or history.shape[1:] != latents.shape:
            raise ValueError(f"its image {index} has latents of shape {list(latents.shape)} after {draws} draws")
        if len(history) > HISTORY or any(one.dtype != torch.float32 for one in (latents, history)):
            raise ValueError(f"its image {index} has a history of {len(history)}, and {HISTORY} are kept in float32")
        masked = _masked(index, tensors, latents.shape) if f"given.{index}" in tensors else None
        images.append(ImageState(index, evaluation, steps, draws, latents, history, masked))
    if not images or len({one.index for one in images}) < len(images):
        raise ValueError("it holds no image, or one twice")
    return Snapshot(
        resolved=resolved, weights=str(facts["weights"]), trajectory=table, first=first, images=tuple(images)
    )


def _resolved(facts: Mapping[str, Any], pictures: Mapping[str, Any]) -> ResolvedRequest:
    """The request; what was filled in of it is within the limits of what can be asked for."""
    request = GenerateRequest(**facts["request"], **pictures)
    told = {name: facts[name] for name in _ASKED}
    replace(request, **told)
    named = all(isinstance(told[name], str) and told[name] for name in ("checkpoint", "sampler"))
    if not named or None in [told[name] for name in _ASKED if name != "sigma_schedule"] or facts["rows"] not in (1, 2):
        raise ValueError(f"its request was not made out: {told}, {facts['rows']} rows")
    embeddings, loras = tuple(map(str, facts["embeddings"])), tuple(map(dict, facts["loras"]))
    return ResolvedRequest(**{**facts, "request": request, "embeddings": embeddings, "loras": loras})


def _control(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Image.Image | None:
    """The control in the request's size. Raises InvalidArgumentError for what is no picture, or beyond the limits."""
    if _CONTROL not in tensors:
        return None
    image = read_image(_CONTROL, tensors[_CONTROL].numpy().tobytes())
    if image.size != (facts["width"], facts["height"]):
        raise ValueError(f"its control has {image.size[0]} x {image.size[1]} pixels")
    return image


def _masked(index: int, tensors: Mapping[str, torch.Tensor], shape: torch.Size) -> Masked:
    given, (_, height, width) = tensors[f"given.{index}"], shape
    if given.shape not in ((1, *shape), (2, *shape)) or given.dtype != torch.float32:
        raise ValueError(f"its image {index} has given latents of shape {list(given.shape)}")
    bits = np.frombuffer(_unpacked(tensors["mask"], height * width // 8 + 1), dtype=np.uint8)
    mask = np.unpackbits(bits)[: height * width].astype(np.bool_).reshape(1, height, width)
    return Masked(torch.from_numpy(mask), *given.unbind())


def _checked_body(data: bytes, key: bytes) -> bytes:
    if len(data) > (MAX_SNAPSHOT_BYTES if data.startswith(_MAGIC) else _MAX_BASE64_BYTES):
        raise _refused(f"the snapshot has {len(data)} bytes, and at most {MAX_SNAPSHOT_BYTES} are taken")
    if not data.startswith(_MAGIC):
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error:
            data = b""
    if len(data) <= _HEAD.size or not data.startswith(_MAGIC):
        raise _refused("resume holds no snapshot; give the data of a snapshot event as it came")
    _, version, checksum, signature = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if version != _VERSION:
        raise _refused(
            f"the snapshot's format is {version}, and {_VERSION} is read; resume it on a server of its release"
        )
    if zlib.crc32(body) != checksum:
        raise _refused("the snapshot is damaged: its checksum does not fit; give the event's data as it came")
    if not hmac.compare_digest(_signature(body, key), signature):
        raise _refused("the snapshot was signed with another key; servers that hand over to each other need the same")
    return body


def _signature(body: bytes, key: bytes) -> bytes:
    return hmac.digest(key, _MAGIC + bytes([_VERSION]) + body, "sha256")


def _refused(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, input="resume")
