"""ControlNets and T2I-Adapters in one file: diffusers' names of its tensors, and the settings that its shapes say.

Their weights and biases are named, one of each kind for an example,

    control_model.input_blocks.1.0.in_layers.2     ControlNet's authors, A1111, ComfyUI; also without the first word
    down_blocks.0.resnets.0.conv1                  diffusers
    body.3.block1                                  T2I-Adapter's authors
    body.1.body.1.block1                           theirs, of a light adapter
    adapter.body.1.resnets.1.block1                diffusers, of both
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from animatelcm.weights.families import TEXT_WIDTHS
from animatelcm.weights.files import TensorInfo
from animatelcm.weights.keys import MOTION, WRAPPED

ControlKind = Literal["controlnet", "t2i_adapter", "sparsectrl", "controlnet_xs", "control_lora", "control_difference"]
ControlLayout = Literal["ldm", "diffusers", "tencentarc"]

CONTROL = "control_model."
"""How a ControlNet's names begin in its authors' files, beside a whole model's in the oldest of them."""
LAYERS = 2
"""Layers in each of a Stable Diffusion's blocks on the way down, and in each level of a T2I-Adapter: files of their
authors number them all in a row."""
MOST = 2000
"""Tensors, of which a ControlNet of Stable Diffusion 1.x has 340."""
MIN_CELL = 16
"""Pixels of a latent's cell, which are a T2I-Adapter's channels."""

_FIRST = tuple(f"{word}{layer}.weight" for word in ("", "adapter.") for layer in ("body.0.in_conv", "conv_in"))
"""A T2I-Adapter's first layer, of a light and a full one, in its authors' words and diffusers'."""
_CELLS = {(n * 64,): TEXT_WIDTHS[768] for n in (1, 3)} | {(n * 256,): TEXT_WIDTHS[2048] for n in (1, 3)}
"""By what that takes: a cell of 8 x 8 or 16 x 16 pixels, of one channel or three."""
_UNET = "model.diffusion_model."
_STRIDES = [f"input_blocks.{i}.0.op.weight" for i in (3, 6, 9)]
_BLOCKS = [f"{block}.0.in_layers.0.weight" for block in (*(f"input_blocks.{i}" for i in range(12)), "middle_block")]
_COUNTED = dict.fromkeys((*_STRIDES, *_BLOCKS, "middle_block.1.norm.weight", "middle_block.2.in_layers.0.weight"), "")
"""Names by which diffusers counts blocks: where all of one are missing, its own would get another's."""
_ENCODER = {0: "conv_in", 14: "conv_out"} | {2 * i + 2: f"blocks.{i}" for i in range(6)}
"""Layers of the encoder of maps: the number in its authors' list, where activations count -> diffusers' name."""
_ADDED = re.compile(r"(?:zero_convs\.(\d{1,2})\.0|middle_block_out\.0|input_hint_block\.(\d{1,2}))\.(weight|bias)")
_LAYER = re.compile(r"body\.(\d{1,2})\.((?:in_conv|block[12])\.(?:weight|bias))")


class MapReader(NamedTuple):
    """An adapter that reads maps, as a file holds it."""

    names: dict[str, str]
    """Diffusers' name of a tensor -> the file's."""
    settings: dict[str, Any]
    """What shapes say, in the words of diffusers' config.json."""


