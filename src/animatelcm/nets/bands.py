"""Decoders in horizontal bands: what they compute at once, in the memory that some rows take.

Tiles with blended seams are the usual way. A decoder normalises over the whole picture and looks about in all of it,
so that tiles change its colours: the miniature's drew a 256x256 picture in tiles of 128 at 15.5 dB of what it draws at
once. Here each layer goes over the picture, band by band, before the next one begins, and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatelcm.nets.autoencoder import Autoencoder, ResidualBlock
from animatelcm.nets.layers import GroupNorm

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


def decode_in_bands(network: Autoencoder | AutoencoderTiny, latents: Tensor, bands: int) -> Tensor:
    """``network.decode(latents)``, (N, C, h, w) -> (N, 3, H, W) on the CPU, where layers wait between bands."""
    decoder = network.decoder
    if not isinstance(network, Autoencoder):
        x = torch.tanh(latents / 3) * 3
        for layer in decoder.layers:
            x = _banded(layer, bands, latents.device, _reach(layer), x.cpu())
        return x.mul(2).sub(1)
    latents = network.post_quant_conv(latents)
    x = decoder.mid_block(decoder.conv_in(latents)).cpu()  # there its attention is, and cells are few
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, bands, latents.device)
        for upsampler in block.upsamplers:
            x = _banded(upsampler, bands, latents.device, 1, x)
    norm = _normalised(decoder.conv_norm_out, x, bands, latents.device)
    return _banded(lambda part: decoder.conv_out(norm(part)), bands, latents.device, 1, x)


def _resnet(block: ResidualBlock, x: Tensor, bands: int, device: torch.device) -> Tensor:
    norm1 = _normalised(block.norm1, x, bands, device)
    h = _banded(lambda part: block.conv1(norm1(part)), bands, device, 1, x)
    norm2 = _normalised(block.norm2, h, bands, device)

    def second(h: Tensor, x: Tensor) -> Tensor:
        return block.conv_shortcut(x) + block.conv2(norm2(h))

    return _banded(second, bands, device, 1, h, x)


def _banded(layer: Callable[..., Tensor], bands: int, device: torch.device, reach: int, *inputs: Tensor) -> Tensor:
    """A layer over tensors (N, C, h, w) of one height, band by band, each with the ``reach`` rows beyond it that the
    layer looks at; they come from the CPU, and what it makes of them goes there."""
    height, made = inputs[0].shape[2], []
    for begin, end in _spans(height, bands):
        top, bottom = max(0, begin - reach), min(height, end + reach)
        found = layer(*(x[:, :, top:bottom].to(device) for x in inputs))
        scale = found.shape[2] // (bottom - top)
        made.append(found[:, :, scale * (begin - top) : scale * (end - top)].cpu())
    return torch.cat(made, dim=2)


def _normalised(norm: GroupNorm, x: Tensor, bands: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A GroupNorm, its SiLU too, with the statistics of the whole of x, for parts of it."""
    sums = torch.zeros(2, len(x), norm.num_groups, dtype=torch.float64)
    for begin, end in _spans(x.shape[2], bands):
        part = x[:, :, begin:end].to(device).unflatten(1, (norm.num_groups, -1)).float()
        var, mean = (value.double().cpu() for value in torch.var_mean(part, (2, 3, 4), correction=0))
        sums += (end - begin) / x.shape[2] * torch.stack([mean, var + mean**2])
    mean, square = sums
    rate = torch.rsqrt(square - mean**2 + norm.eps)
    mean, rate = (value.float().to(device)[:, :, None, None, None] for value in (mean, rate))

    def apply(part: Tensor) -> Tensor:
        whitened = (part.unflatten(1, (norm.num_groups, -1)).float() - mean) * rate
        weight, bias = (value.float()[:, None, None] for value in (norm.weight, norm.bias))
        found = (whitened.flatten(1, 2) * weight + bias).to(part.dtype)
        return F.silu(found) if norm.silu else found

    return apply


def _spans(height: int, bands: int) -> list[tuple[int, int]]:
    """Rows (begin, end) of as many bands as there may be, all but equal."""
    count = min(bands, height)
    edges = [height * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def _reach(layer: nn.Module) -> int:
    """Rows beyond one that a layer without attention looks at."""
    return sum(module.kernel_size[0] // 2 for module in layer.modules() if isinstance(module, nn.Conv2d))
