"""Motion modules with random numbers, by our names and as others keep them: what the tests of their files write."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import MotionAdapter

import standins
from animatelcm.weights.files import State
from animatelcm.weights.keys import Structure, to_diffusers
from animatelcm.weights.motion import MotionFile

SMALL = (32, 32, 64, 32)
TINY = (32, 64)
Q = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight"
PE = Q.replace("to_q.weight", "pos_encoder.pe")
OURS = "down_blocks.0.motion_modules.0.transformer_blocks.0"


def same_bits(ours: State, theirs: State) -> bool:
    assert ours.keys() == theirs.keys()
    pairs = [(ours[key], theirs[key]) for key in ours]
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def expected(state: State) -> tuple[State, State]:
    """What a file in AnimateDiff's layout holds, by our names: motion weights, image encoder."""
    weights = {to_diffusers(key): value for key, value in state.items() if "motion_modules" in key and "pe" not in key}
    encoder = {key.removeprefix("img_encoder."): value for key, value in state.items() if key.startswith("img_")}
    return weights, encoder


def ours(path: Path, *, rows: int | None = None, channels: tuple[int, ...] = TINY) -> MotionFile:
    """Random motion modules by our names, as if from a file."""
    state, encoder = expected(standins.fill(standins.animatelcm_i2v(channels), seed=3))
    facts = {"structure": Structure(channels, 2, True), "layout": "animatediff", "rows": rows}
    return MotionFile(state=state, image_encoder=encoder, **facts)


def adapter_folder(folder: Path) -> Path:
    """What diffusers saves of a motion adapter."""
    MotionAdapter(block_out_channels=TINY).save_pretrained(folder)
    return folder
