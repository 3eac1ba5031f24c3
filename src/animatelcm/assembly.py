"""From a description of weights to a model: a base, temporal layers, LoRAs, and the settings that come with them."""

from __future__ import annotations

import inspect
import logging
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from animatelcm import building
from animatelcm.bundle import ADAPTERS, load, read_adapter
from animatelcm.condition import IMAGE, lacking
from animatelcm.fusion import fuse
from animatelcm.hub import ADAPTER_FILES, LORA_FILES, MOTION_FILES, find
from animatelcm.model import VideoModel
from animatelcm.nets.image_encoder import ImageEncoderConfig
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import FIXED
from animatelcm.request import ModelSource
from animatelcm.weights.facts import MotionFacts, read_facts
from animatelcm.weights.families import Family, family_of
from animatelcm.weights.files import State, read_header, read_state
from animatelcm.weights.identify import identify
from animatelcm.weights.motion import WIDEST, read_motion, weights_file
from animatelcm.weights.motion import config as motion_settings

LOG = logging.getLogger(__name__)
MAP_READERS = ("ControlNetModel", "T2IAdapter")
COPIED = (
    *("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim"),
    *("transformer_layers_per_block", "attention_head_dim", "norm_num_groups", "use_linear_projection"),
)
"""Settings that a ControlNet, the copy of a UNet's way down, shares with it."""
FAST_LORAS = ("lcm-lora",)
"""Families of LoRAs that change how a model is sampled."""


def load_sum(
    source: ModelSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    keep: bool = True,
    adapters: Collection[str] | None = None,
) -> VideoModel:
    """The model that a source describes: base, temporal layers, LoRAs and acceleration at their scales, adapters.

    Noise, grid, steps and guidance are those of the family that the files belong to, which is logged; the source's own
    come before them. Without ``keep`` the sum cannot be taken apart, and a second copy of what it changes is saved.
    ``adapters``: those of the model's own that are wanted, None: all.

    Raises ValueError where a part is missing or does not fit, and where ``image_scale`` has nothing to scale.
    """
    model = load(
        source.model, dtype=dtype, teacher=source.teacher, image_scale=0.0, adapters=adapters, keep_teacher=keep
    )
    if source.motion:
        model = with_temporal_layers(model, find(source.motion, MOTION_FILES))
        if model.facts.sampler != "lcm":
            model.image_lora = {}  # it was made for temporal layers of few steps
    accelerated = bool(model.image_lora) and not source.teacher
    if source.image_scale not in (0, 1) and not accelerated:
        raise ValueError(f"image_scale={source.image_scale}: this model has no image acceleration; leave the scale out")
    if model.unet.motion is None and model.facts.num_frames > 1:
        model.facts = replace(model.facts, num_frames=1)
        LOG.info("%s has no temporal layers: it draws images; add --motion for videos", source.model)
    for name, place in source.adapters().items():
        model.adapters[name] = _adapter(model, name, find(place, ADAPTER_FILES), dtype)
    for name in sorted(set(adapters or ()) - model.adapters.keys()):
        own = {path.parent.name for path in (find(source.model) / ADAPTERS).glob("*/config.json")}
        raise lacking(name, model.adapters.keys() | own - {name})
    styles = [(_place(model, name), scale) for name, scale in source.styles()]
    for style, _ in styles:
        _settle(model, style)
    _override(model, source)
    model.to(device)
    if styles or accelerated:
        fuse(model, style=styles, image=source.image_scale if accelerated else None, keep=keep)
    return model


def _place(model: VideoModel, name: str) -> str | Path:
    """A LoRA's file, in a folder or on the hub too; of the model's own styles the name."""
    if name in model.styles or ("/" not in name and not Path(name).exists()):
        return name
    place = find(name, LORA_FILES)
    if place.is_file():
        return place
    if file := next((place / file for file in LORA_FILES if (place / file).is_file()), None):
        return file
    raise ValueError(f"{place} holds no LoRA ({', '.join(LORA_FILES[:2])}); name its file")


