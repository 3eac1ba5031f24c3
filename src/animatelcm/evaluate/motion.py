"""Which of the named motions a clip shows, and how much it moves, from its frames alone.

The picture is told from a plain background, and its centre, size and turns are measured in every frame. The answer
is the motion of ``data.sprites.MOTIONS`` whose poses, at some size and drift, would give nearly the same trajectory.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from animatelcm.data.sprites import CLIP_FRAMES, LOOPS, MOTIONS, Pose

STILL = "still"
NOISE = 0.06  # of the range of a channel: what differs less from the background is none
PRESENT = 0.15  # of the range of a channel: what differs more from the background weighs no more
SIZES, DRIFTS = 3, 9  # how finely the free quantities of each motion are tried
ANGLES = 64  # of a polar picture, 5.6 degrees each
RADII = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7)  # of a polar picture, in root mean square radii
WIDEST_TURN = 45  # degrees between neighbouring frames: more cannot be told from less in a picture with symmetries
TURN_COSTS = 0.05  # of correlation, for the widest: what looks the same turned or not has not turned

# How far a measurement may well lie from the truth: what one unit of mismatch is.
POSITION, LOG_SIZE, TURN = 0.08, 0.12, 10.0  # half sides of the frame, nepers, degrees
OFF_CENTRE = 0.15  # of the picture's weight from the middle of its square, in half sides of the square
WORST = 9.0  # units^2: one frame that went wrong says no more than this


class Trajectory(NamedTuple):
    """What is measured, in the units of ``Pose``: ``centre`` (F, 2), ``log_size`` (F,) up to a constant of the picture,
    and ``turn`` (F - 1,), clockwise degrees from each frame to the next.
    """

    centre: Tensor
    log_size: Tensor
    turn: Tensor


def motion_amount(frames: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames (F, H, W, 3), in grey levels."""
    if len(frames) < 2:
        raise ValueError(f"motion needs two frames at least, got {len(frames)}")
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def classify(frames: np.ndarray) -> str:
    """The motion that uint8 frames (16, H, W, 3) show: a key of ``MOTIONS``, or ``STILL``."""
    if len(frames) != CLIP_FRAMES:
        raise ValueError(f"the motions last {CLIP_FRAMES} frames, got {len(frames)}")
    templates = _templates()
    return templates.names[int(mismatch(measure(frames), templates).argmin())]