def control_kind(header: Mapping[str, TensorInfo], heads: set[str]) -> tuple[ControlKind, ControlLayout] | None:
    """What reads control maps, ControlNet, T2I-Adapter or another, and whose names it has; None for anything else.

    ``heads``: the first words of the names.
    """
    if "control_model" in heads:
        heads = heads | {key.removeprefix(CONTROL).partition(".")[0] for key in header if key.startswith(CONTROL)}
    of_authors = bool(heads & {"control_model", "input_hint_block"})
    if heads & {"control_to_base_for_conv_in", "enc_zero_convs_out"}:
        return "controlnet_xs", "ldm" if "enc_zero_convs_out" in heads else "diffusers"
    if "lora_controlnet" in heads or (of_authors and any(key.endswith((".up", ".down")) for key in header)):
        return "control_lora", "ldm"
    if of_authors:
        return ("control_difference" if "difference" in heads else "controlnet"), "ldm"
    if heads & {"controlnet_cond_embedding", "controlnet_down_blocks"}:
        return ("sparsectrl" if any(MOTION in key for key in header) else "controlnet"), "diffusers"
    if heads == {"adapter"} and any(key.startswith("adapter.body.") for key in header):
        return "t2i_adapter", "diffusers"
    # AnimateLCM's encoder of a picture has the same names, and takes a latent's few channels.
    few = "conv_in.weight" in header and header["conv_in.weight"].shape[1:2] < (MIN_CELL,)
    return None if few or "body" not in heads or heads - {"body", "conv_in"} else ("t2i_adapter", "tencentarc")


def control_base(kind: str, header: Mapping[str, TensorInfo], text_width: int | None) -> str:
    """What a ControlNet or T2I-Adapter stands beside, where it shows: by the text that cross-attention takes, by an
    embedding of sizes, by the cells of pixels that go in. Empty for anything else."""
    if kind == "controlnet":
        sizes = any(key.removeprefix(CONTROL).startswith(("label_emb.", "add_embedding.")) for key in header)
        return TEXT_WIDTHS[2048] if sizes else TEXT_WIDTHS.get(text_width or 0, "")
    if kind == "t2i_adapter":
        found = (header[name].shape[1:2] for name in _FIRST if name in header)
        return _CELLS.get(next(found, ()), "")
    return ""