def with_temporal_layers(model: VideoModel, place: Path) -> VideoModel:
    """The same model with the temporal layers of a file or a MotionAdapter's folder, and their family's settings.

    It shares its spatial layers with ``model``. Raises ValueError where the layers were made for other widths.
    """
    found = read_motion(place)
    widths = model.unet.config.block_out_channels
    if found.channels != tuple(widths):
        raise ValueError(
            f"{place}: temporal layers for widths {found.channels}, and the model has {tuple(widths)}; "
            "take those of its architecture"
        )
    if model.kept:
        raise ValueError(f"{place}: temporal layers go into a model before LoRAs are fused; unfuse it first")
    said = read_facts(weights_file(place)) or MotionFacts()
    config = MotionConfig.from_diffusers(motion_settings(found) | dict(said.motion))
    dtype = model.unet.dtype
    state = {key: value for key, value in model.unet.state_dict().items() if "motion_modules" not in key}
    state |= {key: found.state.pop(key).to(dtype) for key in list(found.state)}
    unet = building.unet(model.unet.config, config, state, dtype, str(place))
    model = replace(model, unet=unet, teacher_motion={}, kept={}, facts=replace(model.facts, teacher={}))
    others = {name: network for name, network in model.adapters.items() if name != IMAGE}
    if found.image_encoder:
        others[IMAGE] = _image_encoder(model, found.image_encoder, dtype, str(place))
    model.adapters = others
    family = identify(read_header(weights_file(place))).family
    if said.sampling or said.noise:
        model.schedule = replace(model.schedule, **said.noise)
        model.facts = replace(model.facts, **said.sampling)
        LOG.info("%s says of itself: %s", place.name, settings(model))
    elif family or len(widths) == 4:
        if not family:
            LOG.info("%s may be AnimateDiff's or AnimateLCM's, its layout does not say; taken for the former", place)
        _adopt(model, family_of(family or "animatediff-v2"), place.name)
    return model


def _image_encoder(model: VideoModel, state: State, dtype: torch.dtype, where: str) -> nn.Module:
    """AnimateLCM's encoder of a picture, for this model's widths and latents."""
    config = ImageEncoderConfig(
        channels=model.unet.config.block_out_channels, in_channels=model.vae.config.latent_channels
    )
    return building.adapter(config.to_json(), dict(state), dtype, f"{where}: image encoder")


def _adapter(model: VideoModel, name: str, place: Path, dtype: torch.dtype) -> nn.Module:
    """An adapter from its folder, or the image encoder in a file of AnimateLCM's. Raises ValueError where its widths
    are not the model's."""
    if place.is_file():
        found, widths = read_motion(place), model.unet.config.block_out_channels
        if not found.image_encoder or name != IMAGE:
            raise ValueError(
                f"{place}: an adapter is a diffusers folder with config.json; of single files only an AnimateLCM with "
                "an image encoder is read, as i2v=FILE"
            )
        if found.channels != tuple(widths):
            raise ValueError(f"{place}: an image encoder for widths {found.channels}, and this model has {widths}")
        return _image_encoder(model, found.image_encoder, dtype, str(place))
    _check_adapter(model, name, building.read_json(place / "config.json"), place)
    return read_adapter(place, dtype)


def _check_adapter(model: VideoModel, name: str, config: Mapping[str, Any], place: Path) -> None:
    """Whether what a config.json describes can stand beside the model, before anything is built after it.

    Raises ValueError naming the class, or the setting that is another than the model needs.
    """
    kind = config.get("_class_name")
    if kind not in (*MAP_READERS, "ImageEncoder", "ImageTokens"):
        raise ValueError(f"{place} is a {kind!r}, which is no adapter; give a {MAP_READERS[0]} or a {MAP_READERS[1]}")
    if (name == IMAGE) == (kind in MAP_READERS):
        raise ValueError(
            f"{place} is a {kind}, which {name!r} does not name; i2v names an image encoder, and the kind of its maps "
            "(canny, edge, depth, pose, tile) any other adapter"
        )
    said = _defaults(kind) | dict(config)
    for key, allowed in _allowed(kind, said, model).items():
        if key in said and _plain(said[key]) not in map(_plain, allowed):
            raise ValueError(
                f"{place}: an adapter with {key}={reprlib.repr(said[key])}, and this model needs "
                f"{' or '.join(map(repr, allowed))}; take one of its architecture"
            )
    widths, halvings = _plain(said.get("conditioning_embedding_out_channels")), len(model.vae.config.block_out_channels)
    if kind == "ControlNetModel" and not _are_widths(widths, halvings):
        raise ValueError(
            f"{place}: an encoder of maps with widths {reprlib.repr(widths)}, and this model needs {halvings} of 1 to "
            f"{WIDEST}; take one of its architecture"
        )


