"""The door that users of diffusers expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from animatelcm.condition import Control, read, with_pixels
from animatelcm.memory import load_for
from animatelcm.model import VideoModel
from animatelcm.request import ModelSource, Offload, SampleRequest, Video
from animatelcm.sampling import sample

if TYPE_CHECKING:
    from PIL.Image import Image


class Pipeline:
    """``Pipeline.from_pretrained("emoji")("a parrot", num_inference_steps=25)`` -> ``[Video]``."""

    def __init__(self, model: VideoModel, offload: Offload = "auto") -> None:
        self.model, self.offload = model, offload

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
        offload: Offload = "auto",
        **options: Any,  # noqa: ANN401 - ModelSource's other fields
    ) -> Pipeline:
        """A base ("emoji", a folder, a checkpoint, a hub id), temporal layers and LoRAs, each a file or (file, scale).

        ``options`` are ``ModelSource``'s other fields; an unknown one is a TypeError. Without ``keep`` the LoRAs cannot
        be taken out again, which saves the memory of what they change. ``offload``: whether networks wait on the CPU
        while others work; "auto": where the device's memory is short. Raises ValueError naming what is missing.
        """
        style = tuple(f"{lora[0]}:{lora[1]!r}" if isinstance(lora, tuple) else str(lora) for lora in loras)
        described = ModelSource(model=str(source), motion=str(motion or ""), style=style, **options)
        return cls(load_for(described, device=device, offload=offload, dtype=dtype, keep=keep), offload)

    def to(self, device: str | torch.device) -> Pipeline:
        """Move every network."""
        self.model.to(device)
        return self

    def __call__(
        self,
        prompt: str,
        *,
        image: str | Path | Image | np.ndarray | None = None,
        control: Mapping[str, np.ndarray] | Sequence[str | Control] = (),
        video: str | Path | np.ndarray | None = None,
        **request: Any,  # noqa: ANN401 - SampleRequest's other fields
    ) -> list[Video]:
        """Videos of a prompt; keywords are ``SampleRequest``'s fields, and an unknown one is a TypeError.

        ``image``, ``control`` and ``video`` take files, or pixels: a PIL image or uint8 (H, W, 3), a uint8 (F, H, W, 3)
        to begin from, and of controls ``{"edge": frames}``, from which maps are made, or ``Control``s with maps that
        are ready (``condition.with_pixels``). Pixels are not in the request that a video carries.
        """
        listed = () if isinstance(control, Mapping) else control
        texts = tuple(part for part in listed if isinstance(part, str))
        parts = [part for part in listed if not isinstance(part, str)]
        files = {"image": image, "video": video}
        files = {name: str(value) for name, value in files.items() if isinstance(value, str | Path)}
        asked = SampleRequest(prompt=prompt, control=texts, **files, **request)
        asked = asked.resolved(self.model.facts, self.model.downscale)
        condition = with_pixels(
            read(asked, self.model),
            asked,
            image=None if isinstance(image, str | Path) else image,
            control=control if isinstance(control, Mapping) else parts,
            video=None if isinstance(video, str | Path) else video,
        )
        return sample(self.model, asked, condition=condition, offload=self.offload)
