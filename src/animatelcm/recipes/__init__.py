"""Recipes: functions that return a training run's config; ``animatelcm train NAME --field value`` overrides it."""

from __future__ import annotations

from animatelcm.recipes.adapters import (
    controlnet_emoji,
    controlnet_lora_emoji,
    i2v_emoji,
    i2v_images_emoji,
    t2i_adapter_depth_emoji,
    t2i_adapter_emoji,
    t2i_adapter_lora_emoji,
)
from animatelcm.recipes.emoji import (
    base_emoji,
    image_lcm_emoji,
    style_lora_emoji,
    teacher_emoji,
    vae_decoder_emoji,
    vae_emoji,
    vae_emoji_small,
    video_lcm_coupled_emoji,
    video_lcm_emoji,
)
from animatelcm.recipes.sd15 import (
    controlnet_lora_sd15,
    i2v_sd15,
    image_lcm_sd15,
    style_lora_sd15,
    video_lcm_sd15,
    video_lcm_sd15_n100,
)

__all__ = [
    "base_emoji",
    "controlnet_emoji",
    "controlnet_lora_emoji",
    "controlnet_lora_sd15",
    "i2v_emoji",
    "i2v_images_emoji",
    "i2v_sd15",
    "image_lcm_emoji",
    "image_lcm_sd15",
    "style_lora_emoji",
    "style_lora_sd15",
    "t2i_adapter_depth_emoji",
    "t2i_adapter_emoji",
    "t2i_adapter_lora_emoji",
    "teacher_emoji",
    "vae_decoder_emoji",
    "vae_emoji",
    "vae_emoji_small",
    "video_lcm_coupled_emoji",
    "video_lcm_emoji",
    "video_lcm_sd15",
    "video_lcm_sd15_n100",
]