def measure(frames: np.ndarray) -> Trajectory:
    """Follow the picture through uint8 frames (F, H, W, 3)."""
    stands_out = foreground(frames)
    weight = presence(stands_out)
    centre, total = centre_of_weight(weight)
    x, y = _axes(weight)
    distance = (x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2
    radius = (((weight * distance).sum(dim=(1, 2)) + 2e-4) / total).sqrt()
    return Trajectory(centre, radius.log(), _turns(stands_out, centre, radius))


def border(height: int, width: int) -> np.ndarray:
    """Where a frame is nothing but background, as far as that can be said: bool (H, W), two pixels wide."""
    mask = np.ones((height, width), dtype=bool)
    mask[2:-2, 2:-2] = False
    return mask


def background(frames: np.ndarray) -> Tensor:
    """The median colour along the border of all uint8 frames (F, H, W, 3): float32 (3,) in [0, 1]."""
    return torch.from_numpy(frames[:, border(*frames.shape[1:3])]).flatten(0, 1).median(dim=0).values.float() / 255


def foreground(frames: np.ndarray, threshold: float = NOISE) -> Tensor:
    """How each pixel differs from the background, less what noise may do: float32 (F, 3, H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    return F.softshrink(pixels - background(frames)[:, None, None], threshold)


def presence(stands_out: Tensor) -> Tensor:
    """How much each pixel of ``foreground`` weighs: (F, 3, H, W) -> (F, H, W), at most ``PRESENT``."""
    return stands_out.abs().amax(dim=1).clamp(max=PRESENT)


def centre_of_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(F, H, W) -> centre (F, 2), x and y in [-1, 1], and the whole weight (F,), a little more than none."""
    x, y = _axes(weight)
    total = weight.sum(dim=(1, 2)) + 1e-3  # an empty frame shows a picture in the middle
    return torch.stack([(weight * x).sum(dim=(1, 2)), (weight * y).sum(dim=(1, 2))], dim=1) / total[:, None], total


def _axes(weight: Tensor) -> tuple[Tensor, Tensor]:
    height, width = weight.shape[1:]
    return _cell_centres(width, weight.device), _cell_centres(height, weight.device)[:, None]


def _cell_centres(cells: int, device: torch.device) -> Tensor:
    return (torch.arange(cells, device=device) + 0.5) * (2 / cells) - 1


def _turns(pictures: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The turn from each frame to the next at which their polar pictures agree best."""
    angle = torch.arange(ANGLES) * (2 * math.pi / ANGLES)
    spokes = torch.stack([angle.cos(), angle.sin()], dim=-1)
    reach = radius[:, None] * torch.tensor(RADII)
    grid = centre[:, None, None] + reach[:, :, None, None] * spokes
    polar = F.grid_sample(pictures, grid, align_corners=False)
    varying = (polar - polar.mean(dim=-1, keepdim=True)) * torch.tensor(RADII).sqrt()[:, None]
    spectrum, energy = torch.fft.rfft(varying), varying.square().sum(dim=(1, 2, 3)) + 1e-3
    agreement = torch.fft.irfft((spectrum[:-1].conj() * spectrum[1:]).sum(dim=(1, 2)), n=ANGLES)
    agreement /= (energy[:-1] * energy[1:]).sqrt()[:, None]
    widest = WIDEST_TURN * ANGLES // 360
    steps = torch.arange(-widest, widest + 1)
    best = (agreement[:, steps] - steps.abs() * (TURN_COSTS / widest)).argmax(dim=1)
    return steps[best] * (360 / ANGLES)


class Templates(NamedTuple):
    """Poses of every motion at every tried size, drift and beginning (T of them): ``centre`` (T, F, 2), ``size`` and
    ``degrees`` (T, F).
    """

    names: tuple[str, ...]
    centre: Tensor
    size: Tensor
    degrees: Tensor


@lru_cache(maxsize=1)
def _templates() -> Templates:
    named = [(STILL, [Pose(0.7, 0.0, 0.0)] * CLIP_FRAMES)]
    for name, (motion, sizes) in MOTIONS.items():
        tried = product(np.linspace(*sizes, SIZES).tolist(), np.linspace(-1, 1, DRIFTS).tolist())
        for poses in [motion(size, drift) for size, drift in tried]:
            begins = range(CLIP_FRAMES) if name in LOOPS else (0,)
            named += [(name, poses[begin:] + poses[:begin]) for begin in begins]
    poses = torch.tensor([[tuple(pose) for pose in poses] for _, poses in named])
    return Templates(tuple(name for name, _ in named), poses[..., 1:3], poses[..., 0], poses[..., 3])


def mismatch(seen: Trajectory, templates: Templates) -> Tensor:
    """How badly a trajectory agrees with each template, (T,): mean square errors in units of what is expected."""
    away = _off_centre(seen, templates)
    place = (away.error / POSITION).square().sum(dim=-1).clamp(max=WORST).mean(dim=1)
    log_size = templates.size.log()
    growth = (seen.log_size - seen.log_size.mean()) - (log_size - log_size.mean(dim=1, keepdim=True))
    step = (templates.degrees.diff(dim=1) + 180) % 360 - 180
    turned = seen.turn.abs() - step.abs()
    return (
        place
        + (growth / LOG_SIZE).square().clamp(max=WORST).mean(dim=1)
        + (turned / TURN).square().clamp(max=WORST).mean(dim=1)
        + (away.offset / OFF_CENTRE).square().sum(dim=1)
    )


class _Fit(NamedTuple):
    offset: Tensor
    error: Tensor


def _off_centre(seen: Trajectory, templates: Templates) -> _Fit:
    """Where in the picture its centre of weight is, (T, 2), and the error (T, F, 2) left: least squares with a prior.

    The centre of weight turns and grows with the picture: centre + size * R(degrees) @ offset.
    """
    angle = templates.degrees.deg2rad()
    cos, sin = templates.size * angle.cos(), templates.size * angle.sin()
    frame = torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)
    away = seen.centre - templates.centre
    prior = len(seen.centre) * (POSITION / OFF_CENTRE) ** 2
    offset = torch.einsum("tfij,tfi->tj", frame, away) / (templates.size.square().sum(dim=1) + prior)[:, None]
    return _Fit(offset, away - torch.einsum("tfij,tj->tfi", frame, offset))
