"""The miniature's shapes: a Stable Diffusion of 11 million parameters in the same classes and file layout.

64x64 pixels, latents 8x8x16 (as in Stable Diffusion the autoencoder divides each side by 8), 16 frames at 8 fps.
"""

from __future__ import annotations

from animatelcm.nets.motion import MotionConfig

PIXELS = 64
FRAMES = 16
TOKENS = 32
VOCABULARY = 1536
TEXT_WIDTH = 128
LATENT_NOISE = 0.15
"""Standard deviation of the noise that latents (variance 1) are decoded with: it keeps the latent space smooth."""

UNET = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": (96, 160),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
}
MOTION = MotionConfig(num_attention_heads=4)
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 96, 128),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 16,
    "sample_size": PIXELS,
    "scaling_factor": 1.0,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
}
