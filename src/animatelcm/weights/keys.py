"""Names of one layer in every community's words, and the shapes that belong to them: pure functions, no tensors.

Our names are diffusers'. Of motion modules they are those of its ``MotionAdapter``, and AnimateDiff's files say:

    down_blocks.0.motion_modules.1.norm.weight                                              ours
    down_blocks.0.motion_modules.1.temporal_transformer.norm.weight                         AnimateDiff's
    down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_q.weight                   ours
    down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q.weight
"""

from __future__ import annotations

import re
from typing import NamedTuple

Shape = tuple[int, ...]

WRAPPED = "module."
"""What torch's DistributedDataParallel puts before every name."""
MOTION = ".motion_modules."
TEMPORAL = "temporal_transformer."

_BLOCK_WORDS = {
    "attn1": "attention_blocks.0",
    "attn2": "attention_blocks.1",
    "norm1": "norms.0",
    "norm2": "norms.1",
    "norm3": "ff_norm",
}
"""Layers of a temporal transformer's block: diffusers' word -> AnimateDiff's."""
_WORDS_BACK = {theirs: ours for ours, theirs in _BLOCK_WORDS.items()}
_MODULE = re.compile(r"(\.motion_modules\.\d+\.)(?:temporal_transformer\.)?")
_OUR_WORD = re.compile(r"(transformer_blocks\.\d+\.)(attn1|attn2|norm1|norm2|norm3)(?=\.)")
_THEIR_WORD = re.compile(r"(transformer_blocks\.\d+\.)(attention_blocks\.[01]|norms\.[01]|ff_norm)(?=\.)")
# Of a block's two attentions each has its own copy in AnimateDiff's files; AnimateLCM's code says pos_encoding.
_THEIR_POSITIONS = re.compile(r"(transformer_blocks\.\d+\.)attention_blocks\.[01]\.pos_encoder\.(?:pe|pos_encoding)$")
_OUR_POSITIONS = re.compile(r"(transformer_blocks\.\d+\.)pos_embed\.pe$")


def is_motion(key: str) -> bool:
    """Whether a tensor belongs to a motion module, in either layout."""
    return MOTION in key


def is_positions(key: str) -> bool:
    """Whether a tensor holds a motion module's positions, which are no weights, in either layout."""
    return key.endswith((".pos_encoder.pe", ".pos_encoder.pos_encoding", ".pos_embed.pe"))


def to_diffusers(key: str) -> str:
    """AnimateDiff's name of a motion module's tensor -> diffusers'; the prefix of a training checkpoint is dropped.

    One to one for weights; both attentions' positions become their block's ``pos_embed.pe``. Names that are diffusers'
    already, and of layers that are no motion modules, stay as they are.
    """
    if not is_motion(key):
        return key
    key = _MODULE.sub(r"\1", key.removeprefix(WRAPPED), count=1)
    key = _THEIR_POSITIONS.sub(r"\1pos_embed.pe", key)
    return _THEIR_WORD.sub(lambda match: match[1] + _WORDS_BACK[match[2]], key, count=1)


def to_animatediff(key: str) -> str:
    """Diffusers' name of a motion module's tensor -> AnimateDiff's: undoes ``to_diffusers``.

    A block's positions become those of its first attention. Names that are AnimateDiff's already, and of layers that
    are no motion modules, stay as they are.
    """
    if not is_motion(key):
        return key
    key = _MODULE.sub(rf"\1{TEMPORAL}", key, count=1)
    key = _OUR_POSITIONS.sub(r"\1attention_blocks.0.pos_encoder.pe", key)
    return _OUR_WORD.sub(lambda match: match[1] + _BLOCK_WORDS[match[2]], key, count=1)


class Structure(NamedTuple):
    """How many motion modules there are, and how wide."""

    channels: tuple[int, ...]
    """By level, as in ``down_blocks``."""
    layers: int
    """Motion modules in each block on the way down; one more on the way up."""
    mid_block: bool
    depth: int = 1
    """Transformer blocks in each module."""


def motion_shapes(structure: Structure) -> dict[str, Shape]:
    """Our name and the shape of every weight that motion modules of this structure have."""
    channels, layers, mid_block, depth = structure
    modules = {f"down_blocks.{i}.motion_modules.{j}": c for i, c in enumerate(channels) for j in range(layers)}
    if mid_block:
        modules["mid_block.motion_modules.0"] = channels[-1]
    modules |= {
        f"up_blocks.{i}.motion_modules.{j}": c for i, c in enumerate(reversed(channels)) for j in range(layers + 1)
    }
    return {f"{name}.{key}": shape for name, c in modules.items() for key, shape in _module_shapes(c, depth).items()}


def position_widths(structure: Structure) -> dict[str, int]:
    """Our name and the channels of the positions of each transformer block."""
    ends = (".norm1.weight", ".pos_embed.pe")
    return {
        key.removesuffix(ends[0]) + ends[1]: shape[0]
        for key, shape in motion_shapes(structure).items()
        if key.endswith(ends[0])
    }


def image_encoder_shapes(channels: tuple[int, ...], latent: int = 4) -> dict[str, Shape]:
    """AnimateLCM's encoder of a first frame, without the ``img_encoder.`` that its names begin with in a file.

    Two residual layers a level, the first of which makes the level's width where it changes; latents of ``latent``
    channels go in.
    """
    shapes: dict[str, Shape] = {"conv_in.weight": (channels[0], latent, 3, 3), "conv_in.bias": (channels[0],)}
    for i in range(2 * len(channels)):
        before, c = channels[max(i - 1, 0) // 2], channels[i // 2]
        if before != c:
            shapes |= {f"body.{i}.in_conv.weight": (c, before, 1, 1), f"body.{i}.in_conv.bias": (c,)}
        shapes |= {f"body.{i}.block1.weight": (c, c, 3, 3), f"body.{i}.block1.bias": (c,)}
        shapes |= {f"body.{i}.block2.weight": (c, c, 1, 1), f"body.{i}.block2.bias": (c,)}
    return shapes


def _module_shapes(c: int, depth: int) -> dict[str, Shape]:
    """One motion module of c channels."""
    shapes: dict[str, Shape] = {"norm.weight": (c,), "norm.bias": (c,)}
    for name in ("proj_in", "proj_out"):
        shapes |= {f"{name}.weight": (c, c), f"{name}.bias": (c,)}
    for block in (f"transformer_blocks.{i}" for i in range(depth)):
        shapes |= {f"{block}.norm{i}.{kind}": (c,) for i in (1, 2, 3) for kind in ("weight", "bias")}
        for attn in (f"{block}.attn1", f"{block}.attn2"):
            shapes |= {f"{attn}.{name}.weight": (c, c) for name in ("to_q", "to_k", "to_v", "to_out.0")}
            shapes[f"{attn}.to_out.0.bias"] = (c,)
        shapes |= {f"{block}.ff.net.0.proj.weight": (8 * c, c), f"{block}.ff.net.0.proj.bias": (8 * c,)}
        shapes |= {f"{block}.ff.net.2.weight": (c, 4 * c), f"{block}.ff.net.2.bias": (c,)}
    return shapes
