"""Stand-ins for published weight files: the same names, shapes, types and containers, random numbers, any width.

Functions named after files return {key: shape}; ``fill`` makes tensors of it, ``header`` what a reader shows of it.
All by rule or from diffusers' networks, so that nothing here depends on the code under test.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from animatelcm.weights.files import TensorInfo

Shapes = dict[str, tuple[int, ...]]

SD15 = (320, 640, 1280, 1280)
VAE = (128, 256, 512, 512)
SMALL = (32, 64, 128, 128)
TEXT, SMALL_TEXT = 768, 16
LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


# Motion modules


def places(channels: tuple[int, ...], *, mid: bool, layers: int = 2) -> dict[str, int]:
    """Address and width of every motion module."""
    found = {f"down_blocks.{i}.motion_modules.{j}": c for i, c in enumerate(channels) for j in range(layers)}
    found |= {"mid_block.motion_modules.0": channels[-1]} if mid else {}
    return found | {
        f"up_blocks.{i}.motion_modules.{j}": c for i, c in enumerate(channels[::-1]) for j in range(layers + 1)
    }


def motion(channels: tuple[int, ...] = SMALL, *, mid: bool = True, rows: int | None = None, layers: int = 2) -> Shapes:
    """Motion modules in AnimateDiff's layout."""
    shapes: Shapes = {}
    for place, c in places(channels, mid=mid, layers=layers).items():
        top = f"{place}.temporal_transformer"
        block = f"{top}.transformer_blocks.0"
        for name in (f"{top}.norm", f"{block}.norms.0", f"{block}.norms.1", f"{block}.ff_norm"):
            shapes |= {f"{name}.weight": (c,), f"{name}.bias": (c,)}
        for name in (f"{top}.proj_in", f"{top}.proj_out"):
            shapes |= {f"{name}.weight": (c, c), f"{name}.bias": (c,)}
        for attention in (f"{block}.attention_blocks.0", f"{block}.attention_blocks.1"):
            shapes |= {f"{attention}.to_{x}.weight": (c, c) for x in "qkv"}
            shapes |= {f"{attention}.to_out.0.weight": (c, c), f"{attention}.to_out.0.bias": (c,)}
            if rows is not None:
                shapes[f"{attention}.pos_encoder.pe"] = (1, rows, c)
        shapes |= {f"{block}.ff.net.0.proj.weight": (8 * c, c), f"{block}.ff.net.0.proj.bias": (8 * c,)}
        shapes |= {f"{block}.ff.net.2.weight": (c, 4 * c), f"{block}.ff.net.2.bias": (c,)}
    return shapes


def mm_v1(channels: tuple[int, ...] = SMALL) -> Shapes:
    return motion(channels, mid=False, rows=24)


def mm_v2(channels: tuple[int, ...] = SMALL) -> Shapes:
    return motion(channels, mid=True, rows=32)


def mm_v3(channels: tuple[int, ...] = SMALL) -> Shapes:
    return motion(channels, mid=False, rows=32)


def animatelcm_t2v(channels: tuple[int, ...] = SMALL) -> Shapes:
    return motion(channels, mid=True)


def animatelcm_i2v(channels: tuple[int, ...] = SMALL) -> Shapes:
    return motion(channels, mid=True) | image_encoder(channels)


def image_encoder(channels: tuple[int, ...] = SMALL) -> Shapes:
    """38 tensors where two of three steps down change the width, as in Stable Diffusion 1.5."""
    shapes: Shapes = {"conv_in.weight": (channels[0], 4, 3, 3), "conv_in.bias": (channels[0],)}
    before = channels[0]
    for i, c in enumerate(c for c in channels for _ in range(2)):
        if c != before:
            shapes |= {f"body.{i}.in_conv.weight": (c, before, 1, 1), f"body.{i}.in_conv.bias": (c,)}
        for name, k in (("block1", 3), ("block2", 1)):
            shapes |= {f"body.{i}.{name}.weight": (c, c, k, k), f"body.{i}.{name}.bias": (c,)}
        before = c
    return {f"img_encoder.{key}": shape for key, shape in shapes.items()}


