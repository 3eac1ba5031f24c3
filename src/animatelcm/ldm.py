"""Single files of Stable Diffusion 1.x, as CompVis wrote them and the community shares them: checkpoints, there and
back, and autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from animatelcm.fusion import base_state
from animatelcm.model import VideoModel
from animatelcm.nets import sd15
from animatelcm.nets.autoencoder import AutoencoderConfig
from animatelcm.nets.text_encoder import TextConfig
from animatelcm.nets.unet import UNetConfig
from animatelcm.weights.files import State, TensorInfo, read_header, read_state, write_safetensors
from animatelcm.weights.ldm_keys import TEXT, UNET, VAE, ldm_unet, ldm_vae

VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""How an autoencoder's keys begin; what else is in its file (losses, averages) belongs to its training."""
HEAD_WIDTH = 64
"""Channels of an attention head in CLIP's text encoder."""
_SHOWN = {
    *("sample_size", "block_out_channels", "cross_attention_dim", "force_upcast"),
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim"),
    *("attention_dropout", "initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id"),
}
"""Settings that tensors show, or that change no picture."""


class Checkpoint(NamedTuple):
    """A checkpoint's networks in diffusers' and transformers' names and settings; without its autoencoder where
    another one takes its place."""

    unet_config: UNetConfig
    unet: State
    text_config: dict[str, Any]
    text: State
    vae_config: dict[str, Any]
    vae: State


def read_checkpoint(path: Path, dtype: torch.dtype | None = None, *, vae: bool = True) -> Checkpoint:
    """The three networks of a .safetensors or .ckpt file; an averaged (EMA) copy of the UNet beside it is left out.

    Each is rounded to ``dtype`` before the next one is read. Widths are read off the tensors. Without ``vae`` its
    autoencoder is not read, and may be missing. Raises ValueError where the file is of another family, or lacks a part.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint

    header = read_header(path)
    if reason := _foreign(header, {"text encoder": TEXT} | ({"autoencoder": VAE} if vae else {})):
        raise ValueError(f"{path} {reason}")
    unet_config, text_config = _unet_config(header), _text_config(header)
    return Checkpoint(
        unet_config,
        _converted(path, UNET, lambda state: convert_ldm_unet_checkpoint(state, unet_config.to_diffusers()), dtype),
        text_config,
        _converted(path, TEXT, convert_ldm_clip_checkpoint, dtype),
        *(read_autoencoder(path, dtype) if vae else ({}, {})),
    )


def read_autoencoder(path: Path, dtype: torch.dtype | None = None) -> tuple[dict[str, Any], State]:
    """Settings and weights, in diffusers' names, of the autoencoder in a file: an own one by LDM's names or diffusers',
    or a checkpoint's. Raises ValueError where there is none of four levels, whose widths are read off the tensors."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    header = read_header(path)
    prefix = VAE if any(key.startswith(VAE) for key in header) else ""
    ldm = [f"{prefix}encoder.down.{level}.block.0.conv1.weight" for level in range(4)]
    diffusers = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(4)]
    layout = diffusers if diffusers[0] in header else ldm
    for key in layout:
        if key not in header or len(header[key].shape) != 4:
            raise ValueError(
                f"{path} holds no autoencoder of Stable Diffusion 1.x: it lacks {key}, or has another shape for it; "
                "give an autoencoder's file or folder (such as vae-ft-mse-840000-ema-pruned.safetensors)"
            )
    config = {**sd15.VAE, "block_out_channels": tuple(header[key].shape[0] for key in layout)}
    wanted = tuple(prefix + part for part in VAE_PARTS)
    if layout is diffusers:
        return config, _rounded(read_state(path, lambda key: key.startswith(wanted)), dtype)
    return config, _converted(path, wanted, lambda state: convert_ldm_vae_checkpoint(state, config), dtype)


