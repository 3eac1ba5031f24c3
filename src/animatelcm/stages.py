"""What a stage begins with, what trains in it, by which method, and what it leaves: all that recipes differ in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from animatelcm import objectives
from animatelcm.assembly import with_temporal_layers
from animatelcm.bundle import load
from animatelcm.checkpoint import TrainState
from animatelcm.config import AdapterConfig, TrainConfig
from animatelcm.data.batches import ClipBatch
from animatelcm.hub import MOTION_FILES, find
from animatelcm.miniature import fresh
from animatelcm.model import VideoModel, with_motion
from animatelcm.nets import emoji as shapes
from animatelcm.nets import lora
from animatelcm.nets.adapters import Adapter, begin_as_copy, controlnet, t2i_adapter
from animatelcm.nets.image_encoder import ImageEncoder, ImageEncoderConfig, ImageTokens
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig
from animatelcm.objectives import Draw, Terms
from animatelcm.roles import adapter_roles, consistency_roles
from animatelcm.saving import write_named_lora
from animatelcm.weights.fuse import fused

if TYPE_CHECKING:
    from diffusers import ControlNetModel

FEW_STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "lcm"}
"""How a distilled model is sampled."""


def starting_model(config: TrainConfig) -> VideoModel:
    """The model with what will train in it: fresh temporal or LoRA layers, those of stage 1, or an adapter.

    The many-step model, but for adapters that are trained without a teacher: these stand beside the few-step one.
    Raises ValueError where a distillation lacks what it distils.
    """
    if config.model == "new":
        model = fresh(config.seed)
    else:
        own = () if config.adapter is None or _begins_fresh(config) else (config.adapter.name,)
        taught = _many_steps(config)
        fused_scale = 0.0 if _guided(config) else 1.0
        model = load(config.model, teacher=taught, image_scale=fused_scale, keep_teacher=taught, adapters=own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.adapter is not None:
            return _with_adapter(config, _as_asked(config, model))
        model = _with_temporal_layers(config, model)
        if config.lora is not None:
            lora.inject(model.unet, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)
    model = _with_noise(config, model)
    if config.objective == "consistency":
        model = _to_distil(config, model)
    return _frozen_but(config, model)


def _with_noise(config: TrainConfig, model: VideoModel) -> VideoModel:
    if config.beta_schedule is None:
        return model
    return replace(model, schedule=replace(model.schedule, beta_schedule=config.beta_schedule))


def _as_asked(config: TrainConfig, model: VideoModel) -> VideoModel:
    """A model that an adapter will stand beside, with the temporal layers and the noise that the config names."""
    if config.motion is not None:
        model = with_temporal_layers(model, find(config.motion, MOTION_FILES))
    if model.unet.motion is None and config.data.kind != "emoji-images" and config.data.num_frames > 1:
        raise ValueError(f"{config.model} has no temporal layers for clips; name some with --motion, or take images")
    return _with_noise(config, model)


def _begins_fresh(config: TrainConfig) -> bool:
    return config.adapter is not None and config.lora is None and config.adapter.start == "fresh"


def _many_steps(config: TrainConfig) -> bool:
    return config.adapter is None or config.objective != "consistency" or config.consistency.earlier == "teacher"


def _guided(config: TrainConfig) -> bool:
    return config.objective == "consistency" and config.consistency.earlier == "guided-noise"


def _frozen_but(config: TrainConfig, model: VideoModel) -> VideoModel:
    """The model with gradients for what the config trains, and for nothing else."""
    model.unet.enable_gradient_checkpointing(config.gradient_checkpointing)
    for network in model.adapters.values():
        with_checkpointing(network, config.gradient_checkpointing)
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    for _, parameter in named_trainable(model, config):
        parameter.requires_grad_(True)
    return model


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``mixed_precision`` computes with, where that is not float32."""


def rounded(name: str, parameter: Tensor) -> bool:
    """Whether a frozen weight of the UNet need not be held more exactly than a run computes: a matrix or a kernel of
    its stages. Norms and biases are small; the layers before and behind the stages say of what type the network is."""
    return parameter.ndim > 1 and name.startswith(("down_blocks.", "mid_block.", "up_blocks."))


@torch.no_grad()
def round_frozen(config: TrainConfig, model: VideoModel) -> bool:
    """Hold what is frozen of the UNet, and the teacher's temporal layers, in the numbers that the run computes with:
    what autocast would make of them at each use, in half of the memory. Returns whether that changed them."""
    dtype = HALF.get(config.mixed_precision)
    if dtype is None or all(p.requires_grad for name, p in model.unet.named_parameters() if rounded(name, p)):
        return False
    for name, parameter in model.unet.named_parameters():
        if rounded(name, parameter) and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    held = model.teacher_motion.items()
    model.teacher_motion = {name: value.to(dtype) if rounded(name, value) else value for name, value in held}
    if model.device.type == "cuda":
        model.unet.join_projections()  # they lie elsewhere now
    return True


def with_checkpointing(network: nn.Module, wanted: bool) -> None:
    """Gradient checkpointing in an adapter that is as large as to have it: a ControlNet."""
    if wanted and getattr(network, "_supports_gradient_checkpointing", False):
        network.enable_gradient_checkpointing()


