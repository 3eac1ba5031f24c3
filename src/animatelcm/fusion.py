"""The sum of weights on a whole model: put there in place, taken out again bit for bit, or made permanent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from animatelcm.model import VideoModel
from animatelcm.nets.motion import MotionConfig
from animatelcm.weights.facts import MotionFacts, read_facts
from animatelcm.weights.files import State
from animatelcm.weights.fuse import check, sums
from animatelcm.weights.lora import Lora, read_lora
from animatelcm.weights.motion import config as motion_settings
from animatelcm.weights.motion import read_motion, weights_file

Weighted = tuple[str | Path | Lora, float]
"""A LoRA and its scale: a file, a style of the model by its name, or a LoRA that is loaded already."""


def fuse(
    model: VideoModel,
    *,
    style: Weighted | Sequence[Weighted] = (),
    image: Weighted | float | None = None,
    motion: tuple[Path | State, float] | None = None,
    keep: bool = True,
) -> None:
    """Make the model w0 + alpha * style + beta * image_acceleration + gamma * motion (AnimateLCM-2, eq. 1-2), in place.

    It starts from the base each time, so a second call replaces the first, and sampling costs what it did. ``image``
    is a LoRA with its beta, or a beta for the model's own; None leaves the acceleration that is there. ``motion``
    replaces the temporal layers by a file's, with their outer ``proj_out`` scaled by gamma: 0 is the image model; None
    leaves them as they are. (Schedule and steps stay the model's: ``load_sum`` takes those of a file.) A LoRA of
    temporal layers is added to what ``motion`` puts there. With ``keep`` the base's
    values are kept aside for the next sum; without, the sum becomes the base, as in ``baked``, and costs no memory.

    Raises ValueError naming the first key that does not fit the model, and then nothing has changed.
    """
    acceleration = _acceleration(model, image)
    parts = [(_lora(model, source), scale) for source, scale in _listed(style)] + [acceleration]
    base = base_state(model)
    check(base, parts)
    temporal = {} if motion is None else _motion(model, base, *motion)
    del base  # where it is a copy, its memory is wanted now
    unfuse(model)
    _put(model, temporal.items(), keep=keep)
    _put(model, sums(base_state(model) | temporal, parts), keep=keep)
    model.acceleration = acceleration
    if not keep:
        vars(model).update(vars(baked(model)))


def unfuse(model: VideoModel) -> None:
    """Back to the base, bit for bit."""
    _put(model, model.kept.items(), keep=False)
    model.kept.clear()
    model.acceleration = ({}, 0.0)


def baked(model: VideoModel) -> VideoModel:
    """The same weights as a plain model, which no longer knows what it was made of: what is fused is now its base.

    It shares its networks with ``model``, which is not to be fused or unfused any more.
    """
    plain = {"image_lora": {}, "styles": {}, "teacher_motion": {}, "kept": {}, "acceleration": ({}, 0.0)}
    return replace(model, **plain, facts=replace(model.facts, teacher={}))


def base_state(model: VideoModel) -> State:
    """The weights that a sum starts from, by ``<part>.<name>``: those in the model, or kept of it where fused."""
    live = {
        f"{part}.{name}": value
        for part in ("unet", "text_encoder")
        for name, value in model.networks[part].state_dict().items()
    }
    return live | {name: value.to(live[name].device) for name, value in model.kept.items()}


def _listed(style: Weighted | Sequence[Weighted]) -> Sequence[Weighted]:
    """A style by itself is a list of one."""
    alone = isinstance(style, tuple) and len(style) == 2 and not isinstance(style[0], tuple)
    return [style] if alone else style


def _acceleration(model: VideoModel, image: Weighted | float | None) -> tuple[Lora, float]:
    if image is None:
        return model.acceleration
    if not isinstance(image, int | float):
        return _lora(model, image[0]), image[1]
    if image and not model.image_lora:
        raise ValueError(f"image={image}: this model has no image acceleration; give image=(LoRA, {image})")
    return model.image_lora, image


def _lora(model: VideoModel, source: str | Path | Lora) -> Lora:
    if isinstance(source, dict):
        return source
    if (named := model.styles.get(str(source))) is not None:
        return named
    if not Path(source).is_file():
        known = f", or one of the model's styles: {', '.join(model.styles)}" if model.styles else ""
        raise ValueError(f"no LoRA {str(source)!r}: give a .safetensors file{known}")
    return read_lora(Path(source), model.modules())


def _motion(model: VideoModel, base: State, source: Path | State, gamma: float) -> State:
    """New temporal layers by ``unet.<name>`` in float32, gamma times as strong."""
    if not math.isfinite(gamma):
        raise ValueError(
            f"gamma={gamma} of temporal layers is no number to multiply by; 1 takes all of them, 0 nothing"
        )
    state = source if isinstance(source, dict) else _read_motion(model, Path(source))
    state = {f"unet.{key}": value for key, value in state.items() if not key.endswith("pos_embed.pe")}
    for key in sorted(state.keys() | {name for name in base if "motion_modules" in name}):
        if problem := _misfit(key, state, base):
            raise ValueError(f"temporal layers do not fit: {key} {problem}; take those of this architecture")
    return {key: _scaled(key, value.float(), gamma) for key, value in state.items()}


def _read_motion(model: VideoModel, path: Path) -> State:
    """A file's temporal layers. Raises ValueError where what it says of them, which no shape tells, is not so here."""
    found, said = read_motion(path), read_facts(weights_file(path)) or MotionFacts()
    if model.unet.motion is not None and (found.settings or said.motion):
        other = MotionConfig.from_diffusers(motion_settings(found) | dict(said.motion))
        for name in ("num_attention_heads", "norm"):
            theirs, ours = getattr(other, name), getattr(model.unet.motion, name)
            if theirs != ours:
                said = f"{path} has {name}={theirs!r}, the model {ours!r}"
                raise ValueError(f"temporal layers do not fit: {said}; load a model with them (--motion)")
    return found.state


def _misfit(key: str, state: State, base: State) -> str:
    """What is wrong with a key, as the rest of a sentence; empty if nothing is."""
    if key not in base or "motion_modules" not in key:
        return "is no temporal layer of the model"
    if key not in state:
        return "is missing in the file"
    if state[key].shape != base[key].shape:
        return f"is {tuple(state[key].shape)} in the file, {tuple(base[key].shape)} in the model"
    return "" if state[key].isfinite().all() else "holds numbers that are not finite"


def _scaled(key: str, value: Tensor, gamma: float) -> Tensor:
    outer = ".transformer_blocks." not in key and ".proj_out." in key
    return value * gamma if outer else value


@torch.no_grad()
def _put(model: VideoModel, values: Iterable[tuple[str, Tensor]], *, keep: bool) -> None:
    live = {part: network.state_dict() for part, network in model.networks.items()}
    for key, value in values:
        part, _, name = key.partition(".")
        if keep and key not in model.kept:
            model.kept[key] = live[part][name].to("cpu", copy=True)
        live[part][name].copy_(value)