def control_file(path: Path, header: Mapping[str, TensorInfo]) -> MapReader:
    """A ControlNet in a file of either layout, whose other tensors are left out if its own have a word before them.

    Raises ValueError naming a tensor that no ControlNet has, or one that the settings are read off and that is missing.
    """
    own = {key.removeprefix(WRAPPED): key for key in header}
    if any(key.startswith(CONTROL) for key in own):
        own = {key.removeprefix(CONTROL): theirs for key, theirs in own.items() if key.startswith(CONTROL)}
    _check_count(path, own)
    of_authors = any(key.startswith(("input_blocks.", "input_hint_block.")) for key in own)
    shapes = _Shapes(path, header, _from_authors(path, own) if of_authors else own)
    names = shapes.names
    encoder = "controlnet_cond_embedding"
    strides = (_count(names, rf"{encoder}\.blocks\.(\d+)") + 1) // 2
    widths = [f"{encoder}.conv_in.weight", *(f"{encoder}.blocks.{2 * i + 1}.weight" for i in range(strides))]
    text = next((key for key in names if key.endswith(".attn2.to_k.weight")), "")
    settings = {
        "in_channels": shapes("conv_in.weight", 4)[1],
        "block_out_channels": tuple(
            shapes(f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(_count(names, r"down_blocks\.(\d+)"))
        ),
        "conditioning_channels": shapes(widths[0], 4)[1],
        "conditioning_embedding_out_channels": tuple(shapes(key, 4)[0] for key in widths),
    }
    settings |= {"cross_attention_dim": shapes(text, 2)[1]} if text else {}
    return MapReader(names, {"_class_name": "ControlNetModel", **settings})


def t2i_file(path: Path, header: Mapping[str, TensorInfo], downscale: int) -> MapReader:
    """A T2I-Adapter, full or light, in a file of either layout, for latent cells of ``downscale`` pixels a side.

    Raises ValueError naming a tensor that no such adapter has, or one that the settings are read off and that is
    missing, and where its first layer takes no whole number of channels for each pixel of a cell.
    """
    own = {key.removeprefix(WRAPPED): key for key in header}
    _check_count(path, own)
    light = any(".out_conv." in key for key in own)
    if not any(key.startswith("adapter.") for key in own):
        own = {_adapter_name(key, light=light): theirs for key, theirs in own.items()}
    shapes = _Shapes(path, header, own)
    levels = _count(own, r"adapter\.body\.(\d+)")
    first = "adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"
    widest = "out_conv.weight" if light else "resnets.0.block1.weight"
    seen, rest = divmod(shapes(first, 4)[1], downscale**2)
    if rest:
        raise ValueError(
            f"{path}: its first layer takes {shapes(first, 4)[1]} channels, and a T2I-Adapter's for this model "
            f"{downscale**2} or {3 * downscale**2}; take one of its architecture"
        )
    settings = {
        "in_channels": seen,
        "channels": tuple(shapes(f"adapter.body.{i}.{widest}", 4)[0] for i in range(levels - light)),
        "num_res_blocks": _count(own, r"adapter\.body\.0\.resnets\.(\d+)"),
        "downscale_factor": downscale,
        "adapter_type": "light_adapter" if light else "full_adapter",
    }
    return MapReader(own, {"_class_name": "T2IAdapter", **settings})


class _Shapes:
    """A file's shapes by diffusers' names. Raises ValueError where a tensor holds no floating-point numbers."""

    def __init__(self, path: Path, header: Mapping[str, TensorInfo], names: dict[str, str]) -> None:
        self.path, self.header, self.names = path, header, names
        for key in names.values():
            if not header[key].dtype.startswith(("F", "BF")):
                raise ValueError(
                    f"{path}: {key} holds {header[key].dtype} numbers, which no weights are; fetch it again"
                )

    def __call__(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Raises ValueError where the tensor is missing or has other dimensions than so many."""
        if name not in self.names:
            raise ValueError(f"{self.path}: {name} is missing; the file is incomplete, or of another architecture")
        shape = self.header[self.names[name]].shape
        if len(shape) != dimensions:
            raise ValueError(
                f"{self.path}: {self.names[name]} has {len(shape)} dimensions, expected {dimensions}; fetch it again"
            )
        return shape


def _from_authors(path: Path, own: Mapping[str, str]) -> dict[str, str]:
    """Diffusers' name -> the file's, of a ControlNet in its authors' words: a UNet's way down, and what was added."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = {ours: theirs for key, theirs in own.items() if (ours := _added(key))}
    way_down = {_UNET + key: theirs for key, theirs in (_COUNTED | own).items() if not _added(key)}
    try:  # it renames whatever it is given, here the names themselves
        renamed = convert_ldm_unet_checkpoint(way_down, {"layers_per_block": LAYERS})
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is incomplete or of another family ({error!r}); fetch it again") from error
    names |= {ours: theirs for ours, theirs in renamed.items() if theirs}
    if lost := sorted(set(own.values()) - set(names.values())):
        raise ValueError(f"{path}: {lost[0]} is for no layer of a ControlNet; take one of Stable Diffusion 1.x")
    return names


def _added(key: str) -> str:
    """Diffusers' name of what a ControlNet has beside a UNet's way down; empty for any other tensor."""
    if not (match := _ADDED.fullmatch(key)):
        return ""
    skip, layer, kind = match.groups()
    if layer:
        known = _ENCODER.get(int(layer), "")
        return f"controlnet_cond_embedding.{known}.{kind}" if known else ""
    return f"controlnet_down_blocks.{skip}.{kind}" if skip else f"controlnet_mid_block.{kind}"


def _adapter_name(key: str, *, light: bool) -> str:
    """Diffusers' name of a T2I-Adapter's tensor in its authors' words."""
    match = None if light else _LAYER.fullmatch(key)
    if not match:
        return f"adapter.{key.replace('.body.', '.resnets.')}"
    level, layer = divmod(int(match[1]), LAYERS)
    of_level = match[2].startswith("in_conv.") and layer == 0
    return f"adapter.body.{level}.{'' if of_level else f'resnets.{layer}.'}{match[2]}"


def _count(names: Mapping[str, str], pattern: str) -> int:
    """How many numbers a part of names has."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def _check_count(path: Path, own: Mapping[str, str]) -> None:
    if len(own) > MOST:
        raise ValueError(f"{path} has {len(own)} tensors, and adapters up to {MOST}; take one of Stable Diffusion 1.x")
