"""Recipes: functions that return a training run's config; ``animatelcm train NAME --field value`` overrides it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from animatelcm.config import (
    LCM_TARGETS,
    AdapterConfig,
    ConsistencyConfig,
    DataConfig,
    LoraConfig,
    TrainConfig,
)

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
T2I_TARGETS = ("conv_in", "in_conv", "block1", "block2")
"""Every convolution of a T2I-Adapter."""


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
    """Stage 1 on the miniature: consistency distillation of the image model into a LoRA, on clean images."""
    return TrainConfig(
        name="image_lcm_emoji",
        objective="consistency",
        trainable="lora",
        model="runs/out/style_lora_emoji/model",
        data=DataConfig(kind="emoji-images", length=32_000),
        lora=LoraConfig(name="image_lcm", rank=16, alpha=16.0),
        consistency=ConsistencyConfig(w_min=2.0, w_max=4.0),
        steps=1_500,
        batch_size=32,
        learning_rate=1e-3,
        lr_schedule="onecycle",
        weight_decay=0.0,
        text_dropout=0.0,
        warmup_steps=50,
        sample_every=500,
        sample_prompts=PROMPTS,
    )


def video_lcm_emoji() -> TrainConfig:
    """Stage 2 on the miniature: consistency distillation of the temporal layers, stage 1 frozen below them."""
    return TrainConfig(
        name="video_lcm_emoji",
        objective="consistency",
        trainable="motion",
        model="runs/out/image_lcm_emoji/model",
        data=DataConfig(kind="emoji-clips", length=6_000),
        consistency=ConsistencyConfig(w_min=2.0, w_max=4.0),
        steps=1_500,
        batch_size=4,
        learning_rate=5e-4,
        lr_schedule="onecycle",
        timestep_shift=3.0,
        weight_decay=0.0,
        text_dropout=0.0,
        warmup_steps=50,
        sample_every=500,
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


def i2v_images_emoji() -> TrainConfig:
    """An encoder of a picture for the miniature, from scratch: first that a still picture is drawn again.

    What the picture says leaves nothing open, so one step leads all the way back (k = T); a batch holds many pictures.
    """
    config = i2v_emoji()
    return replace(
        config,
        name="i2v_images_emoji",
        model="emoji",
        data=DataConfig(kind="emoji-images", length=12_000),
        adapter=AdapterConfig(name="i2v", kind="image"),
        consistency=replace(config.consistency, k=1000, first_frame=1.0),
        steps=1_200,
        batch_size=32,
        learning_rate=1e-3,
    )


def i2v_emoji() -> TrainConfig:
    """Image-to-video on the miniature: AnimateLCM's encoder of a picture, taught to move without a teacher.

    Few long steps back keep it to what the clips show; many short ones to what the network would draw by itself. The
    first frame counts for as much as all others: it is the one that is given.
    """
    return TrainConfig(
        name="i2v_emoji",
        objective="consistency",
        trainable="adapter",
        model="runs/out/i2v_images_emoji/model",
        data=DataConfig(kind="emoji-clips", length=6_000),
        adapter=AdapterConfig(name="i2v", kind="image", start="model"),
        consistency=ConsistencyConfig(earlier="noise", k=250, huber_c=0.3, first_frame=16.0),
        steps=220,
        batch_size=4,
        learning_rate=4e-4,
        lr_schedule="onecycle",
        weight_decay=0.0,
        ema_decay=0.99,
        text_dropout=0.0,
        warmup_steps=50,
    )


def t2i_adapter_emoji() -> TrainConfig:
    """A T2I-Adapter of the miniature that reads soft edges, on images, beside the many-step model."""
    return TrainConfig(
        name="t2i_adapter_emoji",
        objective="diffusion",
        trainable="adapter",
        model="emoji",
        data=DataConfig(kind="emoji-images", length=12_000),
        adapter=AdapterConfig(name="edge", kind="t2i_adapter"),
        steps=600,
        batch_size=32,
        learning_rate=1e-3,
        lr_schedule="onecycle",
        timestep_shift=2.0,
        max_loss_weight=100.0,
        weight_decay=0.0,
        ema_decay=0.99,
        warmup_steps=50,
    )


def t2i_adapter_depth_emoji() -> TrainConfig:
    """The same for the renderer's depth: how near each pixel's thing is."""
    config = t2i_adapter_emoji()
    adapter = AdapterConfig(name="depth", kind="t2i_adapter")
    return replace(config, name="t2i_adapter_depth_emoji", adapter=adapter)


def controlnet_emoji() -> TrainConfig:
    """A ControlNet of the miniature that reads keypoints, on images, beside the many-step model."""
    config = t2i_adapter_emoji()
    adapter = AdapterConfig(name="pose", kind="controlnet")
    return replace(config, name="controlnet_emoji", adapter=adapter, learning_rate=5e-4)


def t2i_adapter_lora_emoji() -> TrainConfig:
    """The T2I-Adapter made fit for few-step videos: LoRA layers on it, learned on clips without a teacher."""
    return replace(
        i2v_emoji(),
        name="t2i_adapter_lora_emoji",
        model="runs/out/t2i_adapter_emoji/model",
        adapter=t2i_adapter_emoji().adapter,
        lora=LoraConfig(name="edge", rank=16, alpha=16.0, targets=T2I_TARGETS),
        consistency=ConsistencyConfig(earlier="noise", k=300, huber_c=0.3),
        steps=400,
        learning_rate=5e-4,
    )


def controlnet_lora_emoji() -> TrainConfig:
    """The ControlNet made fit for few steps, without a teacher too: it hears whether the frames that come of noise show
    things where it was told. Images do: places are learned from them, and many fit into a batch.
    """
    guided = ConsistencyConfig(earlier="guided-noise", w_min=1.0, w_max=3.0, k=100, huber_c=0.3)
    return replace(
        t2i_adapter_lora_emoji(),
        name="controlnet_lora_emoji",
        model="runs/out/controlnet_emoji/model",
        data=DataConfig(kind="emoji-images", length=12_000),
        adapter=controlnet_emoji().adapter,
        lora=LoraConfig(name="pose", rank=16, alpha=16.0, targets=LCM_TARGETS[:10]),
        consistency=replace(guided, feedback=2.0),
        steps=300,
        batch_size=32,
        learning_rate=1e-3,
    )


SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD15_PROMPTS = (
    "a red fox in the snow, close up",
    "a lighthouse on a cliff at sunset",
    "an old man with a hat plays the guitar",
    "waves on a beach, seen from above",
)
ADAM = (0.9, 0.999)
"""AdamW's betas in public scripts of latent consistency distillation."""


