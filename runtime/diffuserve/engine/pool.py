"""The latents of all images of one group, side by side, and the one update that serves every sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from diffuserve.engine.track import Track
from diffuserve.sampling import HISTORY

__all__ = ["LatentPool"]

_FIRST_CAPACITY: Final = 8

#: sample [rows, C, h, w], timestep [rows], hidden_states [rows, tokens, D] -> model output [rows, C, h, w]
Denoise = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class LatentPool:
    """Slots for the images of one group (checkpoint and size). Owned by the loop's thread alone.

    Tensors are allocated once and doubled when they are full, so steps allocate only what a call needs.
    """

    def __init__(self) -> None:
        self._free: list[int] = []
        self._capacity = 0
        self._latents = torch.empty(0)
        self._history = torch.empty(0)
        self._hidden = torch.empty(0)

    def join(self, track: Track) -> None:
        if not self._free:
            self._grow(track)
        slot = self._free.pop()
        self._latents[slot] = track.latents
        self._history[slot] = 0
        self._hidden[slot, : track.rows] = track.hidden_states
        track.slot = slot

    def leave(self, track: Track) -> torch.Tensor:
        """Free the slot; the image's latents [C, h, w]."""
        latents = self._latents[track.slot].clone()
        self._free.append(track.slot)
        track.slot = -1
        return latents

    def _grow(self, track: Track) -> None:
        old, self._capacity = self._capacity, max(_FIRST_CAPACITY, 2 * self._capacity)
        grown = (
            torch.zeros(self._capacity, *track.latents.shape),
            torch.zeros(self._capacity, HISTORY, *track.latents.shape),
            torch.zeros(self._capacity, 2, *track.hidden_states.shape[1:]),
        )
        for new, tensor in zip(grown, (self._latents, self._history, self._hidden), strict=True):
            if old:
                new[:old] = tensor
        self._latents, self._history, self._hidden = grown
        self._free.extend(reversed(range(old, self._capacity)))

    def step(self, tracks: Sequence[Track], denoise: Denoise) -> None:
        """One UNet evaluation of each track, in one call, and the update of Trajectory's docstring on all of them."""
        slots = torch.tensor([track.slot for track in tracks])
        numbers = torch.stack([track.coefficients[track.evaluation] for track in tracks])[:, :, None, None, None]
        scale, p, q, a, c = numbers[:, :5].unbind(1)
        b = numbers[:, 5:]
        latents = self._latents[slots]
        output = self._guided_output(tracks, slots, latents * scale, denoise)

        history = self._history[slots]
        u = p * latents + q * output
        updated = a * latents + b[:, 0] * u + (b[:, 1:] * history).sum(dim=1)
        noise = self._noise(tracks, latents.shape)
        if noise is not None:
            updated += c * noise
        self._latents[slots] = updated
        self._remember(tracks, slots, u, history)
        for track in tracks:
            track.evaluation += 1

    def _guided_output(
        self, tracks: Sequence[Track], slots: torch.Tensor, scaled: torch.Tensor, denoise: Denoise
    ) -> torch.Tensor:
        """Rows out, rows back, and classifier-free guidance (Ho & Salimans 2022, eq. 6, as diffusers writes it)."""
        image_of_row = [i for i, track in enumerate(tracks) for _ in range(track.rows)]
        kind_of_row = [kind for track in tracks for kind in range(track.rows)]
        rows = torch.tensor(image_of_row)
        timestep = torch.tensor([float(track.trajectory.timestep[track.evaluation]) for track in tracks])
        output = denoise(scaled[rows], timestep[rows], self._hidden[slots[rows], torch.tensor(kind_of_row)]).float()

        first = [row for row, kind in enumerate(kind_of_row) if kind == 0]
        last = [row + track.rows - 1 for row, track in zip(first, tracks, strict=True)]
        conditional, unconditional = output[first], output[last]  # the same row where there is no guidance
        guidance = torch.tensor([track.guidance_scale for track in tracks])[:, None, None, None]
        return unconditional + guidance * (conditional - unconditional)

    @staticmethod
    def _noise(tracks: Sequence[Track], shape: torch.Size) -> torch.Tensor | None:
        """Fresh noise where a track's trajectory draws it, in diffusers' order; None where none does."""
        drawing = [(i, track) for i, track in enumerate(tracks) if track.trajectory.draws[track.evaluation]]
        if not drawing:
            return None
        noise = torch.zeros(shape)
        for i, track in drawing:
            for _ in range(int(track.trajectory.draws[track.evaluation])):
                noise[i] = torch.randn((1, *shape[1:]), generator=track.generator)[0]
        return noise

    def _remember(self, tracks: Sequence[Track], slots: torch.Tensor, u: torch.Tensor, history: torch.Tensor) -> None:
        shifted = torch.cat([u[:, None], history[:, : HISTORY - 1]], dim=1)
        kept = torch.tensor([bool(track.trajectory.remember[track.evaluation]) for track in tracks])
        self._history[slots] = torch.where(kept[:, None, None, None, None], shifted, history)
