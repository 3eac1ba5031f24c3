"""From a description of weights to a model: a base, temporal layers, LoRAs, and the settings that come with them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from animatelcm import building
from animatelcm.adapters import IMAGE, WEIGHTS, Beside, built, lacking, read_file
from animatelcm.adapters import read as read_adapter
from animatelcm.bundle import ADAPTERS, load
from animatelcm.fusion import fuse
from animatelcm.hub import ADAPTER_FILES, LORA_FILES, MOTION_FILES, find
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource
from animatelcm.nets.image_encoder import ImageEncoderConfig
from animatelcm.nets.motion import MotionConfig
from animatelcm.weights.embeddings import read_embedding
from animatelcm.weights.facts import MotionFacts, read_facts
from animatelcm.weights.families import Family, family_of
from animatelcm.weights.files import State, find_copy, read_header, read_state
from animatelcm.weights.identify import identify
from animatelcm.weights.motion import config as motion_settings
from animatelcm.weights.motion import read_motion, weights_file

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

LOG = logging.getLogger(__name__)
TINY, TINY_CLASS = "madebyollin/taesd", "AutoencoderTiny"
FAST_LORAS = ("lcm-lora",)
"""Families of LoRAs that change how a model is sampled."""
EMBEDDING_FILES = ["learned_embeds.safetensors", "learned_embeds.bin"]
FLAGS = {
    "checkpoint": "--model FILE",
    "motion": "--motion FILE",
    "controlnet": "--adapter KIND=FILE",
    "t2i_adapter": "--adapter KIND=FILE",
    "vae": "--vae FILE",
    "embedding": "--embedding FILE",
}
"""What takes a file that is no LoRA."""


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
        source.model,
        dtype=dtype,
        teacher=source.teacher,
        image_scale=0.0,
        adapters=adapters,
        keep_teacher=keep,
        vae=source.vae,
    )
    if source.motion:
        model = with_temporal_layers(model, find(source.motion, MOTION_FILES, "motion module"))
        if model.facts.sampler != "lcm":
            model.image_lora = {}  # it was made for temporal layers of few steps
    accelerated = bool(model.image_lora) and not source.teacher
    if source.image_scale not in (0, 1) and not accelerated:
        raise ValueError(f"image_scale={source.image_scale}: this model has no image acceleration; leave the scale out")
    if model.unet.motion is None and model.facts.num_frames > 1:
        model.facts = replace(model.facts, num_frames=1)
        LOG.info("%s has no temporal layers: it draws images; add --motion for videos", source.model)
    for name, place in source.adapters().items():
        model.adapters[name] = _adapter(model, name, find(place, ADAPTER_FILES, "adapter"), dtype)
    for name in sorted(set(adapters or ()) - model.adapters.keys()):
        own = {path.parent.name for path in (find(source.model) / ADAPTERS).glob("*/config.json")}
        raise lacking(name, model.adapters.keys() | own - {name})
    styles = [(_place(model, name), scale) for name, scale in source.styles()]
    for style, _ in styles:
        _settle(model, style)
    _override(model, source)
    model.embeddings = _embeddings(model, source)
    if source.decoder:
        place = find(TINY if source.decoder == "tiny" else source.decoder, ADAPTER_FILES, "decoder")
        model.decoder = _decoder(model, place, dtype)
    model.to(device)
    if styles or accelerated:
        fuse(model, style=styles, image=source.image_scale if accelerated else None, keep=keep)
    return model


def _place(model: VideoModel, name: str) -> str | Path:
    """A LoRA's file, in a folder or on the hub too; of the model's own styles the name."""
    if name in model.styles or ("/" not in name and not Path(name).exists()):
        return name
    place = find(name, LORA_FILES, "LoRA")
    files = [place] if place.is_file() else [place / file for file in LORA_FILES if (place / file).is_file()]
    if not files:
        raise ValueError(f"{place} holds no LoRA ({', '.join(LORA_FILES[:2])}); name its file")
    kind = identify(read_header(files[0]))
    if flag := FLAGS.get(kind.kind):
        raise ValueError(f"{files[0]} is {kind}, and --lora takes a LoRA; give it as {flag}")
    return files[0]


def _embeddings(model: VideoModel, source: ModelSource) -> dict[str, Tensor]:
    """Textual inversions by their words. Raises ValueError where two have one, or the model takes other vectors."""
    found: dict[str, Tensor] = {}
    width, room = model.text_encoder.config.hidden_size, model.tokenizer.model_max_length - 2
    for word, place in source.embeddings():
        file = find(place, EMBEDDING_FILES, "textual inversion")
        if file.is_dir():
            file = next((file / name for name in EMBEDDING_FILES if (file / name).is_file()), file / EMBEDDING_FILES[0])
        named, vectors = read_embedding(file, width, room)
        word = word or named or file.stem
        if word.casefold() in map(str.casefold, found):
            raise ValueError(f"{file}: the word {word!r} has a textual inversion; give WORD=FILE with another one")
        LOG.info("%s stands for %d vector%s, in prompts", word, len(vectors), "s" * (len(vectors) > 1))
        found[word] = vectors
    return found


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
        others[IMAGE] = _image_encoder(model, found.image_encoder, said, dtype, str(place))
    elif IMAGE in model.adapters:
        LOG.info("%s: the model's image encoder was made for other temporal layers, and is left out", place.name)
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


def _image_encoder(model: VideoModel, state: State, said: MotionFacts, dtype: torch.dtype, where: str) -> nn.Module:
    """AnimateLCM's encoder of a picture, for this model's widths and latents."""
    widths, latents = model.unet.config.block_out_channels, model.vae.config.latent_channels
    config = ImageEncoderConfig(channels=widths, in_channels=latents).to_json() | dict(said.image_encoder)
    return built(config, dict(state), dtype, f"{where}: image encoder")


def _adapter(model: VideoModel, name: str, place: Path, dtype: torch.dtype) -> nn.Module:
    """An adapter from its folder or file, or the image encoder in a file of AnimateLCM's. Raises ValueError where its
    widths are not the model's."""
    if not place.is_file():
        return read_adapter(place, name, Beside.of(model), dtype)
    if identify(read_header(place)).kind != "motion":
        return read_file(place, name, Beside.of(model), dtype)
    found, widths = read_motion(place), model.unet.config.block_out_channels
    if not found.image_encoder or name != IMAGE:
        raise ValueError(
            f"{place} is a motion module; of those an adapter is only an AnimateLCM's image encoder, as i2v=FILE; "
            "give the file as --motion, or a ControlNet or T2I-Adapter"
        )
    if found.channels != tuple(widths):
        raise ValueError(f"{place}: an image encoder for widths {found.channels}, and this model has {widths}")
    said = read_facts(weights_file(place)) or MotionFacts()
    return _image_encoder(model, found.image_encoder, said, dtype, str(place))


