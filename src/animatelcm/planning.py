"""What a training run will cost, before any weight is loaded: counted on tensors that have shapes and no memory."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from animatelcm.config import LCM_TARGETS, LoraConfig, TrainConfig
from animatelcm.counting import ADAPTER, Inputs, count, counted, largest_layer, parameters
from animatelcm.nets import emoji, lora, sd15
from animatelcm.nets.adapters import Adapter, Clues
from animatelcm.nets.autoencoder import Autoencoder, AutoencoderConfig
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.text_encoder import TextConfig, TextEncoder
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.roles import Role
from animatelcm.sources import open_dataset
from animatelcm.stages import fresh_adapter, rounded, with_checkpointing

GIB = 2**30


class Shapes(NamedTuple):
    """What a UNet of a family is built with and fed with."""

    unet: UNetConfig
    motion: MotionConfig
    tokens: int
    downscale: int
    """Pixels a latent cell covers on each side."""
    rank: int
    """Of stage 1's LoRA, as its recipe has it."""
    vae: AutoencoderConfig
    text: TextConfig


EMOJI = Shapes(
    UNetConfig.from_diffusers(emoji.UNET),
    emoji.MOTION,
    emoji.TOKENS,
    downscale=8,
    rank=16,
    vae=AutoencoderConfig(**emoji.VAE),
    text=TextConfig(**emoji.TEXT),
)
SD15 = Shapes(
    UNetConfig.from_diffusers(sd15.UNET),
    sd15.MOTION,
    sd15.TOKENS,
    sd15.DOWNSCALE,
    rank=64,
    vae=AutoencoderConfig(**sd15.VAE),
    text=TextConfig(**sd15.TEXT),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run costs: the UNet in one optimiser step on one device, what lies beside it, what goes to disk."""

    global_batch: int
    """Clips of one optimiser step, over all processes."""
    clips: int
    """Clips of the whole run."""
    parameters: int
    """Spatial layers, LoRA layers, and temporal ones where clips are seen."""
    trainable: int
    flops: int
    """Multiplications and additions of matrix products, convolutions and attention, of every role."""
    weights_gib: float
    """Weights, gradients, Adam's two moments, averages, the teacher's temporal layers: what trains in float32, most of
    the rest in the run's precision."""
    activations_gib: float
    """What the student's forward pass keeps for the backward pass, taken to be of the run's precision."""
    recomputed_gib: float
    """What gradient checkpointing computes again on top: the largest layer's. (Of a ControlNet it is not counted.)"""
    beside_gib: float
    """Autoencoder and text encoder, and the copies of weights that autocast keeps for the backward pass."""
    memory_gib_at_least: float
    """The sum of these. Not counted: what single operations and evaluations without gradients need for a moment, the
    device's own context, fragments, samples on the way (one more copy of what trains), and encoding."""
    checkpoint_gib: float
    """On disk: weights, two moments and averages of what trains. Two are kept, and a third while it is written."""
    cache_gib_per_1000: float
    """On disk: latents of a thousand clips in fp16, and text embeddings of a thousand captions where the text encoder
    does not train; 0 where they are not kept."""
    cache_gib: float | None
    """Of all clips, at most: a caption that comes again in a piece is kept once. None where the data's folder is not
    there."""

    def text(self) -> str:
        """One line a cost."""
        return "\n".join(
            f"{name:>20}  {value:,.2f}" if isinstance(value, float) else f"{name:>20}  {value:,}"
            for name, value in asdict(self).items()
            if value is not None
        )


def plan(config: TrainConfig, *, processes: int | None = None) -> Plan:
    """Count a run of the miniature or, where the data is a folder, of Stable Diffusion 1.5. Weights are not needed.

    ``processes`` share a step; None: as many as the launcher says (WORLD_SIZE), or one. Raises ValueError for an
    autoencoder, whose size is not counted.
    """
    if config.objective == "autoencoder":
        raise ValueError(f"{config.name} trains an autoencoder; plans are counted for what trains a UNet")
    shapes = EMOJI if _of_miniature(config) else SD15
    with torch.device("meta"):
        inputs = _inputs(config, shapes)
        role = _student(config, shapes, motion=inputs[0].shape[2] > 1)
        clues = _clues(config, inputs[0], shapes)
        beside = sum(p.numel() for net in (Autoencoder(shapes.vae), TextEncoder(shapes.text)) for p in net.parameters())
        decoder = Autoencoder(shapes.vae).requires_grad_(False)
        shown = inputs[0][:, :, : config.consistency.feedback_frames].transpose(1, 2).flatten(0, 1).requires_grad_()
    forward, backward, kept = count(role, inputs, clues)
    layer = largest_layer(role, inputs, clues) if config.gradient_checkpointing else 0
    sizes = {name: parameter.numel() for name, parameter in parameters(role)}
    trained = {name: size for name, size in sizes.items() if _trains(config, name)}
    distils = config.objective == "consistency"
    taught = distils and config.consistency.earlier == "teacher"
    # The student's, the target's, the teacher's two (a guide's two, which are smaller, are counted as large).
    evaluations = 1 if not distils else 2 if config.consistency.earlier == "noise" else 4
    flops = evaluations * forward + backward
    if distils and config.consistency.feedback > 0:  # half of a sampler's evaluations, the last with its backward pass
        to_pixels, back, held = counted(lambda: decoder.decode(shown), decoder.parameters())
        flops += (config.consistency.feedback_steps + 1) * forward // 2 + backward + to_pixels + back
        kept = 2 * kept + held
    copies = 5 if distils else 4  # gradient, two moments, the average that is sampled, and the target
    second = taught and config.trainable != "lora"  # temporal layers beside the live ones
    teacher = sum(size for name, size in sizes.items() if second and "motion_modules" in name)
    every, updated = sum(sizes.values()), sum(trained.values())
    precision = 1 if config.mixed_precision == "no" else 2
    halved = {name: p.numel() for name, p in parameters(role) if precision == 2 and rounded(name, p)}
    frozen = sum(size for name, size in halved.items() if name not in trained)
    taught_halved = sum(size for name, size in halved.items() if second and "motion_modules" in name)
    weights = 4 * (every + copies * updated + teacher) - 2 * (frozen + taught_halved)
    # Autocast remembers its copy of what trains, and of the rest wherever a layer's gradient asks for it.
    cast = 0 if precision == 1 else 2 * (updated if config.gradient_checkpointing else every - frozen)
    memory = {"activations_gib": kept / precision, "recomputed_gib": layer / precision, "beside_gib": 4 * beside + cast}
    batch = (processes or int(os.environ.get("WORLD_SIZE", "1"))) * config.gradient_accumulation_steps
    x, _, text = inputs
    kept_clip = 0 if not config.data.cache else 2 * (x[0].numel() + (config.trainable != "image") * text[0].numel())
    clips = 0 if not config.data.cache else _clips(config)
    return Plan(
        global_batch=batch * config.batch_size,
        clips=config.steps * batch * config.batch_size,
        parameters=every,
        trainable=updated,
        flops=config.gradient_accumulation_steps * flops,
        weights_gib=weights / GIB,
        **{name: size / GIB for name, size in memory.items()},
        memory_gib_at_least=(weights + sum(memory.values())) / GIB,
        checkpoint_gib=4 * copies * updated / GIB,
        cache_gib_per_1000=1000 * kept_clip / GIB,
        cache_gib=None if clips is None else clips * kept_clip / GIB,
    )


def _clips(config: TrainConfig) -> int | None:
    """How many there are to keep, if the folder that holds them is there."""
    if config.data.path is not None and not config.data.path.is_dir():
        return None
    return len(open_dataset(config.data))


def _of_miniature(config: TrainConfig) -> bool:
    if config.model in ("emoji", "new") or config.data.kind != "folder":
        return True
    facts = Path(config.model) / "unet" / "config.json"
    return facts.is_file() and json.loads(facts.read_text(encoding="utf-8"))["sample_size"] == emoji.UNET["sample_size"]


def _of_stills(config: TrainConfig) -> bool:
    """What its data are; of a folder that is not there yet, whether what it trains learns from images."""
    if config.data.kind != "folder":
        return config.data.kind == "emoji-images"
    if config.data.path is not None and config.data.path.is_dir():
        return open_dataset(config.data).stills
    return config.trainable == "lora"


def _inputs(config: TrainConfig, shapes: Shapes) -> Inputs:
    frames = 1 if _of_stills(config) else config.data.num_frames
    cells = (config.data.height // shapes.downscale, config.data.width // shapes.downscale)
    return (
        torch.empty(config.batch_size, shapes.unet.in_channels, frames, *cells),
        torch.empty(config.batch_size, dtype=torch.long),
        torch.empty(config.batch_size, shapes.tokens, shapes.unet.cross_attention_dim),
    )


def _student(config: TrainConfig, shapes: Shapes, *, motion: bool) -> Role:
    """The network of a run and its adapter, with what trains asking for gradients."""
    unet, adapter = VideoUNet(shapes.unet, shapes.motion if motion else None), None
    layers = _lora(config, shapes)
    if config.adapter is not None:
        options = {"latent_channels": shapes.unet.in_channels, "downscale": shapes.downscale}
        adapter = Adapter(fresh_adapter(config.adapter, shapes.unet, **options))
    elif layers is not None:
        lora.inject(unet, rank=layers.rank, alpha=layers.alpha, targets=layers.targets)
    if adapter is not None and config.lora is not None:
        lora.inject(adapter, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)
    unet.enable_gradient_checkpointing(config.gradient_checkpointing)
    if adapter is not None:
        with_checkpointing(adapter.network, config.gradient_checkpointing)
    role = Role(unet, adapter=adapter)
    for name, parameter in parameters(role):
        parameter.requires_grad_(_trains(config, name))
    return role


def _clues(config: TrainConfig, latents: Tensor, shapes: Shapes) -> Clues:
    batch, _, frames, height, width = latents.shape
    height, width = height * shapes.downscale, width * shapes.downscale
    return Clues(latents[:, :, 0], torch.empty(batch, 3, height, width), torch.empty(batch, 3, frames, height, width))


def _lora(config: TrainConfig, shapes: Shapes) -> LoraConfig | None:
    """The LoRA layers of a run: its own, or stage 1's, taken to be of the usual rank."""
    if config.lora is not None or config.objective != "consistency":
        return config.lora
    return LoraConfig(rank=shapes.rank, targets=LCM_TARGETS)


def _trains(config: TrainConfig, name: str) -> bool:
    if name.startswith(ADAPTER):
        return config.trainable == "adapter" and (config.lora is None or ".lora_" in name)
    if ".lora_A." in name or ".lora_B." in name:
        return config.trains_lora
    return config.trainable == ("motion" if "motion_modules" in name else "image")