# LoRAs


def motion_lora(channels: tuple[int, ...] = SMALL, rank: int = 64) -> Shapes:
    """AnimateDiff v2's MotionLoRA: both attentions of every motion module."""
    shapes: Shapes = {}
    for place, c in places(channels, mid=True).items():
        block = f"{place}.temporal_transformer.transformer_blocks.0"
        for attention in (f"{block}.attention_blocks.0", f"{block}.attention_blocks.1"):
            for name in ("to_q", "to_k", "to_v", "to_out"):
                shapes[f"{attention}.processor.{name}_lora.down.weight"] = (rank, c)
                shapes[f"{attention}.processor.{name}_lora.up.weight"] = (c, rank)
    return shapes


def domain_adapter(channels: tuple[int, ...] = SMALL, text: int = SMALL_TEXT, rank: int = 128) -> Shapes:
    """AnimateDiff v3's domain adapter: every spatial attention."""
    shapes: Shapes = {}
    for key, (out, inner, *_) in maps(unet(channels, text)).items():
        module, _, name = key.removesuffix(".weight").partition(".to_")
        if name in ("q", "k", "v", "out.0"):
            stem = f"{module}.processor.to_{name.removesuffix('.0')}_lora"
            shapes |= {f"{stem}.down.weight": (rank, inner), f"{stem}.up.weight": (out, rank)}
    return shapes


def lcm_lora(channels: tuple[int, ...] = SMALL, text: int = SMALL_TEXT, rank: int = 64) -> Shapes:
    """LCM-LoRA in kohya's layout; AnimateLCM's has the same names."""
    shapes: Shapes = {}
    for key, (out, inner, *kernel) in maps(unet(channels, text)).items():
        module = key.removesuffix(".weight")
        if module.endswith(LCM_TARGETS):
            stem = "lora_unet_" + module.replace(".", "_")
            shapes[f"{stem}.lora_down.weight"] = (rank, inner, *kernel)
            shapes[f"{stem}.lora_up.weight"] = (out, rank, *[1 for _ in kernel])
            shapes[f"{stem}.alpha"] = ()
    return shapes


# Image models


@cache
def _unet(channels: tuple[int, ...], text: int) -> Shapes:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=text, attention_head_dim=8)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def unet(channels: tuple[int, ...] = SMALL, text: int = SMALL_TEXT) -> Shapes:
    """Stable Diffusion 1.5's UNet in diffusers' layout."""
    return dict(_unet(channels, text))


def maps(shapes: Shapes) -> Shapes:
    """The weights of linear maps and convolutions."""
    return {key: shape for key, shape in shapes.items() if len(shape) > 1}


