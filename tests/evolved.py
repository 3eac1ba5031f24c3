"""How ComfyUI-AnimateDiff-Evolved takes an AnimateLCM-I2V file, rebuilt in plain torch without ComfyUI.

Of github.com/Kosinkadink/ComfyUI-AnimateDiff-Evolved, as read, with ComfyUI's own operators as torch's:
``animatediff/adapter_animatelcm_i2v.py`` (commit 7451bb5; ``AdapterEmbed`` and its blocks) is ``Encoder``,
``animatediff/motion_module_ad.py`` (599b718; ``normalize_ad_state_dict``, ``init_img_encoder``) and
``animatediff/model_injection.py`` (916dd55; ``load_motion_module_gen2``, ``verify_load_result``) are ``loaded``. Names
of tensors, shapes and arithmetic are theirs. There widths are always Stable Diffusion 1.5's.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import standins

PREFIX = "img_encoder."


class Block(nn.Module):
    """At ksize=1, sk=True and use_conv=False, as they build it: what it gets is added as it is, halved by means."""

    def __init__(self, before: int, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.in_conv = nn.Conv2d(before, channels, 1) if before != channels else None
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            odd_rows, odd_columns = (side % 2 for side in x.shape[-2:])
            x = nn.AvgPool2d(2, 2)(nn.ReplicationPad2d((0, odd_columns, 0, odd_rows))(x))
        x = x if self.in_conv is None else self.in_conv(x)
        return self.block2(F.relu(self.block1(x))) + x


class Encoder(nn.Module):
    """Two blocks a level; from the second level on the first of them halves what it gets."""

    def __init__(self, channels: tuple[int, ...] = standins.SD15) -> None:
        super().__init__()
        self.body = nn.ModuleList()
        for i, width in enumerate(channels):
            self.body.append(Block(channels[max(i - 1, 0)], width, down=i > 0))
            self.body.append(Block(width, width, down=False))
        self.conv_in = nn.Conv2d(4, channels[0], 3, padding=1)
        self.ref_drift = 0.5
        """What their node sets, to 0 where nobody says otherwise."""
        self.insertion_weights = [1.0, 1.0, 1.0, 1.0]

    def forward(self, x: Tensor, video_length: int, batched_number: int) -> list[Tensor]:
        """The picture's latent, scaled, at every frame (F, 4, h, w) -> one (batched_number * F, C, h', w') a level."""
        width = self.conv_in.out_channels
        rates = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10_000.0) / width))
        angles = torch.arange(video_length).float()[:, None] * rates
        positions = torch.empty(video_length, width)
        positions[:, 0::2], positions[:, 1::2] = angles.sin(), angles.cos()
        x = self.conv_in(x) + self.ref_drift * positions[:, :, None, None]
        features = []
        for first, second in zip(self.body[0::2], self.body[1::2], strict=True):
            x = second(first(x))
            features.append(x.repeat(batched_number, 1, 1, 1))
        return [weight * feature for weight, feature in zip(self.insertion_weights, features, strict=True)]


def loaded(path: Path, channels: tuple[int, ...] = standins.SD15) -> Encoder | None:
    """The encoder of a safetensors file that is opened as a motion model; None where a file passes for one without.

    A file is an AnimateLCM where no name has "pos_encoder", and only of such a one the encoder is kept: all other
    names without "temporal" are dropped. What is left has to be what the networks have, name by name and shape by
    shape, but for AnimateLCM's positions, or RuntimeError is raised. No prefix is cut: the encoder is a module there.
    """
    state = load_file(path)
    levels = max((int(key.split(".")[1]) for key in state if "down_blocks" in key), default=-1)
    if levels != 3:
        raise RuntimeError(f"no motion model of Stable Diffusion 1.5: the last level is {levels}")
    if any("pos_embed" in key for key in state) or "FancyVideo" in state or "conv_in.weight" in state:
        raise RuntimeError("taken for HelloMeme, FancyVideo or PIA")
    rows = next((value.shape[1] for key, value in state.items() if key.endswith("pos_encoder.pe")), None)
    lcm = not any("pos_encoder" in key for key in state)
    state = {key: value for key, value in state.items() if "temporal" in key or (lcm and key.startswith(PREFIX))}
    encoder = Encoder(channels) if any(key.startswith(PREFIX) for key in state) else None

    shapes = standins.motion(channels, mid=any(key.startswith("mid_block.") for key in state), rows=rows)
    if encoder is not None:
        shapes |= {PREFIX + key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    wrong = [key for key in sorted(shapes.keys() | state.keys()) if shapes.get(key) != _shape(state.get(key))]
    if wrong:
        raise RuntimeError(f"missing, unexpected or of another shape: {', '.join(wrong)}")
    if encoder is not None:
        encoder.load_state_dict({key.removeprefix(PREFIX): state[key] for key in state if key.startswith(PREFIX)})
        encoder.eval().requires_grad_(False)
    return encoder


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)
