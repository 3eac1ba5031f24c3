"""Names of Stable Diffusion 1.x's tensors as CompVis wrote them (LDM), from diffusers' names: functions on strings.

The two number blocks differently: diffusers by level, LDM's UNet through all levels (three places each: two layers, and
on the way down the downsampler), LDM's decoder from the finest of its four levels.
"""

from __future__ import annotations

import re

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
"""How the keys of a checkpoint's three networks begin."""
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
_SPATIAL = "resnets|attentions|downsamplers|upsamplers"
_UNET_PLACE = re.compile(rf"(down_blocks\.\d|mid_block|up_blocks\.\d)\.({_SPATIAL})\.(\d)\.(.+)")
_VAE_PLACE = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)")
_VAE_MIDDLE = {
    ".conv_norm_out.": ".norm_out.",
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
    ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
    **{f".mid_block.attentions.0.to_{x}.": f".mid.attn_1.{x}." for x in "qkv"},
}


def ldm_unet(name: str) -> str:
    """LDM's name, without ``UNET``, of a tensor of the UNet; empty for any other one, such as of temporal layers."""
    stem, _, leaf = name.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{leaf}"
    if (match := _UNET_PLACE.fullmatch(name)) is None:
        return ""
    block, kind, number, rest = match[1], match[2], int(match[3]), match[4]
    if kind == "resnets":
        layer, _, leaf = rest.partition(".")
        rest = f"{_RESNET[layer]}.{leaf}"
    if block == "mid_block":
        return f"{_MIDDLE[f'{kind}.{number}']}.{rest}"
    first = 3 * int(block[-1])
    if kind == "downsamplers":
        return f"input_blocks.{first + 3}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":  # after the level's attention, which the coarsest has none of
        return f"output_blocks.{first + 2}.{2 if first else 1}.{rest}"
    side = f"input_blocks.{first + number + 1}" if block.startswith("down") else f"output_blocks.{first + number}"
    return f"{side}.{int(kind == 'attentions')}.{rest}"


def ldm_vae(name: str) -> str:
    """LDM's name, without ``VAE``, of an autoencoder's tensor."""
    name = name.replace("conv_shortcut", "nin_shortcut")
    if match := _VAE_PLACE.fullmatch(name):
        half, level, kind, number, rest = match[1], int(match[2]), match[3], match[4], match[5]
        place = f"down.{level}" if half == "encoder" else f"up.{3 - level}"
        layer = f"block.{number}" if kind == "resnets" else kind.removesuffix("rs")
        return f"{half}.{place}.{layer}.{rest}"
    for ours, theirs in _VAE_MIDDLE.items():
        name = name.replace(ours, theirs)
    return name
