"""What adapters add to one evaluation of a VideoUNet: diffusers' ControlNet and T2I-Adapter applied frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from animatelcm.nets.image_encoder import ImageEncoder, ImageTokens
from animatelcm.nets.unet import UNetConfig

if TYPE_CHECKING:
    from diffusers import ControlNetModel, T2IAdapter

CHUNK = 16
"""Frames that go through a ControlNet at a time: half a network's activations for each."""


class Clues(NamedTuple):
    """What adapters look at beside noisy latents and text; None where there is none."""

    image: Tensor | None = None
    """The input picture's latent, clean: (B, C, h, w)."""
    pixels: Tensor | None = None
    """The input picture: (B, 3, H, W) in [-1, 1]."""
    maps: Tensor | None = None
    """Control maps (B, 3, F, H, W) in [0, 1]."""

    def repeated(self, count: int) -> Clues:
        """For a batch that holds the same videos ``count`` times, one after the other."""
        return Clues(*(None if clue is None else torch.cat([clue] * count) for clue in self))


class Hints(NamedTuple):
    """Tensors that a VideoUNet takes beside latents and text; empty where there is nothing to add."""

    features: tuple[Tensor, ...] = ()
    """One (B, C, F, h, w) for each down block."""
    skip_residuals: tuple[Tensor, ...] = ()
    """One for each skip connection."""
    mid_residual: Tensor | None = None
    tokens: Tensor | None = None
    """(B, L', D), to stand behind the text's."""

    def times(self, scale: float) -> Hints:
        """Residuals and features ``scale`` times as strong; tokens stay."""
        many = tuple(tuple(scale * tensor for tensor in tensors) for tensors in self[:2])
        return Hints(*many, None if self.mid_residual is None else scale * self.mid_residual, self.tokens)

    def merged(self, other: Hints) -> Hints:
        """Both, added up."""
        mids = [mid for mid in (self.mid_residual, other.mid_residual) if mid is not None]
        tokens = [tokens for tokens in (self.tokens, other.tokens) if tokens is not None]
        return Hints(
            _sum(self.features, other.features),
            _sum(self.skip_residuals, other.skip_residuals),
            sum(mids[1:], mids[0]) if mids else None,
            torch.cat(tokens, 1) if tokens else None,
        )

    def repeated(self, count: int) -> Hints:
        """For a batch that holds the same videos ``count`` times, one after the other."""
        return self if count == 1 else self._each(lambda tensor: torch.cat([tensor] * count))

    def behind_nothing(self) -> Hints:
        """For a batch of twice as many, whose first half is told nothing."""
        return self._each(lambda tensor: torch.cat([torch.zeros_like(tensor), tensor]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Hints:
        many = (tuple(map(change, tensors)) for tensors in self[:2])
        return Hints(*many, *(None if tensor is None else change(tensor) for tensor in self[2:]))

    def arguments(self, text: Tensor) -> dict[str, object]:
        """Keyword arguments of ``VideoUNet`` with text (B, L, D)."""
        found: dict[str, object] = {name: getattr(self, name) for name in self._fields[:2] if getattr(self, name)}
        if self.mid_residual is not None:
            found["mid_residual"] = self.mid_residual
        return {"text": text if self.tokens is None else torch.cat([text, self.tokens.to(text)], 1), **found}


NOTHING = Hints()


def _sum(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(ours, theirs, strict=True)) if ours and theirs else ours or theirs


class Adapter(nn.Module):
    """A network of any of the kinds that adapters are, as a function from what it may look at to hints."""

    def __init__(self, network: nn.Module, *, motion_scale: float | None = None) -> None:
        super().__init__()
        self.network, self.motion_scale = network, motion_scale

    @property
    def steady(self) -> bool:
        """Whether its hints are the same at every timestep, so that once a video is enough."""
        return not _is_controlnet(self.network)

    @property
    def pooled(self) -> bool:
        """Whether it tells what a picture is like, not where (ControlNet 1.1's shuffle): such a one acts on the guided
        half alone, or guidance would take out what it adds."""
        return _is_controlnet(self.network) and bool(self.network.config.global_pool_conditions)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, clues: Clues) -> Hints:
        """Latents (B, C, F, h, w), timesteps (B,), text (B, L, D) -> hints for one evaluation at them.

        Raises ValueError where the clue that it looks at is not there.
        """
        network = self.network
        if isinstance(network, ImageTokens):
            return Hints(tokens=network(_given(clues.image, "picture")))
        if isinstance(network, ImageEncoder):
            seen = clues.image if network.config.sees == "latent" else clues.pixels
            return Hints(features=tuple(network(_given(seen, "picture"), x.shape[2], self.motion_scale)))
        maps = _given(clues.maps, "control maps")
        if self.steady:
            return t2i_hints(cast("T2IAdapter", network), maps)
        return control_hints(cast("ControlNetModel", network), x, t, text, maps)


def _is_controlnet(network: nn.Module) -> bool:
    return type(network).__name__ == "ControlNetModel"


def _given(clue: Tensor | None, what: str) -> Tensor:
    if clue is None:
        raise ValueError(f"this adapter looks at {what}, and there is none; give it, or leave the adapter out")
    return clue


def t2i_hints(adapter: T2IAdapter, maps: Tensor) -> Hints:
    """Maps (B, 3, F, H, W) in [0, 1] -> features for each down block.

    They depend neither on the timestep nor on the text: once a video is enough. An adapter of one input channel gets
    the mean of the three.
    """
    flat, frames = _flat(maps.to(adapter.dtype)), maps.shape[2]
    if adapter.config.in_channels == 1:
        flat = flat.mean(1, keepdim=True)
    return Hints(features=tuple(_video(feature, frames) for feature in adapter(flat)))


def control_hints(network: ControlNetModel, x: Tensor, t: Tensor, text: Tensor, maps: Tensor) -> Hints:
    """Latents (B, C, F, h, w), timesteps (B,), text (B, L, D), maps (B, 3, F, H, W) in [0, 1] -> residuals.

    ``CHUNK`` frames at a time; every frame is an image with its video's text.
    """
    frames = x.shape[2]
    flat, seen = _flat(x.to(network.dtype)), _flat(maps.to(network.dtype))
    times, words = t.repeat_interleave(frames), text.to(network.dtype).repeat_interleave(frames, dim=0)
    parts = [
        network(x_, t_, encoder_hidden_states=text_, controlnet_cond=maps_, return_dict=False)
        for x_, t_, text_, maps_ in zip(*(whole.split(CHUNK) for whole in (flat, times, words, seen)), strict=True)
    ]
    skips = [torch.cat(pieces) for pieces in zip(*(skips for skips, _ in parts), strict=True)]
    mid = torch.cat([mid for _, mid in parts])
    return Hints(skip_residuals=tuple(_video(skip, frames) for skip in skips), mid_residual=_video(mid, frames))


def t2i_adapter(config: UNetConfig, downscale: int) -> T2IAdapter:
    """A fresh T2I-Adapter for a UNet, whose latent cells cover ``downscale`` pixels a side."""
    from diffusers import T2IAdapter

    network = T2IAdapter(channels=list(config.block_out_channels), downscale_factor=downscale)
    return network.to(memory_format=torch.channels_last)


def controlnet(config: UNetConfig, widths: Sequence[int]) -> ControlNetModel:
    """A ControlNet of a UNet's shape (Zhang et al. 2023), its last layers zero.

    ``widths`` are those of its encoder of maps, which halves their sides once for each but the first.
    """
    from diffusers import ControlNetModel

    shared = (
        *("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "block_out_channels"),
        *("layers_per_block", "norm_num_groups", "norm_eps", "cross_attention_dim", "attention_head_dim"),
        *("transformer_layers_per_block", "use_linear_projection"),
    )
    settings = {name: getattr(config, name) for name in shared}
    network = ControlNetModel(**settings, conditioning_embedding_out_channels=tuple(widths))
    return network.to(memory_format=torch.channels_last)


def begin_as_copy(network: ControlNetModel, unet: Mapping[str, Tensor]) -> None:
    """Give a ControlNet the weights of a UNet's way down, whose names it shares."""
    own = network.state_dict()
    network.load_state_dict({key: value for key, value in unet.items() if key in own}, strict=False)


def _flat(video: Tensor) -> Tensor:
    """(B, C, F, h, w) -> (B * F, C, h, w) in channels-last order."""
    return video.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _video(flat: Tensor, frames: int) -> Tensor:
    return flat.unflatten(0, (-1, frames)).transpose(1, 2)
