"""What is loaded and handed around: the networks of one latent video diffusion model, and what belongs to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import VideoUNet
from animatelcm.schedule import NoiseSchedule
from animatelcm.weights.files import State
from animatelcm.weights.lora import Lora

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer


CORE = ("unet", "vae", "text_encoder")
"""The networks that every video needs."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model was made for; the defaults of every request that does not say otherwise."""

    name: str
    width: int = 512
    height: int = 512
    num_frames: int = 16
    fps: float = 8.0
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    trained: dict[str, Any] = field(default_factory=dict)
    """Recipe -> how it was run: steps, seconds, hardware, version."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """What differs for the many-step model that this one was distilled from, by field."""

    def of_teacher(self) -> Facts:
        """The facts of that model."""
        return replace(self, **self.teacher, teacher={})


@dataclass
class VideoModel:
    """One latent video diffusion model: networks, tokenizer, noise schedule, facts."""

    unet: VideoUNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    facts: Facts
    image_lora: Lora = field(default_factory=dict)
    """Image acceleration, learned by stage 1; empty where there is none."""
    styles: dict[str, Lora] = field(default_factory=dict)
    """Personal styles that came with the bundle, by name."""
    teacher_motion: State = field(default_factory=dict)
    """Temporal layers of the model that this one was distilled from, by their names in ``unet``."""
    adapters: dict[str, nn.Module] = field(default_factory=dict)
    """What may stand beside the UNet: "i2v" sees a picture, others read control maps of the kind that is their name."""
    acceleration: tuple[Lora, float] = field(default_factory=lambda: ({}, 0.0))
    """The image acceleration that is fused, and its scale."""
    kept: State = field(default_factory=dict)
    """The base's values of tensors that ``fusion.fuse`` changed, on the CPU, by ``<part>.<name>``."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The parts that hold weights, by the names that state files and recipes use."""
        adapters = {f"adapter_{name}": network for name, network in self.adapters.items()}
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder, **adapters}

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: torch.device | str) -> VideoModel:
        """Move every network, in place; convolutions keep channels last."""
        for network in self.networks.values():
            network.to(device=device, memory_format=torch.channels_last)
        self.teacher_motion = {name: value.to(device) for name, value in self.teacher_motion.items()}
        return self

    def modules(self) -> list[str]:
        """Paths of the modules that have a weight, as LoRA files address them: ``unet.down_blocks.0...``."""
        return [
            f"{part}.{name.removesuffix('.weight')}"
            for part in ("unet", "text_encoder")
            for name, value in self.networks[part].state_dict().items()
            if name.endswith(".weight") and value.ndim > 1
        ]

    def fingerprint(self, part: str) -> str:
        """A hash of one network's weights."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.networks[part].state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def downscale(self) -> int:
        """Pixels a latent cell covers on each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Text (B strings) -> int64 (B, L); longer texts are cut at L tokens."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        batch = self.tokenizer(list(texts), max_length=self.tokenizer.model_max_length, **options)
        return batch.input_ids.to(self.device)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Text (B strings) -> (B, L, D), the text encoder's last hidden state."""
        return self.text_encoder(self.tokens(texts)).last_hidden_state

    def encode(self, pixels: Tensor, chunk: int = 32) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] -> latents (B, C, F, h, w), the posterior's mean, of unit variance.

        ``chunk`` frames go through the autoencoder at a time.
        """
        flat, frames = _fold(pixels)
        parts = [self.vae.encode(p.to(self.device, self.vae.dtype)).latent_dist.mode() for p in flat.split(chunk)]
        return _unfold(torch.cat(parts).float() * self.vae.config.scaling_factor, frames)

    def decode(self, latents: Tensor, chunk: int = 16) -> np.ndarray:
        """Latents (B, C, F, h, w) -> uint8 frames (B, F, H, W, 3), ``chunk`` frames at a time."""
        flat, _ = _fold(latents)
        parts = []
        for part in flat.split(chunk):
            pixels = self.vae.decode((part / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
            parts.append(pixels.float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8).cpu())
        frames = torch.cat(parts).permute(0, 2, 3, 1)
        return frames.unflatten(0, (latents.shape[0], -1)).numpy()


def with_motion(model: VideoModel, motion: MotionConfig) -> VideoModel:
    """The same model with fresh temporal layers: draws exactly what the image model draws, frame by frame."""
    unet = VideoUNet(model.unet.config, motion)
    unet.load_state_dict(model.unet.state_dict(), strict=False)
    return replace(model, unet=unet)


def _fold(video: Tensor) -> tuple[Tensor, int]:
    """(B, C, F, h, w) -> ((B F), C, h, w) in channels-last order, and F."""
    flat = video.transpose(1, 2).flatten(0, 1)
    return flat.contiguous(memory_format=torch.channels_last), video.shape[2]


def _unfold(flat: Tensor, frames: int) -> Tensor:
    """((B F), C, h, w) -> (B, C, F, h, w)."""
    return flat.unflatten(0, (-1, frames)).transpose(1, 2)