def _pair(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _under(prefix: str, *parts: Shapes) -> Shapes:
    return {prefix + key: shape for part in parts for key, shape in part.items()}


def _ldm_resnet(before: int, c: int, emb: int) -> Shapes:
    shortcut = _pair("skip_connection", c, before, 1, 1) if before != c else {}
    return (
        _pair("in_layers.0", before)
        | _pair("in_layers.2", c, before, 3, 3)
        | _pair("emb_layers.1", c, emb)
        | _pair("out_layers.0", c)
        | _pair("out_layers.3", c, c, 3, 3)
        | shortcut
    )


def _ldm_transformer(c: int, text: int) -> Shapes:
    block = "transformer_blocks.0"
    shapes = _pair("norm", c) | _pair("proj_in", c, c, 1, 1) | _pair("proj_out", c, c, 1, 1)
    for i, inner in ((1, c), (2, text)):
        shapes |= {f"{block}.attn{i}.to_q.weight": (c, c)} | _pair(f"{block}.attn{i}.to_out.0", c, c)
        shapes |= {f"{block}.attn{i}.to_{x}.weight": (c, inner) for x in "kv"}
    shapes |= _pair(f"{block}.ff.net.0.proj", 8 * c, c) | _pair(f"{block}.ff.net.2", c, 4 * c)
    return shapes | {key: shape for i in (1, 2, 3) for key, shape in _pair(f"{block}.norm{i}", c).items()}


def ldm_unet(channels: tuple[int, ...] = SMALL, text: int = SMALL_TEXT) -> Shapes:
    """Stable Diffusion 1.5's UNet as its authors name it: cross-attention on all levels but the last."""
    emb, last = 4 * channels[0], len(channels) - 1
    shapes = _pair("time_embed.0", emb, channels[0]) | _pair("time_embed.2", emb, emb)
    shapes |= _pair("input_blocks.0.0", channels[0], 4, 3, 3)
    c, skips, i = channels[0], [channels[0]], 1
    for level, width in enumerate(channels):
        for _ in range(2):
            shapes |= _under(f"input_blocks.{i}.0.", _ldm_resnet(c, width, emb))
            shapes |= _under(f"input_blocks.{i}.1.", _ldm_transformer(width, text)) if level < last else {}
            c, i = width, i + 1
            skips.append(c)
        if level < last:
            shapes |= _pair(f"input_blocks.{i}.0.op", c, c, 3, 3)
            skips.append(c)
            i += 1
    shapes |= _under("middle_block.0.", _ldm_resnet(c, c, emb)) | _under("middle_block.2.", _ldm_resnet(c, c, emb))
    shapes |= _under("middle_block.1.", _ldm_transformer(c, text))
    i = 0
    for level, width in reversed(list(enumerate(channels))):
        for layer in range(3):
            shapes |= _under(f"output_blocks.{i}.0.", _ldm_resnet(c + skips.pop(), width, emb))
            shapes |= _under(f"output_blocks.{i}.1.", _ldm_transformer(width, text)) if level < last else {}
            if layer == 2 and level > 0:
                shapes |= _pair(f"output_blocks.{i}.{2 if level < last else 1}.conv", width, width, 3, 3)
            c, i = width, i + 1
    return shapes | _pair("out.0", c) | _pair("out.2", 4, c, 3, 3)


def _ldm_vae_half(blocks: list[tuple[str, int, int]]) -> Shapes:
    shapes: Shapes = {}
    for name, before, c in blocks:
        shapes |= _under(f"{name}.", _pair("norm1", before), _pair("conv1", c, before, 3, 3))
        shapes |= _under(f"{name}.", _pair("norm2", c), _pair("conv2", c, c, 3, 3))
        shapes |= _pair(f"{name}.nin_shortcut", c, before, 1, 1) if before != c else {}
    return shapes


def ldm_vae(channels: tuple[int, ...] = SMALL) -> Shapes:
    """Stable Diffusion's autoencoder as its authors name it."""
    top, wide = channels[0], channels[-1]
    before = [top, *channels[:-1]]
    after = [*channels[1:], wide]
    ins = [(f"down.{i}.block.{j}", before[i] if j == 0 else c, c) for i, c in enumerate(channels) for j in range(2)] + [
        ("mid.block_1", wide, wide),
        ("mid.block_2", wide, wide),
    ]
    outs = [(f"up.{i}.block.{j}", after[i] if j == 0 else c, c) for i, c in enumerate(channels) for j in range(3)] + [
        ("mid.block_1", wide, wide),
        ("mid.block_2", wide, wide),
    ]
    attention = _pair("mid.attn_1.norm", wide)
    for name in ("q", "k", "v", "proj_out"):
        attention |= _pair(f"mid.attn_1.{name}", wide, wide, 1, 1)
    encoder = _ldm_vae_half(ins) | attention | _pair("conv_in", top, 3, 3, 3) | _pair("norm_out", wide)
    encoder |= _pair("conv_out", 8, wide, 3, 3)
    decoder = _ldm_vae_half(outs) | attention | _pair("conv_in", wide, 4, 3, 3) | _pair("norm_out", top)
    decoder |= _pair("conv_out", 3, top, 3, 3)
    for i, c in enumerate(channels):
        encoder |= _pair(f"down.{i}.downsample.conv", c, c, 3, 3) if i < len(channels) - 1 else {}
        decoder |= _pair(f"up.{i}.upsample.conv", c, c, 3, 3) if i > 0 else {}
    return (
        _under("encoder.", encoder)
        | _under("decoder.", decoder)
        | _pair("quant_conv", 8, 8, 1, 1)
        | _pair("post_quant_conv", 4, 4, 1, 1)
    )


def clip_text(width: int = SMALL_TEXT, *, layers: int = 12, vocabulary: int = 49408, tokens: int = 77) -> Shapes:
    """CLIP's text encoder with the prefix of its older releases, and their position ids."""
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (tokens, width),
        "embeddings.position_ids": (1, tokens),
    }
    for layer in (f"encoder.layers.{i}" for i in range(layers)):
        for name in ("q", "k", "v", "out"):
            shapes |= _pair(f"{layer}.self_attn.{name}_proj", width, width)
        shapes |= _pair(f"{layer}.layer_norm1", width) | _pair(f"{layer}.layer_norm2", width)
        shapes |= _pair(f"{layer}.mlp.fc1", 4 * width, width) | _pair(f"{layer}.mlp.fc2", width, 4 * width)
    return _under("text_model.", shapes | _pair("final_layer_norm", width))


