"""What is loaded and handed around: the networks of one latent video diffusion model, and what belongs to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from animatelcm.model_source import Compile
from animatelcm.nets import openvino
from animatelcm.nets.autoencoder import Autoencoder
from animatelcm.nets.bands import decode_in_bands
from animatelcm.nets.graphs import Graphs
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.text_encoder import TextEncoder
from animatelcm.nets.unet import VideoUNet
from animatelcm.prompts import Syntax, chunks, sections
from animatelcm.rng import sent
from animatelcm.schedule import NoiseSchedule
from animatelcm.tokenizer import Tokenizer
from animatelcm.weights.files import State
from animatelcm.weights.lora import Lora

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

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
    """What differs for the many-step model that this one was distilled from, by field; "motion" is true where its
    temporal layers do."""

    def of_teacher(self) -> Facts:
        """The facts of that model."""
        settings = {name: value for name, value in self.teacher.items() if name != "motion"}
        return replace(self, **settings, teacher={})


@dataclass
class VideoModel:
    """One latent video diffusion model: networks, tokenizer, noise schedule, facts."""

    unet: VideoUNet
    vae: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
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
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    """Textual inversions: what stands for a word in prompts, (N, D), by the word; not saved with the model."""
    decoder: AutoencoderTiny | None = None
    """What draws latents in place of ``vae``; it is not saved with the model."""
    compile: Compile = "auto"
    """How the UNet is called for inference; at the first call of a shape "full" takes minutes, "openvino" seconds."""
    runs_on: torch.device | None = None
    """Where networks are brought for their work, if they take turns there (``memory.take_turns``)."""

    _graphs: Graphs = field(default_factory=Graphs, init=False, repr=False, compare=False)
    _on_cpu: openvino.Compiled = field(default_factory=openvino.Compiled, init=False, repr=False, compare=False)
    _compiled: dict[int, nn.Module] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The parts that hold weights, by the names that state files and recipes use."""
        adapters = {f"adapter_{name}": network for name, network in self.adapters.items()}
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder, **adapters}

    @property
    def device(self) -> torch.device:
        """Where networks work, and expect what they are given."""
        return self.runs_on or next(self.unet.parameters()).device

    def to(self, device: torch.device | str) -> VideoModel:
        """Move every network, in place; convolutions keep channels last."""
        self.forget_graphs()
        for network in self.networks.values():
            network.to(device=device, memory_format=torch.channels_last)
        if self.device.type == "cuda":
            self.unet.join_projections()
        if self.decoder is not None:
            self.decoder.to(device=device, memory_format=torch.channels_last)
        self.teacher_motion = {name: value.to(device) for name, value in self.teacher_motion.items()}
        return self

    def compile_as(self, how: Compile) -> None:
        """Call the UNet that way from now on. Raises ValueError where it cannot be called so here."""
        if how == "openvino":
            openvino.check(self.unet)
        self.compile = how

    def predict(self, x: Tensor, t: Tensor, text: Tensor, **options: Any) -> Tensor:  # noqa: ANN401 - the UNet's own
        """What ``unet`` says of noisy latents, called as ``compile`` has it; its arguments, for inference alone."""
        network = self.unet
        if self.compile == "openvino":
            return self._on_cpu(network, x, t, text, **options)
        if self.compile == "full":
            if id(network) not in self._compiled:
                self._compiled = {id(network): torch.compile(network)}
            network = self._compiled[id(network)]
        with self.exact():
            if self.compile == "none" or self.runs_on is not None or x.device.type != "cuda":
                return network(x, t, text, **options)
            return self._graphs(network, x, t, text, **options)

    def forget_graphs(self) -> None:
        """Drop the evaluations that were recorded on the device, or compiled for it, and free their memory."""
        self._graphs.forget()
        self._on_cpu.forget()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Where networks compute in float32 on CUDA, convolutions do so too meanwhile: left to itself, torch lets them
        round what they multiply to 10 bits (TF32)."""
        if self.unet.dtype != torch.float32 or self.device.type != "cuda":
            yield
            return
        convolutions = torch.backends.cudnn.conv
        before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
        try:
            yield
        finally:
            convolutions.fp32_precision = before

    def modules(self) -> list[str]:
        """Paths of the modules that have a weight, as LoRA files address them: ``unet.down_blocks.0...``."""
        return [
            f"{part}.{name.removesuffix('.weight')}"
            for part in ("unet", "text_encoder")
            for name, value in self.networks[part].state_dict().items()
            if name.endswith(".weight") and value.ndim > 1
        ]

    def fingerprint(self, part: str) -> str:
        """A hash of one network's weights, the same for both ways to name a text encoder's."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.networks[part].state_dict().items()):
            numbers = value.cpu().reshape(-1).view(torch.uint8).numpy()
            digest.update(name.removeprefix("text_model.").encode() + numbers.tobytes())
        return digest.hexdigest()

    @property
    def downscale(self) -> int:
        """Pixels a latent cell covers on each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Text (B strings) -> int64 (B, L); longer texts are cut at L tokens."""
        return sent(self.tokenizer(texts), self.device)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Text (B strings) -> (B, L, D), the text encoder's last hidden state; longer texts are cut."""
        return self.text_encoder(self.tokens(texts))

    def embed_prompts(self, prompts: Sequence[str], syntax: Syntax = "a1111", clip_skip: int = 1) -> Tensor:
        """Prompts (B strings) with their marks -> (B, K L, D): the K chunks of the longest, each encoded by itself.

        Shorter ones are filled up with empty chunks. What fits and has no marks is as ``embed`` has it, bit for bit. As
        in A1111 (``sd_hijack_clip.py``, ``sd_emphasis.py``) a chunk has two tokens less than the encoder, weights
        multiply what comes out of it, and then its mean is what it was. (ComfyUI moves tokens away from an empty
        prompt's instead.) ``clip_skip``: 1 is the last layer. Raises ValueError for marks that are none.
        """
        words, count = {}, self.text_encoder.words.shape[0]
        for word, vectors in self.embeddings.items():
            words[word] = range(count, count + len(vectors))
            count += len(vectors)
        spell, room = self.tokenizer.spelled, self.tokenizer.model_max_length - 2
        said = [chunks(sections(prompt, syntax), spell, words, room) for prompt in prompts]
        most = max(map(len, said))
        parts = [part for found in said for part in (*found, *[[]] * (most - len(found)))]
        tokens = torch.tensor([self.tokenizer.ended([number for number, _ in part]) for part in parts])
        added = torch.cat([*self.embeddings.values()]) if words else None
        text = self.text_encoder(sent(tokens, self.device), added, clip_skip)
        text = torch.stack([_weighed(one, [w for _, w in part]) for one, part in zip(text, parts, strict=True)])
        return text.unflatten(0, (len(prompts), most)).flatten(1, 2)

    def encode(self, pixels: Tensor, chunk: int = 32) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] -> latents (B, C, F, h, w), the posterior's mean, of unit variance.

        ``chunk`` frames go through the autoencoder at a time.
        """
        flat, frames = _fold(pixels)
        with self.exact():
            parts = [self.vae.encode(p.to(self.device, self.vae.dtype)).mean for p in flat.split(chunk)]
        return _unfold(torch.cat(parts).float() * self.vae.config.scaling_factor, frames)

    def decode(self, latents: Tensor, chunk: int = 16, bands: int = 1) -> np.ndarray:
        """Latents (B, C, F, h, w) -> uint8 frames (B, F, H, W, 3), ``chunk`` at a time; ``bands``: see ``draw``."""
        flat, _ = _fold(latents)
        frames = torch.cat([self.draw(part, bands).cpu() for part in flat.split(chunk)])
        return frames.unflatten(0, (latents.shape[0], -1)).numpy()

    def draw(self, latents: Tensor, bands: int = 1) -> Tensor:
        """Latents (N, C, h, w) -> uint8 frames (N, H, W, 3).

        In several ``bands`` it is slower, and takes that much less memory (``nets.bands``).
        """
        network = self.vae if self.decoder is None else self.decoder
        scaled = (latents / network.config.scaling_factor).to(network.dtype)
        with self.exact():
            if bands > 1:
                pixels = decode_in_bands(network, scaled, bands)
            else:
                pixels = self.vae.decode(scaled) if self.decoder is None else self.decoder.decode(scaled).sample
        pixels = pixels.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous()


def _weighed(text: Tensor, weights: Sequence[float]) -> Tensor:
    """One chunk (L, D) times the weights of its tokens from the second on, at the mean that it had, if it had one."""
    if all(weight == 1 for weight in weights):
        return text
    factors = torch.ones(len(text), 1, device=text.device)
    factors[1 : len(weights) + 1, 0] = torch.tensor(weights, device=text.device)
    changed = text.float() * factors
    before, after = text.float().mean(), changed.mean()
    telling = torch.minimum(before.abs(), after.abs()) > 1e-3 * text.float().std()
    return torch.where(telling, changed * (before / after), changed).to(text.dtype)


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
