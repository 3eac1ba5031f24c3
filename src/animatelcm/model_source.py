"""Which weights: a bundle and what is added to it, and in what numbers, where and how they run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

BetaSchedule = Literal["linear", "scaled_linear"]
Target = Literal["diffusers", "checkpoint", "animatediff", "kohya", "peft", "bundle"]
"""Formats of weights that can be written."""
Offload = Literal["auto", "none", "model"]
"""Where networks wait while others work: beside them, or (model) on the CPU; auto: there where memory is short."""
Compile = Literal["auto", "none", "full", "openvino"]
"""How the UNet is called: as it is (none), on a GPU as CUDA graphs (auto), fused by torch.compile too (full), on a CPU
compiled by OpenVINO (openvino)."""
Precision = Literal["auto", "fp16", "bf16", "fp32"]
"""Numbers that networks compute with; auto: fp16 on CUDA, else fp32. Latents and schedule are always fp32."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which weights: a bundle, and what is added to it."""

    model: str = "emoji"
    """"emoji" (embedded), a model folder, a checkpoint of Stable Diffusion 1.x, or a Hugging Face id."""
    motion: str = ""
    """Temporal layers to add or to replace: a file of AnimateDiff's or AnimateLCM's, a MotionAdapter's folder, or one
    of them on the hub (owner/name, owner/name/FILE)."""
    style: Annotated[UseAppendAction[tuple[str, ...]], arg(aliases=["--lora"])] = ()
    """A LoRA, FILE or FILE:SCALE, or the name of one of the model's own styles; may be given several times."""
    adapter: UseAppendAction[tuple[str, ...]] = ()
    """NAME=PLACE: a ControlNet or T2I-Adapter (diffusers' folder, a file of A1111's or ComfyUI's, or one of them on
    the hub) that reads maps of the kind NAME (canny, edge, depth, pose, tile), or i2v=PLACE: an image encoder, also
    AnimateLCM's file; may be given several times."""
    embedding: UseAppendAction[tuple[str, ...]] = ()
    """A textual inversion: FILE, whose word is the one in the file or else its name, or WORD=FILE; of A1111 or
    diffusers, or on the hub; may be given several times."""
    image_scale: float = 1.0
    """Beta: how much of the model's image acceleration; 0.8 is a usual choice with styles."""
    teacher: bool = False
    """The many-step model that this one was distilled from."""
    beta_schedule: BetaSchedule | None = None
    """Noise to sample under, where it is not what the files were made for."""
    solver_steps: int | None = None
    """N, the grid that an lcm sampler steps on (diffusers' original_inference_steps)."""
    vae: str = ""
    """An autoencoder in place of the model's own: a .safetensors, .ckpt or .pt file, diffusers' folder, or a hub id."""
    decoder: str = ""
    """What draws frames in place of the model's autoencoder, faster and less exactly: tiny (madebyollin/taesd, for
    Stable Diffusion 1.x), or an AutoencoderTiny's folder or hub id."""

    def styles(self) -> list[tuple[str, float]]:
        """(file or name, scale) of each style. Raises ValueError where a scale is no number."""
        return [_scaled(text) for text in self.style]

    def adapters(self) -> dict[str, str]:
        """Name -> place of each adapter. Raises ValueError where one has no name."""
        named = dict(text.partition("=")[::2] for text in self.adapter)
        if odd := [name for name, place in named.items() if not re.fullmatch(r"\w+", name) or not place]:
            raise ValueError(f"adapter {odd[0]!r} is not NAME=PLACE, such as canny=lllyasviel/control_v11p_sd15_canny")
        if len(named) < len(self.adapter):
            raise ValueError("two adapters have one name; give each kind of maps once")
        return named

    def embeddings(self) -> list[tuple[str, str]]:
        """(word, place) of each textual inversion; without a word where the file says it."""
        return [("", text) if Path(text).exists() else _named(text) for text in self.embedding]

    def words(self) -> list[str]:
        """As the command line has it; defaults are left out."""
        words = ["--model", self.model, *(["--motion", self.motion] if self.motion else [])]
        for text in self.style:
            words += ["--style", text]
        for text in self.adapter:
            words += ["--adapter", text]
        for text in self.embedding:
            words += ["--embedding", text]
        words += ["--image-scale", in_full(self.image_scale)] if self.image_scale != 1 else []
        words += ["--teacher"] if self.teacher else []
        words += ["--beta-schedule", self.beta_schedule] if self.beta_schedule else []
        words += ["--solver-steps", str(self.solver_steps)] if self.solver_steps else []
        words += ["--vae", self.vae] if self.vae else []
        return words + (["--decoder", self.decoder] if self.decoder else [])


def _named(text: str) -> tuple[str, str]:
    """WORD=PLACE, or a place alone, whose address may have such a sign too."""
    word, sign, place = text.partition("=")
    return (word.strip(), place) if sign and "/" not in word else ("", text)


def _scaled(text: str) -> tuple[str, float]:
    name, colon, scale = text.rpartition(":")
    if not colon or "/" in scale or "\\" in scale:
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError as error:
        raise ValueError(f"style {text!r}: {scale!r} is no scale; write FILE or FILE:0.8") from error


def in_full(value: float | None) -> str:
    """In full, so that it reads back as the same number; 4.0 is 4."""
    return repr(value).removesuffix(".0")