def ldm_checkpoint(
    channels: tuple[int, ...] = SMALL,
    vae: tuple[int, ...] = SMALL,
    text: int = SMALL_TEXT,
    *,
    ema: bool = False,
    **clip: int,
) -> Shapes:
    """A Stable Diffusion 1.5 checkpoint in one file, with its noise schedule's tables and perhaps averaged copies."""
    network = _under("diffusion_model.", ldm_unet(channels, text))
    shapes = dict.fromkeys(("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "posterior_variance"), (1000,))
    shapes |= _under("model.", network)
    if ema:
        shapes |= {"model_ema." + key.replace(".", ""): shape for key, shape in network.items()}
        shapes |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    shapes |= _under("first_stage_model.", ldm_vae(vae))
    return shapes | _under("cond_stage_model.transformer.", clip_text(text, **clip))


# Tensors and files


def _dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    whole = key.endswith(("position_ids", "num_updates"))
    return torch.int64 if whole else dtype


def header(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, TensorInfo]:
    """What a reader of headers shows of a file with these tensors."""
    return {key: TensorInfo(shape, NAMES[_dtype(key, dtype)]) for key, shape in shapes.items()}


@cache
def waves(rows: int, channels: int) -> Tensor:
    """Positions (rows, channels), number by number from their formula in double precision; not to be written to."""
    table = torch.zeros(rows, channels, dtype=torch.float64)
    for row in range(rows):
        for i in range(0, channels, 2):
            angle = row / 10_000 ** (i / channels)
            table[row, i], table[row, i + 1] = math.sin(angle), math.cos(angle)
    return table


def fill(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers of these shapes; positions are positions, alphas 8, position ids 0, 1, 2, ..."""
    source = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        if key.endswith((".pe", ".pos_encoding")):
            value = waves(*shape[1:])[None].clone()
        elif key.endswith(".alpha"):
            value = torch.tensor(8.0)
        elif key.endswith("position_ids"):
            value = torch.arange(shape[-1])[None]
        else:
            value = 0.02 * torch.randn(shape, generator=source)
        state[key] = value.to(_dtype(key, dtype))
    return state


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, object]:
    """What AnimateDiff's trainer saves: names of a distributed model, beside counters and settings."""
    wrapped = {f"module.{key}": value for key, value in state.items()}
    return {"epoch": 3, "global_step": 1000, "state_dict": wrapped, "animatediff_config": {"beta_schedule": "linear"}}


def write(content: dict[str, object], path: Path) -> Path:
    """By suffix: safetensors, or what ``torch.save`` writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path
