"""Stable Diffusion 1.5's shapes: latents of an eighth of the picture's side, 77 tokens of 768 numbers."""

from __future__ import annotations

from animatelcm.nets.motion import MotionConfig

TOKENS = 77
UNET = {"sample_size": 64, "cross_attention_dim": 768}
MOTION = MotionConfig()
DOWNSCALE = 8
