"""What a weight file is, from the names, shapes and types of its tensors alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from animatelcm.weights.controlnet import ControlKind, control_base, control_kind
from animatelcm.weights.embeddings import BASES, is_embedding
from animatelcm.weights.families import FAMILIES, TEXT_WIDTHS
from animatelcm.weights.files import TensorInfo
from animatelcm.weights.keys import MOTION, TEMPORAL, WRAPPED, is_positions
from animatelcm.weights.lora_keys import dialect, method

Kind = (
    Literal["checkpoint", "unet", "motion", "lora", "motion_lora", "vae", "text_encoder", "embedding", "unknown"]
    | ControlKind
)
Layout = Literal["", "ldm", "diffusers", "animatediff", "kohya", "peft", "old-diffusers", "lycoris", "tencentarc"]

KIND_WORDS: dict[Kind, str] = {
    "checkpoint": "checkpoint",
    "unet": "UNet",
    "motion": "motion module",
    "lora": "LoRA",
    "motion_lora": "MotionLoRA",
    "vae": "autoencoder",
    "text_encoder": "text encoder",
    "embedding": "textual inversion",
    "unknown": "weights of an unknown kind",
    "controlnet": "ControlNet",
    "t2i_adapter": "T2I-Adapter",
    "sparsectrl": "SparseCtrl",
    "controlnet_xs": "ControlNet-XS",
    "control_lora": "Control-LoRA",
    "control_difference": "ControlNet as a difference from its base",
}
LAYOUT_WORDS: dict[Layout, str] = {
    "ldm": "LDM",
    "diffusers": "diffusers",
    "animatediff": "AnimateDiff",
    "kohya": "kohya",
    "peft": "PEFT",
    "old-diffusers": "old diffusers",
    "lycoris": "LyCORIS",
    "tencentarc": "TencentARC",
}
LCM_MODULES = 278
"""Layers of Stable Diffusion 1.5 that a latent consistency LoRA changes."""


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """What a weight file is, and what is worth showing of it; ``str`` says it in one line."""

    kind: Kind
    layout: Layout = ""
    family: str = ""
    """A name of ``FAMILIES``, where names and shapes tell it; settings that it recommends are a guess, not a fact."""
    method: str = ""
    """Of a LyCORIS file what it is instead of a plain LoRA."""
    tensors: int = 0
    parameters: int = 0
    """Trained numbers: without positions, alphas, counters, the noise schedule and averaged copies."""
    types: tuple[str, ...] = ()
    modules: int = 0
    """Motion modules, or layers that a LoRA changes."""
    ranks: tuple[int, ...] = ()
    rows: int | None = None
    """Positions of motion modules; None where the file has none."""
    mid_block: bool = False
    image_encoder: bool = False
    ema: bool = False
    """Averaged copies of the weights beside them."""
    vae: bool = False
    """An autoencoder beside what ``kind`` names, as ``text_encoder``."""
    text_encoder: bool = False
    text_width: int | None = None
    """Numbers per text token that cross-attention takes."""
    latents: int | None = None
    """Channels that an autoencoder's latents have."""
    base: str = ""
    """Of a ControlNet or T2I-Adapter the models that it stands beside, where names or shapes tell."""
    vectors: int | None = None
    """What a textual inversion puts in place of its word."""

    @property
    def is_adapter(self) -> bool:
        """Whether it is a ControlNet or T2I-Adapter, and not one that other models than Stable Diffusion 1 need."""
        return self.kind in ("controlnet", "t2i_adapter") and self.base in ("", TEXT_WIDTHS[768])

    def __str__(self) -> str:
        word = KIND_WORDS[self.kind]
        title = FAMILIES[self.family].title if self.family else self.base or TEXT_WIDTHS.get(self.text_width or 0, "")
        subject = title if title.endswith(word) else f"{title} {word}".strip()
        return f"{subject[0].upper()}{subject[1:]} ({', '.join(self._details())})"

    def _details(self) -> list[str]:
        """The facts that this kind of file has."""
        kept = ("autoencoder", self.vae), ("text encoder", self.text_encoder), ("image encoder", self.image_encoder)
        found = {
            f"{LAYOUT_WORDS.get(self.layout)} keys": self.layout,
            self.method: self.method,
            f"{self.modules} modules": self.modules,
            f"rank {' to '.join(str(rank) for rank in sorted({*self.ranks[:1], *self.ranks[-1:]}))}": self.ranks,
            f"{self.rows} positions": self.rows is not None,
            f"{self.vectors} vector{'s' * (self.vectors != 1)}": self.vectors is not None,
            f"{self.latents} latent channels": self.latents,
            _count(self.parameters): True,
            **{f"with {name}": there for name, there in kept},
            "with averaged copies": self.ema,
            "goes in as --adapter KIND=FILE": self.is_adapter,
            "goes in as --vae FILE": self.kind == "vae" and self.latents == 4,
            "goes in as --embedding FILE": self.kind == "embedding" and self.text_width == 768,
        }
        return [text for text, there in found.items() if there]


