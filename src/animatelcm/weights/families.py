"""Known families of models and the settings that they were made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share a noise schedule and a way to sample, as their authors recommend it."""

    name: str
    title: str
    """For people to read."""
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    solver_steps: int = 50
    """The papers' N: how many timesteps a distilled model knows."""
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 is off."""
    sampler: Literal["lcm", "ddim", "dpm++"] = "ddim"
    lora_scale: float = 1.0
    """Of the image acceleration that belongs to the model, or of the LoRA that it is."""
    source: str
    """Where the recommendation is from."""


_ANIMATEDIFF = "AnimateDiff's inference configuration and prompt files"

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="stable-diffusion-1.5",
            title="Stable Diffusion 1.5",
            beta_schedule="scaled_linear",
            source="Stable Diffusion 1.5's scheduler configuration; guidance of its pipeline, steps of AnimateDiff",
        ),
        Family(name="animatediff-v1", title="AnimateDiff v1", source=_ANIMATEDIFF),
        Family(name="animatediff-v2", title="AnimateDiff v2", source=_ANIMATEDIFF),
        Family(name="animatediff-v3", title="AnimateDiff v3", source=_ANIMATEDIFF),
        Family(
            name="animatelcm-t2v",
            title="AnimateLCM",
            solver_steps=100,
            num_inference_steps=4,
            guidance_scale=1.0,
            sampler="lcm",
            lora_scale=0.8,
            source="AnimateLCM's model card and text-to-video configuration; 6 to 8 steps are better",
        ),
        Family(
            name="animatelcm-i2v",
            title="AnimateLCM image-to-video",
            beta_end=0.014,
            solver_steps=200,
            num_inference_steps=4,
            guidance_scale=1.0,
            sampler="lcm",
            lora_scale=0.8,
            source="AnimateLCM's image-to-video configuration and demo",
        ),
        Family(
            name="lcm-lora",
            title="LCM-LoRA",
            beta_schedule="scaled_linear",
            num_inference_steps=4,
            guidance_scale=1.0,
            sampler="lcm",
            source="LCM-LoRA's model card and training script",
        ),
    )
}
"""By name."""

TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""Image models by the numbers per text token that their cross-attention takes."""


def family_of(name: str) -> Family:
    """The family of this name, as ``FileKind.family`` holds it. Raises ValueError where there is none."""
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not known; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
