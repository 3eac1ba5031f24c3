"""Stable Diffusion 1.x's shapes: latents of an eighth of the picture's side, 77 tokens of 768 numbers."""

from __future__ import annotations

from animatelcm.nets.motion import MotionConfig

TOKENS = 77
UNET = {"sample_size": 64, "cross_attention_dim": 768}
MOTION = MotionConfig()
DOWNSCALE = 8
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TEXT = {
    "vocab_size": 49_408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49_406,
    "eos_token_id": 49_407,
}
"""CLIP ViT-L/14's text encoder."""