def write_checkpoint(model: VideoModel, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """The base of a model as one .safetensors file that ``read_checkpoint`` reads, and A1111, ComfyUI and diffusers.

    Such a file has no place for temporal layers, LoRAs, adapters and noise. Raises ValueError, before anything is
    written, where a network has settings that its tensors do not show, as only Stable Diffusion 1.x's do.
    """
    if setting := _unlike(model):
        raise ValueError(
            f"{path}: only a Stable Diffusion 1.x has a form in one file, and this model's {setting}; "
            "write its folder (diffusers)"
        )
    vae = {f"vae.{name}": value for name, value in model.vae.state_dict().items()}
    state: State = {}
    for key, value in (base_state(model) | vae).items():
        part, _, name = key.partition(".")
        if "motion_modules" not in name:
            state[_ldm_name(part, name)] = (value[..., None, None] if _is_pixelwise(key, value) else value).to(dtype)
    write_safetensors(
        state,
        path,
        {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1",
            "modelspec.implementation": "ldm",
            "modelspec.title": path.stem,
            "modelspec.date": date.today().isoformat(),
            "modelspec.prediction_type": "epsilon",
        },
    )


def _ldm_name(part: str, name: str) -> str:
    if part == "text_encoder":
        return TEXT + name
    ldm = ldm_unet(name) if part == "unet" else ldm_vae(name)
    assert ldm, f"Stable Diffusion 1.x has no {name}"
    return (UNET if part == "unet" else VAE) + ldm


def _is_pixelwise(key: str, value: torch.Tensor) -> bool:
    """Whether a matrix is a convolution of one pixel in LDM: the projections in the autoencoder's attention."""
    return key.startswith("vae.") and ".attentions." in key and value.ndim == 2


def _unlike(model: VideoModel) -> str:
    """The first setting that reading would take for another one, for people to read; empty if there is none."""
    text = model.text_encoder.config
    heads = max(1, text.hidden_size // HEAD_WIDTH)
    for part, found, wanted in (
        ("unet", model.unet.config, UNetConfig()),
        ("vae", model.vae.config, AutoencoderConfig(**sd15.VAE)),
        ("text_encoder", text, TextConfig(**{**sd15.TEXT, "num_attention_heads": heads})),
    ):
        for field in fields(wanted):
            value = getattr(found, field.name)
            if field.name not in _SHOWN and value != getattr(wanted, field.name):
                return f"{part} has {field.name}={value!r}"
    return ""


def is_checkpoint(header: Mapping[str, TensorInfo]) -> bool:
    """Whether a file is a single-file checkpoint of any family."""
    return any(key.startswith(UNET) for key in header)


def _foreign(header: Mapping[str, TensorInfo], parts: Mapping[str, str]) -> str:
    """Why this is no Stable Diffusion 1.x with these parts, as the rest of a sentence; empty if it is one."""
    if not is_checkpoint(header):
        return f"is no checkpoint of Stable Diffusion: it has no {UNET}*; give a model's file, not a LoRA's or module's"
    if any(key.startswith("conditioner.embedders.") for key in header):
        return "is a Stable Diffusion XL checkpoint; only Stable Diffusion 1.x is supported"
    if any(key.startswith("cond_stage_model.model.") for key in header):
        return "is a Stable Diffusion 2 checkpoint; only Stable Diffusion 1.x is supported"
    first = header.get(f"{UNET}input_blocks.0.0.weight")
    latents = first.shape[1] if first is not None and len(first.shape) == 4 else 0
    if latents != 4:
        kind = "an inpainting model" if latents == 9 else "damaged or of another family"
        return f"is {kind}: its first layer takes {latents} channels, and a text-to-image model's takes 4"
    for part, prefix in parts.items():
        if not any(key.startswith(prefix) for key in header):
            other = (
                "give one beside it with --vae FILE_OR_FOLDER" if prefix == VAE else "take the model's complete file"
            )
            return f"holds no {part} ({prefix}*); {other}, or take the model's diffusers folder"
    for key, dimensions in _MEASURED.items():
        if key not in header or len(header[key].shape) != dimensions:
            return f"lacks {key}, or has another shape for it; fetch it again, or take one of Stable Diffusion 1.x"
    names = [key for key in header if key.startswith((UNET, VAE, TEXT))]
    return f"has {len(names)} tensors, and Stable Diffusion 1.x about 1,100" if len(names) > MOST else ""


_WIDTHS = [f"{UNET}input_blocks.{block}.0.in_layers.2.weight" for block in (1, 4, 7, 10)]
_CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_MEASURED = {**dict.fromkeys(_WIDTHS, 4), _CONTEXT: 2}
"""Tensors whose shapes the settings are read off, and how many dimensions they have."""
MOST = 5000


def _unet_config(header: Mapping[str, TensorInfo]) -> UNetConfig:
    return UNetConfig(
        sample_size=64,
        block_out_channels=tuple(header[key].shape[0] for key in _WIDTHS),
        cross_attention_dim=header[_CONTEXT].shape[1],
    )


def _text_config(header: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """CLIP's settings from its tensors' shapes; a missing tensor shows when the network is filled."""
    sizes = {
        key.removeprefix(TEXT).removeprefix("text_model."): info.shape
        for key, info in header.items()
        if key.startswith(TEXT) and len(info.shape) == 2
    }
    words, width = sizes.get("embeddings.token_embedding.weight", (sd15.TEXT["vocab_size"], sd15.TEXT["hidden_size"]))
    inner, _ = sizes.get("encoder.layers.0.mlp.fc1.weight", (sd15.TEXT["intermediate_size"], width))
    layers = {key.split(".")[2] for key in sizes if key.startswith("encoder.layers.")} or {"0"}
    found = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
    }
    return {**sd15.TEXT, **found}


def _converted(
    path: Path, prefixes: str | tuple[str, ...], convert: Callable[[State], State], dtype: torch.dtype | None
) -> State:
    """One network's tensors by its new names. Raises ValueError naming a key that the conversion trips over."""
    state = _rounded(read_state(path, names=lambda key: key.startswith(prefixes)), dtype)
    try:
        return convert(state)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        first = prefixes if isinstance(prefixes, str) else prefixes[0]
        raise ValueError(f"{path}: {first}* is incomplete or of another family ({error!r}); fetch it again") from error


def _rounded(state: State, dtype: torch.dtype | None) -> State:
    """The same tensors in ``dtype``, one by one; ``state`` is emptied."""
    for key in list(state) if dtype else ():
        value = state.pop(key)
        state[key] = value.to(dtype) if value.is_floating_point() else value
    return state
