"""What an adapter of control maps learns from the frames themselves: whether those show the maps that it was given.

The consistency feedback of ControlNet++ (Li et al. 2024), on what a few-step model makes of noise: few
evaluations lead to frames, so that these are of the model's own making, mistakes and all. No teacher takes part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.control_maps import STEP
from animatelcm.evaluate.motion import NOISE, border, centre_of_weight, presence

if TYPE_CHECKING:
    from animatelcm.model import VideoModel

SMALL = 1.0
"""Grey levels below which a gradient's direction is no longer told: what keeps its length differentiable."""
FAINT = 0.05
"""The edge that is half there, in parts of a step over a channel's whole range."""
NONE = 0.01
"""Of pixels of edge: so much less than one that it changes nothing but what 0 / 0 is."""


def disagreement(model: VideoModel, latents: Tensor, maps: Tensor, kind: str) -> Tensor:
    """(B,): how far decoded latents (B, C, F, h, w) are from what ``maps`` (B, 3, F, H, W) in [0, 1] ask of them, mean
    over frames; gradients reach the latents through the autoencoder.

    edge: 1 - ``edge_agreement``; tile: the mean absolute difference; pose, of the miniature: ``off_centre``.
    """
    size = latents.shape[0]
    folded = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    frames = model.vae.decode((folded / model.vae.config.scaling_factor).to(model.vae.dtype)).float()
    wanted = maps.transpose(1, 2).flatten(0, 1)
    if kind == "edge":
        away = 1 - edge_agreement(found(frames, kind), wanted)
    elif kind == "pose":
        away = off_centre(frames, wanted)
    else:
        away = (found(frames, kind) - wanted).abs().flatten(1).mean(1)
    return away.unflatten(0, (size, -1)).mean(1)


def off_centre(frames: Tensor, maps: Tensor) -> Tensor:
    """(N,): how far the thing on the plain background of frames (N, 3, H, W) in [-1, 1] is from the red dot of maps
    (N, 3, H, W), in half sides of the frame; 0 where there is no dot. The place is the centre of weight of all that
    shows (``evaluate.motion``)."""
    shown = (frames + 1) / 2
    rim = torch.from_numpy(border(*shown.shape[-2:])).to(shown.device)
    background = shown.detach()[..., rim].median(dim=-1).values
    place, _ = centre_of_weight(presence(F.softshrink(shown - background[..., None, None], NOISE)))
    wanted, dot = centre_of_weight(maps[:, 0])
    return (place - wanted).square().sum(1).add(1e-6).sqrt() * (dot > 1)


def edge_agreement(seen: Tensor, wanted: Tensor) -> Tensor:
    """(N,) in [0, 1]: F1 of soft edges (N, 3, H, W), 1 where each has the other's within a pixel, diagonal steps too.

    Where e stands out of the mean of its 5x5 pixels by d, there is d / (d + ``FAINT``) of an edge: a blur is none.
    Precision is the share of ``seen`` that ``wanted`` has nearby, at least as clearly; recall the other way round.
    """
    made, asked = (_crests(edges[:, :1]) for edges in (seen, wanted))
    precision, recall = _near(made, asked), _near(asked, made)
    return 2 * precision * recall / (precision + recall)


def _crests(edges: Tensor) -> Tensor:
    out = (edges - F.avg_pool2d(edges, 5, stride=1, padding=2, count_include_pad=False)).clamp(min=0)
    return out / (out + FAINT)


def _near(some: Tensor, others: Tensor) -> Tensor:
    """(N,): the share of some edges (N, 1, H, W) that others have within a pixel; 1 of none."""
    there = torch.minimum(some, F.max_pool2d(others, 3, stride=1, padding=1))
    return (there.flatten(1).sum(1) + NONE) / (some.flatten(1).sum(1) + NONE)


def found(frames: Tensor, kind: str) -> Tensor:
    """Maps (N, 3, H, W) in [0, 1] of frames (N, 3, H, W) in [-1, 1]: ``control_maps.made``'s, but for rounding."""
    shown = (frames + 1) / 2
    if kind == "tile":
        return shown
    if kind == "edge":
        return _soft_edges(255 * shown).expand_as(frames)
    raise ValueError(f"{kind} maps are not found by a function with a gradient; edge and tile are")


def _soft_edges(frames: Tensor) -> Tensor:
    """(N, 3, H, W) in grey levels -> (N, 1, H, W) in [0, 1]: ``control_maps``' soft edges."""
    low, high = frames.new_tensor([1.0, 2.0, 1.0]) / 4, frames.new_tensor([3.0, 10.0, 3.0])
    difference = frames.new_tensor([-1.0, 0.0, 1.0])
    planes = frames.flatten(0, 1).unsqueeze(1)
    with torch.autocast(frames.device.type, enabled=False):  # a convolution would round
        smooth = _filtered(planes, torch.outer(low, low))
        across, down = (_filtered(smooth, torch.outer(*axes)) for axes in ((high, difference), (difference, high)))
    length = (across.square() + down.square() + SMALL**2).sqrt() - SMALL
    return (length.unflatten(0, frames.shape[:2]).amax(1) / (STEP * 255)).clamp(max=1)


def _filtered(planes: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), kernel[None, None])
