"""Recipes: functions that return a training run's config; ``animatelcm train NAME --field value`` overrides it."""

from __future__ import annotations

from dataclasses import replace

from animatelcm.config import DataConfig, TrainConfig

PROMPTS = (
    "a parrot",
    "a cartoon fox on a blue background",
    "a flat red apple on a yellow background",
    "a 3d rocket",
    "a penguin on a pink background",
    "a flat automobile",
    "a 3d octopus on a green background",
    "a cartoon hamburger",
)
MOTION_PROMPTS = (
    "a parrot",
    "a cartoon fox bouncing on a blue background",
    "a flat red apple spinning on a yellow background",
    "a 3d rocket sliding up",
    "a penguin shaking on a pink background",
    "a flat automobile sliding left",
    "a 3d octopus on a green background",
    "a cartoon hamburger growing",
)


def vae_emoji() -> TrainConfig:
    """The miniature's autoencoder, from random weights: 64x64 pixels to 8x8x16 latents. First of the chain."""
    return TrainConfig(
        name="vae_emoji",
        objective="autoencoder",
        trainable="autoencoder",
        model="new",
        data=DataConfig(kind="emoji-images", length=1_000_000, concepts="all", cache=False),
        steps=2400,
        batch_size=16,
        learning_rate=1.5e-3,
        lr_schedule="onecycle",
        weight_decay=0.0,
        ema_decay=0.998,
    )


def vae_emoji_small() -> TrainConfig:
    """The same autoencoder made sharper on the 64 small concepts; second of the chain."""
    return replace(
        vae_emoji(),
        name="vae_emoji_small",
        model="runs/out/vae_emoji/model",
        data=DataConfig(kind="emoji-images", length=1_000_000, concepts="small", cache=False),
        steps=1700,
        learning_rate=2e-3,
    )


def base_emoji() -> TrainConfig:
    """The miniature's image model: text encoder and spatial layers, from scratch, on still emoji in three styles."""
    return TrainConfig(
        name="base_emoji",
        objective="diffusion",
        trainable="image",
        model="runs/out/vae_emoji_small/model",
        data=DataConfig(kind="emoji-images", length=32_000),
        steps=6_500,
        batch_size=64,
        learning_rate=1e-3,
        lr_schedule="onecycle",
        max_loss_weight=100.0,
        warmup_steps=300,
        sample_every=1500,
        sample_prompts=PROMPTS,
    )


def teacher_emoji() -> TrainConfig:
    """The miniature's temporal layers, on clips, with the image model frozen: the teacher of every distillation."""
    return TrainConfig(
        name="teacher_emoji",
        objective="diffusion",
        trainable="motion",
        model="runs/out/base_emoji/model",
        data=DataConfig(kind="emoji-clips", length=2_000),
        steps=2_200,
        batch_size=4,
        learning_rate=1.5e-3,
        lr_schedule="onecycle",
        max_loss_weight=100.0,
        warmup_steps=100,
        sample_every=1100,
        sample_prompts=MOTION_PROMPTS,
    )
