"""Stable Diffusion 1.5, on folders of your own: the papers' settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from animatelcm.config import LCM_TARGETS, AdapterConfig, ConsistencyConfig, DataConfig, LoraConfig, TrainConfig

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
