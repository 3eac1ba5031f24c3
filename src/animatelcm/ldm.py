"""Single-file checkpoints of Stable Diffusion 1.x, as CompVis wrote them and the community shares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from animatelcm.nets import sd15
from animatelcm.nets.unet import UNetConfig
from animatelcm.weights.files import State, TensorInfo, read_header, read_state

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
HEAD_WIDTH = 64
"""Channels of an attention head in CLIP's text encoder."""


class Checkpoint(NamedTuple):
    """A checkpoint's networks in diffusers' and transformers' names and settings."""

    unet_config: UNetConfig
    unet: State
    vae_config: dict[str, Any]
    vae: State
    text_config: dict[str, Any]
    text: State


def read_checkpoint(path: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """The three networks of a .safetensors or .ckpt file; an averaged (EMA) copy of the UNet beside it is left out.

    Each is rounded to ``dtype`` before the next one is read. Widths are read off the tensors. Raises ValueError where
    the file is of another family, or lacks a part.
    """
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    header = read_header(path)
    if reason := _foreign(header):
        raise ValueError(f"{path} {reason}")
    unet_config, vae_config, text_config = _unet_config(header), _vae_config(header), _text_config(header)
    return Checkpoint(
        unet_config,
        _converted(path, UNET, lambda state: convert_ldm_unet_checkpoint(state, unet_config.to_diffusers()), dtype),
        vae_config,
        _converted(path, VAE, lambda state: convert_ldm_vae_checkpoint(state, vae_config), dtype),
        text_config,
        _converted(path, TEXT, convert_ldm_clip_checkpoint, dtype),
    )


def is_checkpoint(header: Mapping[str, TensorInfo]) -> bool:
    """Whether a file is a single-file checkpoint of any family."""
    return any(key.startswith(UNET) for key in header)


def _foreign(header: Mapping[str, TensorInfo]) -> str:
    """Why this is no Stable Diffusion 1.x, as the rest of a sentence; empty if it is one."""
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
    for part, prefix in {"autoencoder": VAE, "text encoder": TEXT}.items():
        if not any(key.startswith(prefix) for key in header):
            return f"holds no {part} ({prefix}*); take the model's complete file, or its diffusers folder"
    for key, dimensions in _MEASURED.items():
        if key not in header or len(header[key].shape) != dimensions:
            return f"lacks {key}, or has another shape for it; fetch it again, or take one of Stable Diffusion 1.x"
    names = [key for key in header if key.startswith((UNET, VAE, TEXT))]
    return f"has {len(names)} tensors, and Stable Diffusion 1.x about 1,100" if len(names) > MOST else ""


_WIDTHS = [f"{UNET}input_blocks.{block}.0.in_layers.2.weight" for block in (1, 4, 7, 10)]
_CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_VAE_WIDTHS = [f"{VAE}encoder.down.{level}.block.0.conv1.weight" for level in range(4)]
_MEASURED = {**dict.fromkeys(_WIDTHS, 4), _CONTEXT: 2, **dict.fromkeys(_VAE_WIDTHS, 4)}
"""Tensors whose shapes the settings are read off, and how many dimensions they have."""
MOST = 5000


def _unet_config(header: Mapping[str, TensorInfo]) -> UNetConfig:
    return UNetConfig(
        sample_size=64,
        block_out_channels=tuple(header[key].shape[0] for key in _WIDTHS),
        cross_attention_dim=header[_CONTEXT].shape[1],
    )


def _vae_config(header: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {**sd15.VAE, "block_out_channels": tuple(header[key].shape[0] for key in _VAE_WIDTHS)}


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


def _converted(path: Path, prefix: str, convert: Callable[[State], State], dtype: torch.dtype | None) -> State:
    """One network's tensors by its new names. Raises ValueError naming a key that the conversion trips over."""
    state = read_state(path, names=lambda key: key.startswith(prefix))
    for key in list(state) if dtype else ():
        value = state.pop(key)
        state[key] = value.to(dtype) if value.is_floating_point() else value
    try:
        return convert(state)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {prefix}* is incomplete or of another family ({error!r}); fetch it again") from error