def identify(header: Mapping[str, TensorInfo]) -> FileKind:
    """What a file with these tensors is; "unknown" where nothing tells. A hundred thousand take well under a second.

    A LoRA does not say what it was made for: "lcm-lora" is one that changes what a latent consistency LoRA changes, at
    its rank, which AnimateLCM's also does. Motion modules without positions are taken for AnimateLCM's, as
    ComfyUI-AnimateDiff-Evolved takes them.
    """
    tensors = {key.removeprefix(WRAPPED): info for key, info in header.items()}
    heads = {key.partition(".")[0] for key in tensors}
    downs = [key for key in tensors if dialect(key)]
    other = next(filter(None, map(method, tensors)), "")
    motion = [key for key in tensors if MOTION in key]
    ranks = tuple(sorted({tensors[key].shape[0] for key in downs if tensors[key].shape}))
    kind, layout = _lora_kind(downs, other) if downs or other else _kind(tensors, heads, motion)
    found = FileKind(
        kind=kind,
        layout=layout,
        method=other,
        tensors=len(tensors),
        parameters=sum(math.prod(info.shape) for key, info in tensors.items() if _is_trained(key, info)),
        types=tuple(sorted({info.dtype for info in tensors.values()})),
        modules=len(downs) or len({_module(key) for key in motion}),
        ranks=ranks,
        rows=next((info.shape[-2] for key, info in tensors.items() if is_positions(key) and len(info.shape) > 1), None),
        mid_block=any("mid_block" in key and "motion_modules" in key for key in tensors),
        image_encoder="img_encoder" in heads,
        ema="model_ema" in heads,
        vae=kind != "vae" and "first_stage_model" in heads,
        text_encoder=kind != "text_encoder" and _has_text_encoder(heads),
        text_width=next((width for key, info in tensors.items() if (width := _text_width(key, info.shape))), None),
    )
    found = replace(
        found, base=control_base(kind, tensors, found.text_width), latents=_latents(tensors) if kind == "vae" else None
    )
    return _with_family(found, tensors, downs)


def _module(key: str) -> str:
    """The motion module of a tensor: what is before the second dot after ``motion_modules``."""
    before, _, after = key.partition(MOTION)
    return before + after.partition(".")[0]


def _is_trained(key: str, info: TensorInfo) -> bool:
    if "." not in key or key.startswith("model_ema.") or key.endswith(".alpha") or is_positions(key):
        return False
    return info.dtype.startswith(("F", "BF"))


def _has_text_encoder(heads: Iterable[str]) -> bool:
    known = ("cond_stage_model", "conditioner", "text_encoder")
    return any(head in known or head.startswith("lora_te") for head in heads)


def _text_width(key: str, shape: tuple[int, ...]) -> int:
    """What a cross-attention's keys are made of; 0 for any other tensor."""
    cross = ("attn2.to_k.", "attn2_to_k.", "attn2.processor.to_k_lora.")
    if "attn2" not in key or "motion_modules" in key or len(shape) < 2:
        return 0
    if not any(name in key for name in cross):
        return 0
    return shape[1] if key.endswith("to_k.weight") or dialect(key) else 0


