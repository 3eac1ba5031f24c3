"""What a motion module written here says of itself in its header: shape, noise, grid, settings.

One JSON object under ``animatelcm`` in a safetensors file's metadata; other tools pass over it. It is read as a
stranger's: known keys alone, each of its type and within its range.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from animatelcm.weights.files import read_metadata

KEY = "animatelcm"
MOTION = {
    "motion_num_attention_heads": int,
    "motion_norm_num_groups": int,
    "motion_max_seq_length": int,
    "motion_norm": str,
}
NOISE = {"beta_schedule": str, "beta_start": float, "beta_end": float, "solver_steps": int}
SAMPLING = {"num_inference_steps": int, "guidance_scale": float, "sampler": str}
IMAGE_ENCODER = {"motion_scale": float}
RANGES = {
    "motion_num_attention_heads": (1, 128),
    "motion_norm_num_groups": (1, 1024),
    "motion_max_seq_length": (1, 1024),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "solver_steps": (1, 1000),
    "num_inference_steps": (1, 1000),
    "guidance_scale": (1, 100),
    "motion_scale": (0, 4),
}
WORDS = {
    "motion_norm": ("per_frame", "joint"),
    "beta_schedule": ("linear", "scaled_linear"),
    "sampler": ("lcm", "ddim", "dpm++"),
}


@dataclass(frozen=True, kw_only=True)
class MotionFacts:
    """What is not in the tensors; empty mappings where a file says nothing."""

    motion: Mapping[str, int | str] = field(default_factory=dict)
    """Settings of a diffusers ``MotionAdapter``, and ``motion_norm``."""
    noise: Mapping[str, float | str] = field(default_factory=dict)
    """Fields of ``NoiseSchedule``."""
    sampling: Mapping[str, float | str] = field(default_factory=dict)
    """Fields of ``Facts``."""
    image_encoder: Mapping[str, float | str] = field(default_factory=dict)
    """Fields of ``ImageEncoderConfig``, where a file holds an image encoder."""
    positions: bool = True
    """Whether the module's file in AnimateDiff's layout holds positions; AnimateLCM's does not."""

    def to_metadata(self) -> dict[str, str]:
        """The header entry of a file."""
        found = {name: dict(part) for name in _PARTS if (part := getattr(self, name))}
        return {KEY: json.dumps({**found, "positions": self.positions})}


def read_facts(file: Path) -> MotionFacts | None:
    """What a file says of itself; None where it says nothing, or is no safetensors file.

    Raises ValueError naming the file where an entry is there and not of this form.
    """
    text = read_metadata(file).get(KEY, "") if file.suffix.lower() == ".safetensors" else ""
    if not text:
        return None
    try:
        said = json.loads(text)
        parts = {name: _checked(said.get(name, {}), known) for name, known in _PARTS.items()}
        return MotionFacts(**parts, positions=bool(said.get("positions", True)))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: what its header says under {KEY!r} is damaged ({error}); fetch it again") from error


_PARTS = {"motion": MOTION, "noise": NOISE, "sampling": SAMPLING, "image_encoder": IMAGE_ENCODER}


def _checked(part: Mapping[str, object], known: Mapping[str, type]) -> dict[str, float | str]:
    """Known entries; ValueError for one of another type or out of its range."""
    found: dict[str, float | str] = {}
    for name, kind in known.items():
        if name not in part:
            continue
        value = part[name]
        allowed = (int, float) if kind is float else kind
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError(f"{name}={value!r} is no {kind.__name__}")
        low, high = RANGES.get(name, (None, None))
        if low is not None and not low <= value <= high:
            raise ValueError(f"{name}={value!r} is out of {low}..{high}")
        if name in WORDS and value not in WORDS[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(WORDS[name])}")
        found[name] = value
    return found