def style_lora_sd15() -> TrainConfig:
    """A style LoRA of Stable Diffusion 1.5 from a folder of captioned images: kohya's usual layers and sizes."""
    return TrainConfig(
        name="style_lora_sd15",
        objective="diffusion",
        trainable="lora",
        model=SD15,
        data=DataConfig(kind="folder", path=Path("data/style"), width=512, height=512, num_frames=1),
        lora=LoraConfig(rank=32, alpha=16.0, targets=LCM_TARGETS[:8]),
        steps=3_000,
        batch_size=4,
        learning_rate=1e-4,
        betas=ADAM,
        sample_every=500,
        sample_prompts=SD15_PROMPTS,
        mixed_precision="bf16",
        gradient_checkpointing=True,
    )


def image_lcm_sd15() -> TrainConfig:
    """Stage 1 on Stable Diffusion 1.5: LCM-LoRA's settings (rank 64, w in 5..15, N = 50) under AnimateDiff's noise."""
    return TrainConfig(
        name="image_lcm_sd15",
        objective="consistency",
        trainable="lora",
        model=SD15,
        beta_schedule="linear",
        data=DataConfig(kind="folder", path=Path("data/images"), width=512, height=512, num_frames=1),
        lora=LoraConfig(name="image_lcm", rank=64, alpha=8.0),
        steps=10_000,
        batch_size=16,
        learning_rate=1e-4,
        betas=ADAM,
        sample_every=500,
        sample_prompts=SD15_PROMPTS,
        text_dropout=0.0,
        mixed_precision="fp16",
        gradient_checkpointing=True,
    )


def video_lcm_sd15() -> TrainConfig:
    """Stage 2 as the paper has it: 16 frames of 512x512, N = 50, AnimateDiff's temporal layers as the teacher, who saw
    each fourth frame.
    """
    return TrainConfig(
        name="video_lcm_sd15",
        objective="consistency",
        trainable="motion",
        model="runs/out/image_lcm_sd15/model",
        motion=Path("data/animatediff-motion-adapter-v1-5-2"),
        beta_schedule="linear",
        data=DataConfig(kind="folder", path=Path("data/videos"), width=512, height=512, num_frames=16, frame_stride=4),
        steps=50_000,
        batch_size=1,
        learning_rate=5e-6,
        betas=ADAM,
        sample_every=1_000,
        sample_prompts=SD15_PROMPTS,
        text_dropout=0.0,
        mixed_precision="fp16",
        gradient_checkpointing=True,
    )


def video_lcm_sd15_n100() -> TrainConfig:
    """Stage 2 on the grid of the released weights: N = 100 (4 steps: 999, 749, 499, 249)."""
    config = video_lcm_sd15()
    return replace(config, name="video_lcm_sd15_n100", consistency=replace(config.consistency, solver_steps=100))


def i2v_sd15() -> TrainConfig:
    """Image-to-video on Stable Diffusion 1.5: AnimateLCM's encoder, from scratch, on its grid (N = 200)."""
    config = video_lcm_sd15()
    return replace(
        config,
        name="i2v_sd15",
        trainable="adapter",
        model="runs/out/video_lcm_sd15/model",
        motion=None,
        adapter=AdapterConfig(name="i2v", kind="image"),
        consistency=ConsistencyConfig(earlier="noise", solver_steps=200, k=60, huber_c=0.3),
        learning_rate=1e-5,
        sample_prompts=(),
    )


def controlnet_lora_sd15() -> TrainConfig:
    """A ControlNet for canny edges, put into the model folder's adapters/canny, made fit for few-step videos."""
    return replace(
        i2v_sd15(),
        name="controlnet_lora_sd15",
        adapter=AdapterConfig(name="canny", kind="controlnet"),
        consistency=ConsistencyConfig(earlier="noise", huber_c=0.3),
        lora=LoraConfig(name="canny", rank=64, alpha=64.0, targets=LCM_TARGETS[:10]),
    )