def _decoder(model: VideoModel, place: Path, dtype: torch.dtype) -> AutoencoderTiny:
    """A small autoencoder from its folder, safetensors alone. Raises ValueError where the place holds something else,
    or its latents are not the model's.

    (Its shapes do not tell whether it was trained on them: taesd belongs to Stable Diffusion 1.x.)
    """
    settings_file, file = place / "config.json", place if place.is_file() else find_copy(place, WEIGHTS)
    name = building.read_json(settings_file).get("_class_name") if settings_file.is_file() else None
    if name != TINY_CLASS:
        kind = name or (identify(read_header(file)) if file else "a folder without config.json and weights")
        whole = "; a whole autoencoder goes in as --vae" if "autoencoder" in str(kind).lower() else ""
        raise ValueError(f"{place} is {kind}, and --decoder takes an {TINY_CLASS}'s folder or hub id, or tiny{whole}")
    if file is None or file.suffix != ".safetensors":
        raise ValueError(f"weights are missing: {place / 'diffusion_pytorch_model.safetensors'}")
    made = building.tiny_autoencoder(building.read_json(place / "config.json"), read_state(file), dtype, str(place))
    cell = made.config.upsampling_scaling_factor ** (len(made.config.decoder_block_out_channels) - 1)
    own, wanted = (made.config.latent_channels, cell), (model.vae.config.latent_channels, model.downscale)
    if own != wanted or made.config.out_channels != 3:
        raise ValueError(
            f"{place}: a decoder of latents with {own[0]} channels in cells of {own[1]} pixels, and this model's have "
            f"{wanted[0]} and {wanted[1]}; take one that was made for it, or leave --decoder out"
        )
    return made


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
