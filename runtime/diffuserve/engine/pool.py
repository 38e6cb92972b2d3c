"""The latents of all images of one group, side by side, and the one update that serves every sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from diffuserve.engine.control import ControlRows
from diffuserve.engine.masked import Kept, masks_told
from diffuserve.engine.track import HIDDEN_STATES, Track
from diffuserve.lora.choice import LoraKey
from diffuserve.lora.stack import AdapterStack
from diffuserve.sampling import HISTORY
from diffuserve.spec import UNET

__all__ = ["LatentPool"]

_FIRST_CAPACITY: Final = 8
_MOVED: Final = torch.empty(0)

#: sample [rows, C, h, w], timestep [rows], conditioning by name [rows, ...] -> model output [rows, C, h, w]
Denoise = Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Batch:
    """What stays the same from one call to the next while the same images run: which row is whose.

    Rows are images' in their order, each the conditional one and, with guidance, the unconditional one after it;
    beyond them the last row is repeated as padding.
    """

    tracks: tuple[Track, ...]
    rows: int
    slots: torch.Tensor  # [images]
    image_of_row: torch.Tensor  # [rows]
    conditional: torch.Tensor  # [images], a row each
    unconditional: torch.Tensor  # [images]; the same row where there is no guidance
    conditioning: Mapping[str, torch.Tensor]  # [rows, ...] each
    guidance_scale: torch.Tensor  # [images, 1, 1, 1]
    guidance_rescale: torch.Tensor | None  # [images, 1, 1, 1], where any image has one
    told: torch.Tensor | None  # [images, 1 + C, h, w], where the UNet is told masks
    kept: Kept | None  # where given pictures are put back around masks


class LatentPool:
    """Slots for the images of one group (checkpoint and size). Owned by the loop's thread alone.

    `adapters` puts together the rows' adapters where the UNet takes any, and `control` is the type in which a UNet with
    a ControlNet takes its controls. Tensors are float32 on `device`, allocated once and doubled when they are full, so
    that steps allocate only what a call needs.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        *,
        adapters: AdapterStack[LoraKey] | None = None,
        control: torch.dtype | None = None,
    ) -> None:
        self._adapters = adapters
        self._device = device or torch.device("cpu")
        self._control = None if control is None else ControlRows(control, self._device)
        self._free: list[int] = []
        self._capacity = 0
        self._latents = self._history = _MOVED
        self._batch: _Batch | None = None

    @property
    def is_empty(self) -> bool:
        return len(self._free) == self._capacity

    def join(self, track: Track) -> None:
        """Give a track a slot; its latents move here. Where that raises, all is as before."""
        if not self._free:
            self._grow(track)
        slot = self._free[-1]
        self._latents[slot] = track.latents
        self._history[slot] = 0
        if track.history is not None:
            self._history[slot, : len(track.history)] = track.history
        track.slot, track.latents, track.history = self._free.pop(), _MOVED, None

    def state(self, track: Track) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of an image's latents [C, h, w] and its history [HISTORY, C, h, w]."""
        return self._latents[track.slot].clone(), self._history[track.slot].clone()

    def leave(self, track: Track) -> None:
        """Free the slot. This takes no memory, so that an image can leave when there is none."""
        self._free.append(track.slot)
        track.slot, track.control, track.adapter = -1, None, None
        self._batch = None
        if self._control is not None and self.is_empty:
            self._control.release()
        if self._adapters is not None and self.is_empty:
            self._adapters.clear()

    def _grow(self, track: Track) -> None:
        old, capacity = self._capacity, max(_FIRST_CAPACITY, 2 * self._capacity)
        shapes = (track.latents.shape, (HISTORY, *track.latents.shape))
        grown = [torch.zeros(capacity, *shape, device=self._device) for shape in shapes]
        for new, tensor in zip(grown, (self._latents, self._history), strict=True):
            if old:
                new[:old] = tensor
        self._latents, self._history = grown
        self._capacity = capacity
        self._free.extend(reversed(range(old, capacity)))

    def step(self, tracks: Sequence[Track], denoise: Denoise, rows: int = 0) -> None:
        """One UNet evaluation of each track, in one call, and the update of Trajectory's docstring on all of them.

        The call has `rows` rows where that is more than the tracks have. A track that wants it then has `predicted`.
        """
        batch = self._batch_of(tracks, rows)
        numbers = torch.stack([track.coefficients[track.evaluation] for track in tracks]).to(self._device)
        numbers = numbers[:, :, None, None, None]
        scale, p, q, a, c = numbers[:, :5].unbind(1)
        b = numbers[:, 5:]
        latents, history = self._latents[batch.slots], self._history[batch.slots]
        output = self._guided(batch, latents * scale, denoise)

        u = p * latents + q * output
        updated = a * latents + b[:, 0] * u + (b[:, 1:] * history).sum(dim=1)
        noise = self._noise(tracks, latents.shape)
        if noise is not None:
            updated += c * noise
        if batch.kept is not None:
            batch.kept.put_back(updated)
        self._latents[batch.slots] = updated
        self._remember(batch, u, history)
        for i, track in enumerate(tracks):
            if track.predicts():
                p0, q0 = (float(column[track.evaluation]) for column in (track.trajectory.p0, track.trajectory.q0))
                predicted = p0 * latents[i] + q0 * output[i]
                track.predicted = track.masked.around(predicted) if track.masked else predicted
            track.evaluation += 1

    def _batch_of(self, tracks: Sequence[Track], rows: int) -> _Batch:
        batch, tracks = self._batch, tuple(tracks)
        rows = max(rows, sum(track.rows for track in tracks))
        if batch is None or batch.tracks != tracks or batch.rows != rows:
            batch = self._batch = self._new_batch(tracks, rows)
        return batch

    def _new_batch(self, tracks: tuple[Track, ...], rows: int) -> _Batch:
        image_of_row = [i for i, track in enumerate(tracks) for _ in range(track.rows)]
        kind_of_row = [kind for track in tracks for kind in range(track.rows)]
        conditional = [row for row, kind in enumerate(kind_of_row) if kind == 0]
        unconditional = [row + track.rows - 1 for row, track in zip(conditional, tracks, strict=True)]
        padding = rows - len(image_of_row)
        image_of_row += image_of_row[-1:] * padding

        def on_device(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        def per_image(values: Sequence[float]) -> torch.Tensor:
            return on_device(values, torch.float32)[:, None, None, None]

        rescale = [track.guidance_rescale if track.rows == 2 else 0.0 for track in tracks]
        return _Batch(
            tracks=tracks,
            rows=rows,
            slots=on_device([track.slot for track in tracks]),
            image_of_row=on_device(image_of_row),
            conditional=on_device(conditional),
            unconditional=on_device(unconditional),
            conditioning=self._conditioning(tracks, padding) | self._controls(tracks, rows),
            guidance_scale=per_image([track.guidance_scale for track in tracks]),
            guidance_rescale=per_image(rescale) if any(rescale) else None,
            told=masks_told(tracks, self._device),
            kept=Kept.among(tracks, self._device),
        )

    def _conditioning(self, tracks: Sequence[Track], padding: int) -> dict[str, torch.Tensor]:
        """The rows' conditioning, put together once for as long as the same images run.

        Prompts of several chunks beside shorter ones: whole prompts are repeated to a common length, which attention
        does not notice, since every token's weight is divided alike.
        """
        tokens = math.lcm(*(track.conditioning[HIDDEN_STATES].shape[1] for track in tracks))
        rows: dict[str, torch.Tensor] = {}
        for name in tracks[0].conditioning:
            each = [track.conditioning[name] for track in tracks]
            if name == HIDDEN_STATES:
                each = [one if one.shape[1] == tokens else one.repeat(1, tokens // one.shape[1], 1) for one in each]
            each += [each[-1][-1:]] * padding
            rows[name] = torch.cat(each).to(self._device)
        if self._adapters is not None:
            of_rows = [_vector(track) for track in tracks for _ in range(track.rows)]
            rows |= self._adapters.inputs([*of_rows, *of_rows[-1:] * padding])
        return rows

    def _controls(self, tracks: Sequence[Track], rows: int) -> dict[str, torch.Tensor]:
        return {} if self._control is None else self._control.told(tracks, rows)

    def _guided(self, batch: _Batch, scaled: torch.Tensor, denoise: Denoise) -> torch.Tensor:
        """Rows out, rows back, and classifier-free guidance (Ho & Salimans 2022, eq. 6, as diffusers writes it)."""
        # float32 always: half precision turns 721.37 into 721.5.
        told = [float(track.trajectory.timestep[track.evaluation]) for track in batch.tracks]
        timestep = torch.tensor(told, device=self._device)[batch.image_of_row]
        if batch.told is not None:
            scaled = torch.cat([scaled, batch.told], dim=1)
        output = denoise(scaled[batch.image_of_row], timestep, batch.conditioning).float()
        conditional, unconditional = output[batch.conditional], output[batch.unconditional]
        guided = unconditional + batch.guidance_scale * (conditional - unconditional)
        if batch.guidance_rescale is None:
            return guided
        # Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", eq. 15-16.
        spread = conditional.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        rescaled = batch.guidance_rescale * spread * guided + (1 - batch.guidance_rescale) * guided
        return torch.where(batch.guidance_rescale > 0, rescaled, guided)

    def _noise(self, tracks: Sequence[Track], shape: torch.Size) -> torch.Tensor | None:
        """Fresh noise where a track's trajectory draws it, in diffusers' order; None where none does."""
        drawing = [(i, track) for i, track in enumerate(tracks) if track.trajectory.draws[track.evaluation]]
        if not drawing:
            return None
        noise = torch.zeros(shape)
        for i, track in drawing:
            for _ in range(int(track.trajectory.draws[track.evaluation])):
                noise[i] = torch.randn((1, *shape[1:]), generator=track.generator)[0]
        return noise.to(self._device)

    def _remember(self, batch: _Batch, u: torch.Tensor, history: torch.Tensor) -> None:
        shifted = torch.cat([u[:, None], history[:, : HISTORY - 1]], dim=1)
        kept = [bool(track.trajectory.remember[track.evaluation]) for track in batch.tracks]
        if not all(kept):
            mask = torch.tensor(kept, device=self._device)[:, None, None, None, None]
            shifted = torch.where(mask, shifted, history)
        self._history[batch.slots] = shifted


def _vector(track: Track) -> tuple[LoraKey, torch.Tensor] | None:
    """What tells its adapter from others, and the numbers [P] of it; None where it has none."""
    return (track.adapter_key, track.adapter.vectors[UNET]) if track.adapter and track.adapter_key else None
