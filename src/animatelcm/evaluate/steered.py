"""Clips that something steers, held against the real clips it was taken from: a first frame, or a layout.

The picture of a clip is its real clip's first frame, its layout that of all its frames.

* image: identity, cosine of EfficientNet-lite0 features of the judged frames and of the picture; first-frame PSNR,
  against the picture through the model's own autoencoder, which bounds what can be had; colour error (Delta E).
* edge, canny, tile: control error is 1 - F1 of the edges; pose, depth: distance of the thing's centre, in pixels.
  Clips of a subject's own animation are left out for pose, whose keypoints stand still in them.
* Flicker: the variance of that error from frame to frame, and the warped difference, over that of the real clips.

Figures come as samples, a row a clip, of which ``bootstrap.average`` makes one number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from animatelcm.adapters import IMAGE
from animatelcm.condition import Condition, Control
from animatelcm.control_maps import made
from animatelcm.data.emoji import Shot, drawn, staged
from animatelcm.data.looks import RENDERED, layout
from animatelcm.data.sprites import CELL, SpritePack
from animatelcm.evaluate.features import JUDGED, EfficientNetLite0, frame_features
from animatelcm.evaluate.following import displacements, edge_f1, error_variance, keypoint_distance, warped_difference
from animatelcm.evaluate.likeness import colour_error, identity, psnr
from animatelcm.evaluate.report import Steer


def condition(shot: Shot, pack: SpritePack, steer: Steer) -> Condition:
    """What the real clip of a shot gives to steer by."""
    if not steer:
        return Condition()
    if steer == IMAGE:
        return Condition(image=drawn(shot, pack)[0])
    maps = layout(staged(shot, pack), steer) if steer in RENDERED else made(steer, drawn(shot, pack))
    return Condition(controls=(Control(steer, maps),))


def keeping(
    network: EfficientNetLite0, clips: Sequence[np.ndarray], real: Sequence[np.ndarray], firsts: Sequence[np.ndarray]
) -> dict[str, Tensor]:
    """How well clips keep to the first frames of real ones; ``firsts`` are these through the autoencoder, uint8."""
    found: dict[str, list[float]] = {"identity": [], "first_frame_psnr": [], "colour_error": []}
    for clip, truth, first in zip(clips, real, firsts, strict=True):
        features = frame_features(network, np.concatenate([truth[:1], clip[JUDGED]]))
        found["identity"].append(float(identity(features[1:], features[0]).mean()))
        found["first_frame_psnr"].append(min(psnr(clip[0], first), 60.0))
        found["colour_error"].append(float(colour_error(clip, truth[0]).mean()))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def following(
    steer: Steer, shots: Sequence[Shot], clips: Sequence[np.ndarray], real: Sequence[np.ndarray], pack: SpritePack
) -> dict[str, Tensor]:
    """How well, and how steadily, clips follow the layouts of real ones."""
    errors, flicker, warped = [], [], []
    for shot, clip, truth in zip(shots, clips, real, strict=True):
        if steer in RENDERED:
            sprites = staged(shot, pack).sprites
            if steer == "pose" and sprites.ndim == 4:
                continue  # its own animation moves what the keypoints do not say
            away = keypoint_distance(clip, shot.poses, sprites)
        else:
            away = 1 - edge_f1(clip, truth)
        moved = displacements(shot.poses, CELL, CELL)
        errors.append(float(away.mean()))
        flicker.append(error_variance(away))
        warped.append((warped_difference(clip, moved), warped_difference(truth, moved)))
    if not errors:
        raise ValueError(f"none of {len(clips)} clips is judged by {steer} maps; ask for more clips")
    found = {"control_error": errors, "control_flicker": flicker, "warped_difference": warped}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
