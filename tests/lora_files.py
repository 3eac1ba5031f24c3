"""LoRAs drawn at random and spelled in every dialect: what the tests of LoRA files write."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.weights.lora import Lora, LoraLayer

ENDS = (
    *("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
)
"""Ends of module paths: one of each kind."""
PLACES = ("unet.down_blocks.1.", "unet.mid_block.", "unet.up_blocks.2.", "text_encoder.")
Weights = dict[str, Tensor]
TINY = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=4,
    norm_num_groups=8,
)
"""A UNet with fewer levels and layers than Stable Diffusion's."""


def unet_weights(motion: MotionConfig | None = None, config: UNetConfig | None = None) -> Weights:
    """Parameters of a UNet without numbers; those of Stable Diffusion 1.5 unless said otherwise."""
    with torch.device("meta"):
        unet = VideoUNet(config or UNetConfig(cross_attention_dim=768), motion)
    return {f"unet.{name}": value for name, value in unet.named_parameters()}


def sd15(motion: MotionConfig | None = None) -> list[str]:
    """Module paths of Stable Diffusion 1.5's UNet."""
    return modules_of(unet_weights(motion))


def modules_of(base: Weights) -> list[str]:
    return [name.removesuffix(".weight") for name, value in base.items() if name.endswith(".weight") and value.ndim > 1]


def drawn(base: Weights, modules: list[str], *, alpha: Callable[[int, int], float]) -> Lora:
    """Ranks from 2 to 4, alphas by number and rank."""
    lora: Lora = {}
    source = torch.Generator().manual_seed(len(modules))
    for i, module in enumerate(modules):
        out, *rest = base[f"{module}.weight"].shape
        rank = 2 + i % 3
        down = 0.3 * torch.randn(rank, *rest, generator=source)
        up = 0.3 * torch.randn(out, rank, *[1] * (len(rest) - 1), generator=source)
        lora[module] = LoraLayer(down, up, float(alpha(i, rank)))
    return lora


def chosen(base: Weights) -> list[str]:
    found = [module for module in modules_of(base) if module.startswith(PLACES) and module.endswith(ENDS)]
    assert {end for end in ENDS for module in found if module.endswith(end)} == set(ENDS)
    return found


def same_bits(ours: Lora, theirs: Lora) -> bool:
    assert ours.keys() == theirs.keys()
    pairs = [(ours[module], theirs[module]) for module in ours]
    return all(torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.alpha == b.alpha for a, b in pairs)


def numbered(names: list[str]) -> Weights:
    """Rank 1, the factors hold the name's number."""
    return {
        name.replace("*", end): torch.full((1, 1), float(i)) for i, name in enumerate(names) for end in ("down", "up")
    }


def ldm_modules() -> Iterator[str]:
    """Modules with weights of Stable Diffusion 1.5's UNet as LDM builds and numbers them."""

    def resnet(at: str, changes: bool) -> list[str]:
        return [f"{at}.{x}" for x in ("in_layers.2", "emb_layers.1", "out_layers.3", *["skip_connection"] * changes)]

    def attention(at: str) -> list[str]:
        maps = [f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
        return [f"{at}.{x}" for x in ("proj_in", "proj_out", *(f"transformer_blocks.0.{x}" for x in maps))]

    yield from ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2")
    n = 1
    for level in range(4):
        for i in range(2):
            yield from resnet(f"input_blocks.{n}.0", changes=i == 0 and level in (1, 2))
            yield from attention(f"input_blocks.{n}.1") if level < 3 else ()
            n += 1
        if level < 3:
            yield f"input_blocks.{n}.0.op"
            n += 1
    yield from (*resnet("middle_block.0", False), *attention("middle_block.1"), *resnet("middle_block.2", False))
    for n in range(12):
        yield from resnet(f"output_blocks.{n}.0", changes=True)
        yield from attention(f"output_blocks.{n}.1") if n > 2 else ()
        if n in (2, 5, 8):
            yield f"output_blocks.{n}.{1 if n == 2 else 2}.conv"


@cache
def ldm_by_diffusers() -> dict[str, str]:
    """Diffusers' name of a module -> LDM's, as diffusers converts checkpoints."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ends = ("weight", "bias")
    state = {f"model.diffusion_model.{name}.{end}": name for name in ldm_modules() for end in ends}
    converted = convert_ldm_unet_checkpoint(state, {"layers_per_block": 2})
    return {name.removesuffix(".weight"): ldm for name, ldm in converted.items() if name.endswith(".weight")}


def kohya(part: str, path: str) -> str:
    return f"lora_{ {'unet': 'unet', 'text_encoder': 'te'}[part] }_{path.replace('.', '_')}.lora_*.weight"


def ldm(part: str, path: str) -> str:
    return kohya(part, ldm_by_diffusers()[path] if part == "unet" else path)


def comfy(part: str, path: str) -> str:
    if part == "unet":
        return f"diffusion_model.{ldm_by_diffusers()[path]}.lora_*.weight"
    return f"text_encoders.clip_l.transformer.{path}.lora_*.weight"


def diffusers(part: str, path: str) -> str:
    return f"{part}.{path}.{'lora' if part == 'unet' else 'lora_linear_layer'}.*.weight"


def old_diffusers(part: str, path: str) -> str:
    if match := re.fullmatch(r"(.+\.attn\d)\.(to_[qkv]|to_out)(\.0)?", path):
        return f"{part}.{match[1]}.processor.{match[2]}_lora.*.weight"
    if match := re.fullmatch(r"(.+\.self_attn)\.(q|k|v|out)_proj", path):
        return f"{part}.{match[1]}.to_{match[2]}_lora.*.weight"
    return diffusers(part, path)


DIALECTS: dict[str, Callable[[str, str], str]] = {
    "kohya": kohya,
    "kohya, first text encoder": lambda part, path: kohya(part, path).replace("lora_te_", "lora_te1_"),
    "kohya, flat text encoder": lambda part, path: kohya(part, path.removeprefix("text_model.")),
    "kohya, LDM": ldm,
    "ComfyUI": comfy,
    "PEFT": lambda part, path: f"{part}.{path}.lora_*.weight",
    "PEFT, adapter": lambda part, path: f"{part}.{path}.lora_*.style.weight",
    "PEFT, wrapped": lambda part, path: f"base_model.model.{part}.{path}.lora_*.weight",
    "PEFT, wrapped part": lambda part, path: f"{part}.base_model.model.{path}.lora_*.weight",
    "PEFT, one part": lambda part, path: f"{path}.lora_*.weight",
    "diffusers": diffusers,
    "old diffusers": old_diffusers,
    "old diffusers, one part": lambda part, path: old_diffusers(part, path).removeprefix("unet."),
    "AnimateDiff, distributed": lambda part, path: "module." + old_diffusers(part, path).removeprefix("unet."),
}
"""A factor's name; the star is for the factor."""


def spelled(lora: Lora, dialect: str) -> Weights:
    """Tensors of a file in a dialect, without alphas."""
    state: Weights = {}
    for module, layer in lora.items():
        part, _, path = module.partition(".")
        if part == "text_encoder":
            path = f"text_model.{path.removeprefix('text_model.')}"
        name = DIALECTS[dialect](part, path)
        down, up = ("A", "B") if dialect.startswith("PEFT") else ("down", "up")
        state |= {name.replace("*", down): layer.down, name.replace("*", up): layer.up}
    return state
