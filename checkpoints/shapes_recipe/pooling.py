"""Start an AutoencoderKL as plain pooling: a picture in, its 8x8 means out, exactly.

From random weights this small autoencoder stays for a thousand steps at each picture's mean, because its group
norms take away the absolute colours of flat areas. So training starts where the network already passes colours on:
residual branches begin at zero, convolutions carry red, green and blue (and their negatives) in channels of their
own, and two constant channels hold each norm's scale. Training then only has to learn what pooling loses.
"""

from __future__ import annotations

from typing import Final

import torch
from diffusers import AutoencoderKL
from torch import nn

__all__ = ["start_as_pooling"]

_COLOURS: Final = range(3)
_CONSTANTS: Final = (3, 4)
_NEGATIVES: Final = range(5, 8)
_CARRIED: Final = 8  # channels 0 to 7, all in the first group of each norm
_CONSTANT: Final = 8.0
_START_LOGVAR: Final = -6.0


def _carry(convolution: nn.Conv2d, taps: list[tuple[int, int]]) -> None:
    """Make the carried output channels the mean of the same input channels at the taps; leave the rest as it is."""
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    weight[:_CARRIED] = 0
    bias[:_CARRIED] = 0
    for channel in range(_CARRIED):
        for row, column in taps:
            weight[channel, channel, row, column] = 1 / len(taps)


def _enter(convolution: nn.Conv2d) -> None:
    """First convolution: colours, constants, negatives."""
    bias = convolution.bias
    assert bias is not None
    convolution.weight[:_CARRIED] = 0
    bias[:_CARRIED] = 0
    for colour in _COLOURS:
        convolution.weight[colour, colour, 1, 1] = 1
        convolution.weight[_NEGATIVES[colour], colour, 1, 1] = -1
    bias[_CONSTANTS[0]], bias[_CONSTANTS[1]] = _CONSTANT, -_CONSTANT


def _leave(convolution: nn.Conv2d, channels_in_group: int) -> None:
    """Last convolution: silu(y) - silu(-y) = y, so a channel less its negative undoes norm and activation."""
    bias = convolution.bias
    assert bias is not None
    # Mean square of the group: two constants, and six channels of colours whose mean square is about 1/2.
    scale = ((2 * _CONSTANT**2 + 3.0) / channels_in_group) ** 0.5
    convolution.weight[: len(_COLOURS)] = 0
    bias[: len(_COLOURS)] = 0
    for colour in _COLOURS:
        convolution.weight[colour, colour, 1, 1] = scale
        convolution.weight[colour, _NEGATIVES[colour], 1, 1] = -scale


@torch.no_grad()
def start_as_pooling(vae: AutoencoderKL) -> None:
    """Set the weights in place. The autoencoder needs at least 16 channels at every level and 2 groups a norm."""
    for name, module in vae.named_modules():
        kind = name.rsplit(".", maxsplit=1)[-1]
        if kind == "conv2" or name.endswith("to_out.0"):
            module.weight.zero_()
            module.bias.zero_()
        elif kind == "conv_shortcut":
            _carry(module, [(0, 0)])
        elif ".downsamplers." in name and kind == "conv":
            _carry(module, [(0, 0), (0, 1), (1, 0), (1, 1)])
        elif ".upsamplers." in name and kind == "conv":
            _carry(module, [(1, 1)])
    groups = vae.config.norm_num_groups
    widths = vae.config.block_out_channels
    _enter(vae.encoder.conv_in)
    _leave(vae.encoder.conv_out, widths[-1] // groups)
    _enter(vae.decoder.conv_in)
    _leave(vae.decoder.conv_out, widths[0] // groups)
    latent = vae.config.latent_channels
    for convolution, size in ((vae.quant_conv, 2 * latent), (vae.post_quant_conv, latent)):
        convolution.weight.copy_(torch.eye(size)[:, :, None, None])
        convolution.bias.zero_()
    vae.quant_conv.weight[latent:] = 0
    vae.quant_conv.bias[latent:] = _START_LOGVAR