def _with_adapter(config: TrainConfig, model: VideoModel) -> VideoModel:
    """The model with the adapter that will train: a fresh one, or with ``config.lora`` LoRA layers on its own."""
    assert config.adapter is not None
    name = config.adapter.name
    if not _begins_fresh(config):
        if name not in model.adapters:
            raise ValueError(f"{config.model} has no adapter {name!r} to go on from; train one first, or name another")
        network = model.adapters[name]
        if isinstance(network, ImageEncoder):
            network.config = replace(network.config, motion_scale=config.adapter.motion_scale)
        if config.lora is not None:
            lora.inject(network, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)
    else:
        latents = model.vae.config.latent_channels
        network = fresh_adapter(config.adapter, model.unet.config, latent_channels=latents, downscale=model.downscale)
        if config.adapter.kind == "controlnet":
            begin_as_copy(cast("ControlNetModel", network), model.unet.state_dict())
    model.adapters = {name: network}
    model.kept.clear()  # the run needs no base: what it leaves begins from the files again
    if config.objective == "consistency" and config.consistency.earlier == "teacher":
        model = _few_steps_over_teacher(config, model)
    if _guided(config):
        if not model.image_lora:
            raise ValueError(f"{config.model} has no image acceleration below which an image model could guide")
        lora.attach(model.unet, model.image_lora)
    schedule = replace(model.schedule, solver_steps=config.consistency.solver_steps)
    return _frozen_but(config, replace(model, schedule=schedule))


def fresh_adapter(config: AdapterConfig, unet: UNetConfig, *, latent_channels: int, downscale: int) -> nn.Module:
    """An adapter before training, for a UNet whose latent cells cover ``downscale`` pixels a side."""
    widths = unet.block_out_channels
    if config.kind == "t2i_adapter":
        return t2i_adapter(unet, downscale)
    if config.kind == "controlnet":
        return controlnet(unet, _of_maps(widths[0], downscale.bit_length() - 1))
    if config.kind == "image_tokens":
        return ImageTokens(latent_channels, unet.cross_attention_dim)
    shape = ImageEncoderConfig(
        channels=widths,
        in_channels=latent_channels if config.sees == "latent" else 3,
        sees=config.sees,
        downscale=downscale,
        spread=config.spread,
        motion_scale=config.motion_scale,
    )
    return ImageEncoder(shape)


def _of_maps(width: int, halvings: int) -> tuple[int, ...]:
    """Widths of a fresh ControlNet's encoder of maps. Other tools know one for Stable Diffusion 1.x, its authors'."""
    if (width, halvings) == (320, 3):
        return (16, 32, 96, 256)
    return (*(min(16 * 2**i, width) for i in range(halvings)), width)


def _few_steps_over_teacher(config: TrainConfig, model: VideoModel) -> VideoModel:
    """The few-step network as the live one, of which a view without LoRA and with the teacher's temporal layers is the
    many-step one."""
    fast = load(config.model, image_scale=0.0, adapters=())
    motion = {key: value for key, value in model.unet.state_dict().items() if "motion_modules" in key}
    model.teacher_motion = {key: value.clone() for key, value in motion.items()}
    if not fast.teacher_motion:
        raise ValueError(f"{config.model} holds no teacher; train without one (--consistency.earlier noise)")
    model.unet.load_state_dict(fast.unet.state_dict())
    if fast.image_lora:
        lora.attach(model.unet, fast.image_lora)
    return model


def _with_temporal_layers(config: TrainConfig, model: VideoModel) -> VideoModel:
    """The teacher's from a file if one is named, fresh ones where they are to learn from nothing."""
    if config.motion is not None:
        model = with_temporal_layers(model, find(config.motion, MOTION_FILES))
    if config.trainable != "motion" or model.unet.motion is not None:
        return model
    if config.objective == "consistency":
        raise ValueError(
            f"{config.model} has no temporal layers to distil: name the teacher's, --motion FOLDER (a MotionAdapter)"
        )
    return with_motion(model, shapes.MOTION if model.facts.name == "emoji" else MotionConfig())


def _to_distil(config: TrainConfig, model: VideoModel) -> VideoModel:
    """Settings of a few-step model; where temporal layers will train, the teacher's are kept and stage 1 is there."""
    teacher = {name: getattr(model.facts, name) for name in FEW_STEPS}
    schedule = replace(model.schedule, solver_steps=config.consistency.solver_steps)
    model = replace(model, schedule=schedule, facts=replace(model.facts, **FEW_STEPS, teacher=teacher))
    if config.trainable == "motion":
        motion = {name: value for name, value in model.unet.state_dict().items() if "motion_modules" in name}
        model.teacher_motion = {name: value.clone() for name, value in motion.items()}
        model.facts = replace(model.facts, teacher={**teacher, "motion": True})
        if config.consistency.decouple:
            if not model.image_lora:
                raise ValueError(
                    f"{config.model} has no image acceleration to build on: run an image_lcm recipe first, "
                    "or learn both at once, as video_lcm_coupled_emoji does"
                )
            lora.attach(model.unet, model.image_lora)
    return model


