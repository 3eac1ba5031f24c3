"""The door that users of diffusers expect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from animatelcm import decoding
from animatelcm.condition import Control, read, with_pixels
from animatelcm.memory import load_for
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource, Offload
from animatelcm.provenance import Video
from animatelcm.request import SampleRequest, check_seed
from animatelcm.sampling import drafts, warn_of

if TYPE_CHECKING:
    from PIL.Image import Image

SAME = {
    "motion_adapter": "motion",
    "lora": "loras",
    "style": "loras",
    "style_lora": "loras",
    "model": "source",
    "conditioning_frames": "control",
    "steps": "num_inference_steps",
    "num_images_per_prompt": "num_videos_per_prompt",
    "ip_adapter_image": "image",
}
"""Names that users know from elsewhere, which are not like ours."""


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
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        keep: bool = True,
        offload: Offload = "auto",
        **options: Any,  # noqa: ANN401 - ModelSource's other fields
    ) -> Pipeline:
        """A base ("emoji", a folder, a checkpoint, a hub id), temporal layers and LoRAs, each a file or (file, scale).

        ``dtype``, or ``torch_dtype``, as diffusers has called it: float32 where neither is given. ``options`` are
        ``ModelSource``'s other fields. Without ``keep`` the LoRAs cannot be taken out again, which saves the memory of
        what they change. ``offload``: whether networks wait on the CPU while others work; "auto": where the device's
        memory is short. Raises ValueError naming what is missing, TypeError for an argument that is not known.
        """
        if dtype is not None and torch_dtype not in (None, dtype):
            raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} are one setting; give it once")
        _check_known("from_pretrained", options, cls.from_pretrained, ModelSource, without=("model", "style"))
        dtype = dtype or torch_dtype or torch.float32
        style = tuple(f"{lora[0]}:{lora[1]!r}" if isinstance(lora, tuple) else str(lora) for lora in loras)
        described = ModelSource(model=str(source), motion=str(motion or ""), style=style, **options)
        return cls(load_for(described, device=device, offload=offload, dtype=dtype, keep=keep), offload)

    def to(self, device: str | torch.device) -> Pipeline:
        """Move every network."""
        self.model.to(device)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        generator: torch.Generator | None = None,
        image: str | Path | Image | np.ndarray | None = None,
        control: Mapping[str, np.ndarray] | Sequence[str | Control] = (),
        video: str | Path | np.ndarray | None = None,
        **request: Any,  # noqa: ANN401 - SampleRequest's other fields
    ) -> list[Video]:
        """Videos of a prompt, or of each of a list's in their order; other keywords are ``SampleRequest``'s fields.

        ``seed`` is the first video's, and all others count on from it: the j-th of ``num_videos_per_prompt = n`` videos
        of prompt i has ``seed + n * i + j``. ``negative_prompt`` is one for all, or one for each. ``generator``, of the
        CPU, gives its ``initial_seed() % 2**63`` as the seed: a call draws nothing from it, so two calls make the same
        videos.
        ``image``, ``control`` and ``video`` take files, or pixels: a PIL image or uint8 (H, W, 3), a uint8 (F, H, W, 3)
        to begin from, and of controls ``{"edge": frames}``, from which maps are made, or ``Control``s with maps that
        are ready (``condition.with_pixels``). Pixels are not in the request that a video carries. What is asked for in
        vain is warned of (``request.unused``). Raises ValueError for a value out of range, TypeError for a keyword that
        is not known.
        """
        _check_known("a pipeline", request, Pipeline.__call__, SampleRequest)
        if generator is not None:
            request = _with_seed_of(generator, request)
        prompts, negatives = _paired(prompt, negative_prompt)
        listed = () if isinstance(control, Mapping) else control
        texts = tuple(part for part in listed if isinstance(part, str))
        parts = [part for part in listed if not isinstance(part, str)]
        files = {"image": image, "video": video}
        files = {name: str(value) for name, value in files.items() if isinstance(value, str | Path)}
        first = SampleRequest(prompt=prompts[0], negative_prompt=negatives[0], control=texts, **files, **request)
        first = first.resolved(self.model.facts, self.model.downscale)
        check_seed(first.seed, len(prompts) * first.num_videos_per_prompt)
        condition = with_pixels(
            read(first, self.model),
            first,
            image=None if isinstance(image, str | Path) else image,
            control=control if isinstance(control, Mapping) else parts,
            video=None if isinstance(video, str | Path) else video,
        )
        warn_of(first, condition, stacklevel=3)
        made = []
        for i, (text, negative) in enumerate(zip(prompts, negatives, strict=True)):
            seed = first.seed + i * first.num_videos_per_prompt
            asked = replace(first, prompt=text, negative_prompt=negative, seed=seed)
            with closing(drafts(self.model, asked, condition=condition, offload=self.offload)) as coming:
                made += [decoding.whole(self.model, draft) for draft in coming]
        return made


def _paired(prompt: str | Sequence[str], negative: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts and as many negative ones. Raises ValueError where there are none, or not as many."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts or len(negatives) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(negatives)} negative ones; give as many, or one for all")
    if strange := [text for text in prompts + negatives if not isinstance(text, str)]:
        raise ValueError(f"a prompt is text, and {strange[0]!r} is none; give a string, or a list of them")
    return prompts, negatives


def _with_seed_of(generator: torch.Generator, request: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a request with a generator's seed. Raises ValueError where that is not the only one."""
    said = "give one of the CPU, such as torch.Generator().manual_seed(3), or seed=3"
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is a {type(generator).__name__}; {said}")
    if generator.device.type != "cpu" or "seed" in request:
        what = "generator and seed are one setting" if "seed" in request else f"generator is on {generator.device}"
        raise ValueError(f"{what}; {said}")
    return {**request, "seed": generator.initial_seed() % 2**63}


def _check_known(
    name: str, given: Iterable[str], function: Callable[..., Any], fields_of: type, *, without: Collection[str] = ()
) -> None:
    """Raises TypeError naming the known argument that is most like the first unknown one."""
    named = {key for key, found in signature(function).parameters.items() if found.kind != found.VAR_KEYWORD}
    known = (named | {field.name for field in fields(fields_of)}) - {"self", *without}
    for key in given:
        if key not in known:
            near = get_close_matches(SAME.get(key, key), sorted(known), 1, 0.5)
            meant = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known))}"
            raise TypeError(f"{name} takes no argument {key!r}; {meant}")
