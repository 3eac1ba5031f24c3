"""What a stage begins with, what trains in it, by which method, and what it leaves: all that recipes differ in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from animatelcm import objectives
from animatelcm.assembly import with_temporal_layers
from animatelcm.bundle import load, write_named_lora
from animatelcm.checkpoint import TrainState
from animatelcm.config import TrainConfig
from animatelcm.data.batches import ClipBatch
from animatelcm.hub import MOTION_FILES, find
from animatelcm.miniature import fresh
from animatelcm.model import VideoModel, with_motion
from animatelcm.nets import emoji as shapes
from animatelcm.nets import lora
from animatelcm.nets.motion import MotionConfig
from animatelcm.objectives import Draw, Terms
from animatelcm.roles import consistency_roles

FEW_STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "lcm"}
"""How a distilled model is sampled."""


def starting_model(config: TrainConfig) -> VideoModel:
    """The many-step model with what will train in it: fresh temporal or LoRA layers, or those of stage 1.

    Raises ValueError where a distillation lacks what it distils.
    """
    model = fresh(config.seed) if config.model == "new" else load(config.model, teacher=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _with_temporal_layers(config, model)
        if config.lora is not None:
            lora.inject(model.unet, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)
    if config.beta_schedule is not None:
        model = replace(model, schedule=replace(model.schedule, beta_schedule=config.beta_schedule))
    if config.objective == "consistency":
        model = _to_distil(config, model)
    model.unet.enable_gradient_checkpointing(config.gradient_checkpointing)
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    for _, parameter in named_trainable(model, config):
        parameter.requires_grad_(True)
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
            if _kind(part, name) == config.trainable or (config.trains_lora and _kind(part, name) == "lora"):
                yield f"{part}.{name}", parameter


def _kind(part: str, name: str) -> str:
    if part == "unet" and "motion_modules" in name:
        return "motion"
    if ".lora_A." in name or ".lora_B." in name:
        return "lora"
    return "autoencoder" if part == "vae" else "image"


def objective(config: TrainConfig, model: VideoModel, state: TrainState) -> Callable[[ClipBatch, Draw], Terms]:
    """The method of a run: what gives one loss a clip."""
    if config.objective == "autoencoder":
        return partial(objectives.autoencoder, model)
    if config.objective == "consistency":
        return partial(_distil, config, model, state)
    options = {
        "text_dropout": config.text_dropout,
        "timestep_shift": config.timestep_shift,
        "max_weight": config.max_loss_weight,
        "word_weight": config.word_weight,
    }
    return partial(objectives.diffusion, model, **options)


def _distil(config: TrainConfig, model: VideoModel, state: TrainState, batch: ClipBatch, draw: Draw) -> Terms:
    assert state.target is not None
    roles = consistency_roles(
        model.unet,
        config.consistency,
        step=state.step,
        average={name.removeprefix("unet."): value for name, value in state.target.state_dict().items()},
        teacher_motion=model.teacher_motion,
    )
    shift = config.timestep_shift
    return objectives.consistency(model, roles, batch, draw, config=config.consistency, timestep_shift=shift)


def result(config: TrainConfig, model: VideoModel) -> VideoModel:
    """The model that a finished stage leaves. A LoRA that was learned is written as a file of its own too.

    A style is added to the model that the run began with, whatever that holds; whoever learns anew what an acceleration
    was made for leaves the acceleration behind, and the styles if it is the image model.
    """
    learned = lora.eject(model.unet)
    if config.lora is not None:
        name, fast = config.lora.name, config.objective == "consistency"
        kind = "acceleration" if fast else "style"
        write_named_lora(learned, config.folder / f"{name}.safetensors", title=name, kind=kind, base=model.facts.name)
        if fast:
            return replace(model, image_lora=learned)
        first = fresh(config.seed) if config.model == "new" else load(config.model)
        return replace(first, styles={**first.styles, name: learned})
    if config.objective == "consistency":
        return model
    styles = model.styles if config.trainable == "motion" else {}
    return replace(model, image_lora={}, styles=styles)
