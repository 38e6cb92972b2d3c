"""diffusers' attention, with its scores in float32, or a part of them at a time.

Scores are all products of queries and keys: of the autoencoder at 1536 x 1536 pixels, 36,864 times as many as there
are latents. No builder has a kernel that fuses its one head of width 512, so all of them are in memory at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Final

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["float32_scores", "score_in_parts"]

# With eight, scores take less than what the autoencoder's convolutions need beside them.
_MOST_PARTS: Final = 8


def float32_scores(attention: Attention) -> None:
    """Compute queries, keys and values in float32; projections stay in the module's own precision."""
    attention.set_processor(replace(_processor(attention), float32=True))


def score_in_parts(module: nn.Module, multiple: int) -> None:
    """Let each attention of `module` take the queries in parts, one after another: the result is the same.

    `multiple` is a number that any count of queries is a multiple of; parts must be of one size.
    """
    for one in module.modules():
        if isinstance(one, Attention):
            one.set_processor(replace(_processor(one), parts=gcd(multiple, _MOST_PARTS)))


def _processor(attention: Attention) -> _Processor:
    current = attention.processor
    return current if isinstance(current, _Processor) else _Processor()


@dataclass(frozen=True, slots=True)
class _Processor:
    """What diffusers calls an attention processor, for attention without masks."""

    float32: bool = False
    parts: int = 1

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,  # noqa: ARG002  (the autoencoder gives it, and diffusers remarks on what is not named)
        **_: Any,
    ) -> Tensor:
        assert attention_mask is None
        residual, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        output = self._attend(*(one.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for one in (query, key, value)))
        output = attn.to_out[0](output.transpose(1, 2).flatten(2).to(residual.dtype))
        if len(shape) == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All [rows, heads, tokens, width]."""
        if self.float32:
            query, key, value = query.float(), key.float(), value.float()
        if self.parts == 1:
            return F.scaled_dot_product_attention(query, key, value)
        parts = query.unflatten(2, (self.parts, -1)).unbind(2)
        return torch.cat([F.scaled_dot_product_attention(part, key, value) for part in parts], dim=2)
