"""Encoders of an input picture: features for every frame of a video, added inside VideoUNet's way down."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatelcm.nets.motion import sinusoid

Sees = Literal["latent", "pixels"]
Spread = Literal["repeat", "first"]


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Shape of an encoder; the defaults are those of AnimateLCM's for Stable Diffusion 1.5."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """By level: the UNet's ``block_out_channels``."""
    in_channels: int = 4
    """Of what it sees: a latent's, or a picture's 3."""
    sees: Sees = "latent"
    """The autoencoder's latent, or pixels, whose blocks of ``downscale`` x ``downscale`` become channels."""
    downscale: int = 8
    """Pixels that a latent cell covers on each side; for ``sees="pixels"``."""
    spread: Spread = "repeat"
    """The picture at every frame, or at the first one, the others seeing zeros and positions."""
    motion_scale: float = 0.8
    """How strong the frames' positions were in training, and are where nobody says otherwise."""

    def __post_init__(self) -> None:
        for name, known in (("sees", get_args(Sees)), ("spread", get_args(Spread))):
            if getattr(self, name) not in known:
                raise ValueError(f"image encoder {name}={getattr(self, name)!r}; choose one of {', '.join(known)}")
        if type(self.motion_scale) not in (int, float) or not 0 <= self.motion_scale <= 4:
            raise ValueError(f"image encoder motion_scale={self.motion_scale!r} is no number of 0 to 4; give one")
        numbers = (*self.channels, self.in_channels, self.downscale)
        if not 1 <= len(self.channels) <= 8 or not all(type(n) is int and 1 <= n <= 16_384 for n in numbers):
            raise ValueError(
                f"image encoder channels={self.channels}, in_channels={self.in_channels}, downscale={self.downscale}: "
                "give 1 to 8 levels and whole numbers from 1 to 16384"
            )

    def to_json(self) -> dict[str, Any]:
        """The contents of its ``config.json``."""
        return {"_class_name": "ImageEncoder", **asdict(self)}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> ImageEncoderConfig:
        """Undo ``to_json``. Raises ValueError naming a setting that it does not know."""
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        settings["channels"] = tuple(settings.get("channels", cls.channels))
        try:
            return cls(**settings)
        except TypeError as error:
            raise ValueError(f"image encoder: {error}") from error


class ResidualLayer(nn.Module):
    """Two convolutions around a ReLU, added to their input; the second is zero at first."""

    def __init__(self, channels: int, out_channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        if channels != out_channels:
            self.in_conv = _zero(nn.Conv2d(channels, out_channels, 1))
        self.block1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.block2 = _zero(nn.Conv2d(out_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Frames (N, C, h, w) -> (N, C', h, w), half as high and wide (rounded up) where it goes down."""
        if self.down:
            height, width = x.shape[2:]
            x = F.avg_pool2d(F.pad(x, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        if hasattr(self, "in_conv"):
            x = self.in_conv(x)
        return x + self.block2(F.relu(self.block1(x)))


class ImageEncoder(nn.Module):
    """AnimateLCM's image-to-video encoder (section 4.3; the released ``img_encoder.*``): convolutions on the picture's
    latent, frame by frame, with the frame's position added after the first one. Neither timestep nor text go in.

    At first only the positions reach the finest level, and nothing the others.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.channels
        inputs = config.in_channels * (config.downscale**2 if config.sees == "pixels" else 1)
        self.conv_in = _zero(nn.Conv2d(inputs, widths[0], 3, padding=1))
        self.body = nn.ModuleList(
            ResidualLayer(widths[max(i - 1, 0) // 2], widths[i // 2], down=i > 0 and i % 2 == 0)
            for i in range(2 * len(widths))
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor, frames: int, motion_scale: float | None = None) -> list[Tensor]:
        """The picture's latent (B, C, h, w), or pixels (B, 3, H, W) in [-1, 1] -> one (B, C', F, h', w') a level.

        ``motion_scale`` multiplies the positions: 0 makes all frames alike, None is as in training.
        """
        scale = self.config.motion_scale if motion_scale is None else motion_scale
        if self.config.sees == "pixels":
            image = F.pixel_unshuffle(image, self.config.downscale)
        weight = self.conv_in.weight
        x = self._spread(image.to(weight.dtype), frames)
        positions = sinusoid(frames, weight.shape[0], weight.device).to(weight)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        x = x + scale * positions.repeat(len(image), 1)[:, :, None, None]
        features = []
        for i, layer in enumerate(self.body):
            x = layer(x)
            if i % 2:
                features.append(x.unflatten(0, (-1, frames)).transpose(1, 2))
        return features

    def _spread(self, image: Tensor, frames: int) -> Tensor:
        """(B, C, h, w) -> (B * F, C, h, w)."""
        spread = image[:, None].expand(-1, frames, -1, -1, -1)
        if self.config.spread == "first":
            first = torch.arange(frames, device=image.device) == 0
            spread = spread * first[:, None, None, None]
        return spread.flatten(0, 1)


class ImageTokens(nn.Module):
    """A picture as words, for comparison: its latent's cells become tokens that stand behind the text's.

    The spatial layers attend to them as they attend to text; the rest of the network does not change.
    """

    def __init__(self, in_channels: int, text_channels: int) -> None:
        super().__init__()
        self.settings = {"in_channels": in_channels, "text_channels": text_channels}
        self.norm = nn.LayerNorm(in_channels)
        self.proj = nn.Linear(in_channels, 4 * text_channels)
        self.out = nn.Linear(4 * text_channels, text_channels)

    def forward(self, image: Tensor) -> Tensor:
        """Latent (B, C, h, w) -> tokens (B, h * w, D), each with the sinusoid of its place."""
        cells = image.flatten(2).transpose(1, 2).to(self.proj.weight.dtype)
        tokens = self.out(F.gelu(self.proj(self.norm(cells))))
        return tokens + sinusoid(*tokens.shape[1:], tokens.device).to(tokens)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