def _latents(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Channels that an autoencoder's decoder takes; None where its file does not show them."""
    names = ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")
    shape = next((tensors[name].shape for name in names if name in tensors), ())
    return shape[1] if len(shape) == 4 else None


def _lora_kind(downs: list[str], other: str) -> tuple[Kind, Layout]:
    """By the first layer, and by the name of what else than a plain LoRA is in the file."""
    layout: Layout = "lycoris" if other else (dialect(downs[0]) or "")
    of_motion = all("motion_modules" in key for key in downs) if downs else False
    if of_motion and any(TEMPORAL in key for key in downs) and layout == "old-diffusers":
        layout = "animatediff"
    return ("motion_lora" if of_motion else "lora"), layout


def _kind(keys: Mapping[str, TensorInfo], heads: set[str], motion: list[str]) -> tuple[Kind, Layout]:
    """By the first parts of names, the most telling first."""
    if control := control_kind(keys, heads):
        return control
    if motion:
        return "motion", "animatediff" if any(TEMPORAL in key for key in motion) else "diffusers"
    if any(key.startswith("model.diffusion_model.") for key in keys):
        parts = {"first_stage_model", "cond_stage_model", "conditioner"}
        return ("checkpoint" if heads & parts else "unet"), "ldm"
    if "input_blocks" in heads:
        return "unet", "ldm"
    if {"down_blocks", "time_embedding"} <= heads:
        # A network of videos, such as Stable Video Diffusion's, is something else.
        return ("unknown", "") if any(".temporal_" in key for key in keys) else ("unet", "diffusers")
    return _other_kind(keys, heads)


def _other_kind(keys: Mapping[str, TensorInfo], heads: set[str]) -> tuple[Kind, Layout]:
    """An autoencoder, a text encoder, or what is none of ours."""
    starts = {".".join(key.split(".", 2)[:2]) for key in keys}
    if "first_stage_model" in heads or {"encoder.down", "decoder.up"} & starts:
        return "vae", "ldm"
    if {"encoder.down_blocks", "decoder.up_blocks"} & starts:
        return "vae", "diffusers"
    if heads & {"cond_stage_model", "conditioner"}:
        return "text_encoder", "ldm"
    if {"text_model.embeddings", "embeddings.token_embedding"} & starts:
        return "text_encoder", "diffusers"
    if is_embedding(keys):
        return "embedding", ""
    return "unknown", ""


def _with_family(found: FileKind, tensors: Mapping[str, TensorInfo], downs: list[str]) -> FileKind:
    if found.kind == "motion":
        return replace(found, family=_motion_family(found, any(key.startswith("down_blocks.3.") for key in tensors)))
    if found.kind == "motion_lora":
        return replace(found, family="animatediff-v2" if found.mid_block and found.layout == "animatediff" else "")
    if found.kind == "embedding":
        shapes = [info.shape for info in tensors.values()]
        width = max(shape[-1] for shape in shapes)
        sizes = {"vectors": math.prod(shapes[0][:-1]), "parameters": sum(map(math.prod, shapes))}
        return replace(found, text_width=width, base=BASES.get(width, ""), **sizes)
    if found.kind == "lora":
        return replace(found, family=_lora_family(found, downs))
    if found.kind in ("checkpoint", "unet"):
        names = ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight")
        first = next((tensors[name].shape for name in names if name in tensors), ())
        sd15 = found.text_width == 768 and first[:2] == (320, 4)
        return replace(found, family="stable-diffusion-1.5" if sd15 else "")
    return found


def _motion_family(found: FileKind, four_levels: bool) -> str:
    if not four_levels:
        return ""
    if found.rows is None and found.mid_block:
        return "animatelcm-i2v" if found.image_encoder else "animatelcm-t2v"
    if found.mid_block and found.layout == "diffusers":
        return ""  # AnimateLCM and AnimateDiff v2 are the same there.
    known = {(24, False): "animatediff-v1", (32, False): "animatediff-v3", (32, True): "animatediff-v2"}
    return known.get((found.rows or 0, found.mid_block), "")


def _lora_family(found: FileKind, downs: list[str]) -> str:
    if found.layout == "kohya" and (found.modules, found.ranks) == (LCM_MODULES, (64,)) and not found.text_encoder:
        return "lcm-lora"
    of_attention = all(".processor." in key and not key.startswith("unet.") for key in downs)
    if found.layout == "old-diffusers" and of_attention and (found.modules, found.ranks) == (128, (128,)):
        return "animatediff-v3"
    return ""


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M parameters" if parameters >= 1e6 else f"{parameters:,} parameters"