def named_trainable(model: VideoModel, config: TrainConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a config trains, by state-file name."""
    for part, network in model.networks.items():
        for name, parameter in network.named_parameters():
            kind = _kind(part, name)
            if kind == "adapter" and config.lora is not None and not _of_lora(name):
                continue
            if kind in _kinds(config):
                yield f"{part}.{name}", parameter


def _kinds(config: TrainConfig) -> set[str]:
    whole = {"encoder", "decoder"} if config.trainable == "autoencoder" else {config.trainable}
    return whole | {"lora"} if config.trains_lora else whole


def _kind(part: str, name: str) -> str:
    if part.startswith("adapter_"):
        return "adapter"
    if part == "unet" and "motion_modules" in name:
        return "motion"
    if _of_lora(name):
        return "lora"
    if part == "vae":
        return "decoder" if name.startswith(("decoder.", "post_quant_conv.")) else "encoder"
    return "image"


def _of_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def objective(config: TrainConfig, model: VideoModel, state: TrainState) -> Callable[[ClipBatch, Draw], Terms]:
    """The method of a run: what gives one loss a clip."""
    if config.objective == "autoencoder":
        return partial(objectives.autoencoder, model)
    if config.objective == "consistency":
        return partial(_distil, config, model, state)
    adapter = None if config.adapter is None else _adapter(config, model)
    options = {
        "adapter": adapter,
        "text_dropout": config.text_dropout,
        "timestep_shift": config.timestep_shift,
        "max_weight": config.max_loss_weight,
        "word_weight": config.word_weight,
    }
    return partial(objectives.diffusion, model, **options)


def _adapter(config: TrainConfig, model: VideoModel) -> Adapter:
    assert config.adapter is not None
    return Adapter(model.adapters[config.adapter.name], motion_scale=config.adapter.motion_scale)


def _distil(config: TrainConfig, model: VideoModel, state: TrainState, batch: ClipBatch, draw: Draw) -> Terms:
    assert state.target is not None
    average = state.target.state_dict()
    if config.adapter is not None:
        part = f"adapter_{config.adapter.name}."
        roles = adapter_roles(
            model.unet,
            _adapter(config, model),
            config.consistency,
            average={f"network.{name.removeprefix(part)}": value for name, value in average.items()},
            teacher_motion=model.teacher_motion,
        )
    else:
        roles = consistency_roles(
            model.unet,
            config.consistency,
            step=state.updates,
            average={name.removeprefix("unet."): value for name, value in average.items()},
            teacher_motion=model.teacher_motion,
        )
    options = {"timestep_shift": config.timestep_shift, "control": config.adapter.name if config.adapter else ""}
    return objectives.consistency(model, roles, batch, draw, config=config.consistency, **options)


def result(config: TrainConfig, model: VideoModel) -> VideoModel:
    """The model that a finished stage leaves. A LoRA that was learned is written as a file of its own too.

    A style, an adapter or a decoder is added to the model that the run began with, whatever that holds; whoever learns
    anew what an acceleration was made for leaves the acceleration behind, and styles if it is the image model.
    """
    if config.adapter is not None:
        return _with_result(config, model.adapters[config.adapter.name])
    learned = lora.eject(model.unet)
    if config.lora is not None:
        name, fast = config.lora.name, config.objective == "consistency"
        kind = "acceleration" if fast else "style"
        write_named_lora(learned, config.folder / f"{name}.safetensors", title=name, kind=kind, base=model.facts.name)
        if fast:
            return replace(model, image_lora=learned)
        first = _begun_with(config)
        return replace(first, styles={**first.styles, name: learned})
    if config.trainable == "decoder":
        return replace(_begun_with(config), vae=model.vae)
    if config.objective == "consistency":
        return model
    return replace(model, image_lora={}, styles=model.styles if config.trainable == "motion" else {})


def _begun_with(config: TrainConfig) -> VideoModel:
    return fresh(config.seed) if config.model == "new" else load(config.model, adapters=())


def adapters_left(config: TrainConfig) -> Path | None:
    """The model folder whose adapters stand beside what a finished stage leaves, None where they fit it no longer."""
    beside = config.objective == "consistency" or config.lora is not None or config.adapter is not None
    kept = beside or config.trainable in ("motion", "decoder")
    return find(config.model) if kept and config.model != "new" else None


def _with_result(config: TrainConfig, network: nn.Module) -> VideoModel:
    """The model that a run began with, with the adapter in it; LoRA layers are merged into the adapter."""
    assert config.adapter is not None
    name, first = config.adapter.name, _as_asked(config, load(config.model, adapters=()))
    if config.lora is not None:
        learned = lora.eject(network, name)
        path = config.folder / f"{config.name}.safetensors"
        write_named_lora(learned, path, title=name, kind="adapter", base=first.facts.name, layout="peft")
        weights = {f"{name}.{key}": value for key, value in network.state_dict().items()}
        merged = {key.removeprefix(f"{name}."): value for key, value in fused(weights, [(learned, 1.0)]).items()}
        network.load_state_dict(merged, strict=False)
    return replace(first, adapters={name: network})
