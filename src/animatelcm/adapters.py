"""Adapters in folders, diffusers' or ours, and in single files: checked against the model that they will stand beside,
built, described."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from animatelcm.building import empty_weights, filled, plain_config, read_json, read_part
from animatelcm.model import VideoModel
from animatelcm.nets.image_encoder import ImageEncoder, ImageEncoderConfig, ImageTokens
from animatelcm.nets.unet import FIXED, UNetConfig
from animatelcm.weights.controlnet import control_file, t2i_file
from animatelcm.weights.files import WEIGHT_SUFFIXES, State, read_header, read_state
from animatelcm.weights.identify import identify
from animatelcm.weights.motion import WIDEST

IMAGE = "i2v"
"""The name of the adapter that sees a picture; any other name is the kind of maps that an adapter reads."""
WEIGHTS = "diffusion_pytorch_model"
MAP_READERS = ("ControlNetModel", "T2IAdapter")
COPIED = (
    *("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim"),
    *("transformer_layers_per_block", "attention_head_dim", "norm_num_groups", "use_linear_projection"),
)
"""Settings that a ControlNet, the copy of a UNet's way down, shares with it."""
UNSAID = (*COPIED, "norm_eps", "flip_sin_to_cos", "freq_shift")
"""Settings that a ControlNet's file without a config.json has from the UNet, where its shapes do not say them."""
POOLED = "shuffle"
"""In the name of a ControlNet whose residuals are the same all over a frame, which is a setting and in no tensor."""


class Beside(NamedTuple):
    """What adapters have to fit: a UNet, its latents' channels, and the pixels that a latent cell covers on a side."""

    unet: UNetConfig
    latent: int
    downscale: int

    @classmethod
    def of(cls, model: VideoModel) -> Beside:
        return cls(model.unet.config, model.vae.config.latent_channels, model.downscale)


def lacking(name: str, known: Collection[str]) -> ValueError:
    """What to raise where a model has only the ``known`` adapters, and another is asked for."""
    needs = "an image encoder (i2v)" if name == IMAGE else f"an adapter that reads {name} maps"
    there = ", ".join(sorted(known)) or "none"
    return ValueError(f"{needs} is needed, and this model's adapters are: {there}; add one with --adapter {name}=PLACE")


def read(folder: Path, name: str, beside: Beside, dtype: torch.dtype) -> nn.Module:
    """An adapter of this name from its folder. Raises ValueError naming the file that is missing or misfits, or the
    setting that cannot stand beside the model, before anything is built after it."""
    if not (folder / "config.json").is_file():
        files = sorted(path.name for path in folder.iterdir() if path.name.endswith(WEIGHT_SUFFIXES))
        which = f"one of its files, {name}={folder / files[0]}" if files else "a file, on the hub OWNER/NAME/FILE"
        raise ValueError(f"{folder} has no config.json, which diffusers' folders of adapters have; name {which}")
    config = read_json(folder / "config.json")
    check(name, config, str(folder), beside)
    return built(config, read_part(folder, WEIGHTS), dtype, str(folder))


def read_file(path: Path, name: str, beside: Beside, dtype: torch.dtype) -> nn.Module:
    """A ControlNet or T2I-Adapter of this name from one file, as its authors, A1111, ComfyUI or diffusers have it.

    Settings are those of a config.json beside a file of diffusers' name, else what shapes say; heads, groups of norms
    and the like, which they do not, are the model's. Raises ValueError saying what the file is instead, or as ``read``.
    """
    header = read_header(path)
    kind = identify(header)
    if not kind.is_adapter:
        raise ValueError(
            f"{path} is {kind}, and --adapter {name}=FILE takes a ControlNet or T2I-Adapter of Stable Diffusion 1.x; "
            "give one of those"
        )
    if kind.kind == "t2i_adapter":
        found = t2i_file(path, header, beside.downscale)
        config = found.settings
    else:
        found = control_file(path, header)
        config = {key: getattr(beside.unet, key) for key in UNSAID} | found.settings
        config["global_pool_conditions"] = POOLED in path.stem.lower()
    said = path.with_name("config.json")
    if path.name.startswith(f"{WEIGHTS}.") and said.is_file():
        config = read_json(said)
    check(name, config, str(path), beside)
    wanted = set(found.names.values())
    state = read_state(path, wanted.__contains__)
    state = {ours: state.pop(theirs) for ours, theirs in found.names.items()}
    where = str(path) if kind.layout == "diffusers" else f"{path}, in diffusers' names"
    return built(config, state, dtype, where)


