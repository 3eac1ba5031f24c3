"""The miniature, from data to bundle: autoencoder, image model, teacher, style, and both stages of distillation."""

from __future__ import annotations

from dataclasses import replace

from animatelcm.config import ConsistencyConfig, DataConfig, LoraConfig, TrainConfig

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


def vae_decoder_emoji() -> TrainConfig:
    """Its decoder alone, for longer: latents stay as they are, and what was learned on them; frames get sharper.

    As sd-vae-ft-mse continued Stable Diffusion's. Third of the chain, but it can run after any other stage as well.
    """
    return replace(
        vae_emoji_small(),
        name="vae_decoder_emoji",
        trainable="decoder",
        model="runs/out/vae_emoji_small/model",
        steps=6_000,
        learning_rate=1e-3,
        warmup_steps=100,
    )


def base_emoji() -> TrainConfig:
    """The miniature's image model: text encoder and spatial layers, from scratch, on still emoji in three styles."""
    return TrainConfig(
        name="base_emoji",
        objective="diffusion",
        trainable="image",
        model="runs/out/vae_decoder_emoji/model",
        data=DataConfig(kind="emoji-images", length=32_000),
        steps=6_500,
        batch_size=64,
        learning_rate=1e-3,
        lr_schedule="onecycle",
        max_loss_weight=100.0,
        word_weight=0.1,
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
        data=DataConfig(kind="emoji-clips", length=6_000),
        steps=8_000,
        batch_size=4,
        learning_rate=1.5e-3,
        lr_schedule="onecycle",
        timestep_shift=5.0,
        max_loss_weight=100.0,
        warmup_steps=100,
        sample_every=2000,
        sample_prompts=MOTION_PROMPTS,
    )


def style_lora_emoji() -> TrainConfig:
    """A personal style of the miniature: a LoRA on the image model, from still images of a style it never saw."""
    return TrainConfig(
        name="style_lora_emoji",
        objective="diffusion",
        trainable="lora",
        model="runs/out/teacher_emoji/model",
        data=DataConfig(kind="emoji-images", length=8_000, styles=("twemoji",), moments=0.0),
        lora=LoraConfig(name="twemoji", rank=16, alpha=16.0),
        steps=800,
        batch_size=32,
        learning_rate=2e-3,
        lr_schedule="onecycle",
        weight_decay=0.0,
        max_loss_weight=100.0,
        warmup_steps=50,
        sample_every=400,
        sample_prompts=PROMPTS,
    )


def image_lcm_emoji() -> TrainConfig:
    """Stage 1 on the miniature: consistency distillation of the image model into a LoRA, on clean images.

    Longer shows subjects of single images more often in one and two evaluations, in four no more often (docs/log.md).
    """
    return TrainConfig(
        name="image_lcm_emoji",
        objective="consistency",
        trainable="lora",
        model="runs/out/style_lora_emoji/model",
        data=DataConfig(kind="emoji-images", length=19_200),
        lora=LoraConfig(name="image_lcm", rank=16, alpha=16.0),
        consistency=ConsistencyConfig(w_min=2.0, w_max=4.0),
        steps=300,
        batch_size=32,
        learning_rate=1e-3,
        lr_schedule="onecycle",
        weight_decay=0.0,
        text_dropout=0.0,
        warmup_steps=50,
        save_every=60,
        sample_every=150,
        sample_prompts=PROMPTS,
    )


def video_lcm_emoji() -> TrainConfig:
    """Stage 2 on the miniature: consistency distillation of the temporal layers, stage 1 frozen below them."""
    return TrainConfig(
        name="video_lcm_emoji",
        objective="consistency",
        trainable="motion",
        model="runs/out/image_lcm_emoji/model",
        data=DataConfig(kind="emoji-clips", length=2_400),
        consistency=ConsistencyConfig(w_min=2.0, w_max=4.0),
        steps=240,
        batch_size=4,
        learning_rate=5e-4,
        lr_schedule="onecycle",
        timestep_shift=3.0,
        weight_decay=0.0,
        text_dropout=0.0,
        warmup_steps=50,
        save_every=60,
        sample_every=120,
        sample_prompts=MOTION_PROMPTS,
    )


def video_lcm_coupled_emoji() -> TrainConfig:
    """The papers' "without decoupling": LoRA and temporal layers learned together, on videos, from the same teacher."""
    config = video_lcm_emoji()
    return replace(
        config,
        name="video_lcm_coupled_emoji",
        model="runs/out/style_lora_emoji/model",
        lora=image_lcm_emoji().lora,
        consistency=replace(config.consistency, decouple=False),
    )