def _allowed(kind: str, said: Mapping[str, Any], model: VideoModel) -> dict[str, Sequence[object]]:
    """What an adapter's settings may be beside a model, by name: all that decides how much is built, and what fits."""
    unet, latent = model.unet.config, model.vae.config.latent_channels
    if kind == "ControlNetModel":
        same = {key: (getattr(unet, key),) for key in COPIED}
        return {**same, **{key: (value,) for key, value in FIXED.items()}, "conditioning_channels": (3,)}
    if kind == "T2IAdapter":
        sizes = {"channels": (unet.block_out_channels,), "downscale_factor": (model.downscale,), "in_channels": (3, 1)}
        return {**sizes, "num_res_blocks": (1, 2, 3, 4), "adapter_type": ("full_adapter", "light_adapter")}
    if kind == "ImageEncoder":
        seen = 3 if said["sees"] == "pixels" else latent
        return {"channels": (unet.block_out_channels,), "in_channels": (seen,), "downscale": (model.downscale,)}
    return {"in_channels": (latent,), "text_channels": (unet.cross_attention_dim,)}


def _defaults(kind: str) -> dict[str, object]:
    """Settings that a config.json may leave out."""
    if kind == "ImageTokens":
        return {"in_channels": None, "text_channels": None}
    if kind == "ImageEncoder":
        return asdict(ImageEncoderConfig())
    import diffusers

    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _plain(value: object) -> object:
    """A setting as it compares: JSON's lists as tuples, and nothing, 0 and False the same."""
    return (tuple(value) if isinstance(value, list) else value) or None


def _are_widths(value: object, count: int) -> bool:
    whole = isinstance(value, tuple) and all(type(width) is int and 1 <= width <= WIDEST for width in value)
    return whole and len(value) == count


def _adopt(model: VideoModel, family: Family, name: str, *, noise: bool = True) -> None:
    """Take over a family's settings, and say so; without ``noise`` the betas stay those of the temporal layers."""
    if noise:
        betas = {key: getattr(family, key) for key in ("beta_schedule", "beta_start", "beta_end")}
        model.schedule = replace(model.schedule, **betas)
    model.schedule = replace(model.schedule, solver_steps=family.solver_steps)
    steps = {key: getattr(family, key) for key in ("num_inference_steps", "guidance_scale", "sampler")}
    model.facts = replace(model.facts, **steps)
    scale = f", LoRA scale {family.lora_scale:g}" if family.lora_scale != 1 else ""
    LOG.info("%s is %s: %s%s (%s)", name, family.title, settings(model), scale, family.source)


def _settle(model: VideoModel, style: str | Path) -> None:
    """An acceleration among the LoRAs makes the model one of few steps; the noise stays the temporal layers' own."""
    if not isinstance(style, Path) or model.facts.sampler == "lcm":
        return
    family = identify(read_header(style)).family
    if family not in FAST_LORAS:
        return
    # Its layers are those of many a style; what few styles have is the alpha that LCM's training script leaves at 8.
    alphas = read_state(style, lambda key: key.endswith(".alpha")).values()
    if {number for value in alphas for number in value.flatten().tolist()} == {8.0}:
        _adopt(model, family_of(family), style.name, noise=False)


def _override(model: VideoModel, source: ModelSource) -> None:
    given = {"beta_schedule": source.beta_schedule, "solver_steps": source.solver_steps}
    given = {key: value for key, value in given.items() if value is not None}
    if given:
        model.schedule = replace(model.schedule, **given)
        LOG.info("as asked: %s", settings(model))


def settings(model: VideoModel) -> str:
    """How a model will be sampled, in one line."""
    schedule, facts = model.schedule, model.facts
    betas = f"{schedule.beta_schedule} betas {schedule.beta_start:g} to {schedule.beta_end:g}"
    return (
        f"{betas}, grid of {schedule.solver_steps}, sampler {facts.sampler}, {facts.num_inference_steps} steps, "
        f"guidance {facts.guidance_scale:g}"
    )