def built(config: Mapping[str, Any], state: State, dtype: torch.dtype, where: str) -> nn.Module:
    """An adapter of the class that its config names, with these weights. ``state`` is emptied.

    Raises ValueError where the class is none of ControlNetModel, T2IAdapter, ImageEncoder and ImageTokens.
    """
    name = config.get("_class_name")
    with empty_weights():
        if name == "ImageEncoder":
            network: nn.Module = ImageEncoder(ImageEncoderConfig.from_json(dict(config)))
        elif name == "ImageTokens":
            network = ImageTokens(config["in_channels"], config["text_channels"])
        elif name in ("ControlNetModel", "T2IAdapter"):
            import diffusers

            network = getattr(diffusers, name).from_config(dict(config))
        else:
            raise ValueError(
                f"{where}: {name!r} is no adapter; give a folder of a ControlNetModel, a T2IAdapter or an image encoder"
            )
    return filled(network, state, dtype, where).to(memory_format=torch.channels_last)


def settings_of(network: nn.Module) -> dict[str, Any]:
    """The contents of an adapter's config.json, from which ``built`` makes it again."""
    if isinstance(network, ImageEncoder):
        return network.config.to_json()
    if isinstance(network, ImageTokens):
        return {"_class_name": "ImageTokens", **network.settings}
    return {**plain_config(network.config), "_class_name": type(network).__name__}


def check(name: str, config: Mapping[str, Any], where: str, beside: Beside) -> None:
    """Whether what a config.json describes can stand beside the model, before anything is built after it.

    Raises ValueError naming the class, or the setting that is another than the model needs.
    """
    kind = config.get("_class_name")
    if kind not in (*MAP_READERS, "ImageEncoder", "ImageTokens"):
        raise ValueError(f"{where} is a {kind!r}, which is no adapter; give a {MAP_READERS[0]} or a {MAP_READERS[1]}")
    if (name == IMAGE) == (kind in MAP_READERS):
        raise ValueError(
            f"{where} is a {kind}, which {name!r} does not name; i2v names an image encoder, and the kind of its maps "
            "(canny, edge, depth, pose, tile) any other adapter"
        )
    said = _defaults(kind) | dict(config)
    for key, allowed in _allowed(kind, said, beside).items():
        if key in said and _plain(said[key]) not in map(_plain, allowed):
            raise ValueError(
                f"{where}: an adapter with {key}={reprlib.repr(said[key])}, and this model needs "
                f"{' or '.join(map(repr, allowed))}; take one of its architecture"
            )
    widths, halvings = _plain(said.get("conditioning_embedding_out_channels")), beside.downscale.bit_length()
    if kind == "ControlNetModel" and not _are_widths(widths, halvings):
        raise ValueError(
            f"{where}: an encoder of maps with widths {reprlib.repr(widths)}, and this model needs {halvings} of 1 to "
            f"{WIDEST}; take one of its architecture"
        )


def _allowed(kind: str, said: Mapping[str, Any], beside: Beside) -> dict[str, Sequence[object]]:
    """What an adapter's settings may be beside a model, by name: all that decides how much is built, and what fits."""
    unet, latent, downscale = beside
    if kind == "ControlNetModel":
        same = {key: (getattr(unet, key),) for key in COPIED}
        return {**same, **{key: (value,) for key, value in FIXED.items()}, "conditioning_channels": (3,)}
    if kind == "T2IAdapter":
        # a light one says the width of its last two levels once, so they have the same
        widths, light = unet.block_out_channels, said["adapter_type"] == "light_adapter"
        types = ("full_adapter", "light_adapter")[: 1 + (widths[-1:] == widths[-2:-1])]
        sizes = {"channels": (widths[:-1] if light else widths,), "downscale_factor": (downscale,)}
        return {**sizes, "in_channels": (3, 1), "num_res_blocks": (1, 2, 3, 4), "adapter_type": types}
    if kind == "ImageEncoder":
        seen = 3 if said["sees"] == "pixels" else latent
        return {"channels": (unet.block_out_channels,), "in_channels": (seen,), "downscale": (downscale,)}
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
