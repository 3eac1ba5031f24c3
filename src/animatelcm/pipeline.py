"""The door that users of diffusers expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from animatelcm.bundle import load
from animatelcm.model import VideoModel
from animatelcm.request import SampleRequest, Video
from animatelcm.sampling import sample


class Pipeline:
    """``Pipeline.from_pretrained("emoji")("a parrot", num_inference_steps=25)`` -> ``[Video]``."""

    def __init__(self, model: VideoModel) -> None:
        self.model = model

    @classmethod
    def from_pretrained(cls, source: str | Path = "emoji", *, device: str = "cpu") -> Pipeline:
        """Load "emoji", a folder or a hub id. Raises ValueError where there is none."""
        return cls(load(source, device=device))

    def to(self, device: str | torch.device) -> Pipeline:
        """Move every network."""
        self.model.to(device)
        return self

    def __call__(self, prompt: str, **request: Any) -> list[Video]:  # noqa: ANN401 - SampleRequest's fields
        """Videos of a prompt; keywords are ``SampleRequest``'s fields, and an unknown one is a TypeError."""
        return sample(self.model, SampleRequest(prompt=prompt, **request))
