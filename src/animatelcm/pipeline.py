"""The door that users of diffusers expect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from animatelcm.assembly import load_sum
from animatelcm.model import VideoModel
from animatelcm.request import ModelSource, SampleRequest, Video
from animatelcm.sampling import sample


class Pipeline:
    """``Pipeline.from_pretrained("emoji")("a parrot", num_inference_steps=25)`` -> ``[Video]``."""

    def __init__(self, model: VideoModel) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "emoji",
        *,
        motion: str | Path | None = None,
        loras: Sequence[str | Path | tuple[str | Path, float]] = (),
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        keep: bool = True,
        **options: Any,  # noqa: ANN401 - ModelSource's other fields
    ) -> Pipeline:
        """A base ("emoji", a folder, a checkpoint, a hub id), temporal layers and LoRAs, each a file or (file, scale).

        ``options`` are ``ModelSource``'s other fields; an unknown one is a TypeError. Without ``keep`` the LoRAs cannot
        be taken out again, which saves the memory of what they change. Raises ValueError naming what is missing.
        """
        style = tuple(f"{lora[0]}:{lora[1]!r}" if isinstance(lora, tuple) else str(lora) for lora in loras)
        described = ModelSource(model=str(source), motion=str(motion or ""), style=style, **options)
        return cls(load_sum(described, device=device, dtype=dtype, keep=keep))

    def to(self, device: str | torch.device) -> Pipeline:
        """Move every network."""
        self.model.to(device)
        return self

    def __call__(self, prompt: str, **request: Any) -> list[Video]:  # noqa: ANN401 - SampleRequest's fields
        """Videos of a prompt; keywords are ``SampleRequest``'s fields, and an unknown one is a TypeError."""
        return sample(self.model, SampleRequest(prompt=prompt, **request))
