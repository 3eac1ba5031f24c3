"""CLIPSIM (Wu et al. 2021): 100 times the cosine of CLIP's embeddings of a frame and of the prompt, the mean over a
video's frames, and over videos. Negative cosines stay negative.

Papers that AnimateLCM is compared with take CLIP ViT-H/14 of LAION-2B, ``MODEL``. Frames are prepared as CLIP's own
are: shorter side to 224 by Pillow's bicubic filter, the middle cut out, CLIP's mean and deviation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from animatelcm import hub
from animatelcm.building import empty_weights, filled, read_json
from animatelcm.evaluate.bootstrap import interval
from animatelcm.evaluate.folders import Reel, prompted
from animatelcm.evaluate.judge import Progress, silent
from animatelcm.evaluate.report import facts_hash
from animatelcm.evaluate.score import Score, Scored, check_counts
from animatelcm.evaluate.viewing import kept_score, measured, mixtures
from animatelcm.images import checked_pixels
from animatelcm.tokenizer import Tokenizer
from animatelcm.weights.files import find_copy, read_state, sha256

if TYPE_CHECKING:
    from transformers import CLIPModel

VERSION = 1  # of the protocol: to be raised by whoever changes what the figure is
MODEL = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILES = ["*.json", "merges.txt", "model*.safetensors", "pytorch_model*.bin"]
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(NamedTuple):
    """A trained CLIP with its tokenizer."""

    network: CLIPModel
    tokenizer: Tokenizer
    facts: dict[str, Any]
    """Which one: the SHA-256 of its weight file, and how frames are prepared for it."""

    @property
    def side(self) -> int:
        """Of a picture, in pixels."""
        return self.network.config.vision_config.image_size

    @torch.inference_mode()
    def of_texts(self, texts: Iterable[str]) -> Tensor:
        """N texts, cut at the tokenizer's length -> float32 (N, D), of length 1."""
        seen = self.network.text_model(input_ids=self.tokenizer(list(texts)).to(self.network.device))
        return F.normalize(self.network.text_projection(seen.pooler_output), dim=1)

    @torch.inference_mode()
    def of_frames(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 (F, H, W, 3) -> float32 (F, D), of length 1."""
        seen = self.network.vision_model(pixel_values=pixels(frames, self.side).to(self.network.device))
        return F.normalize(self.network.visual_projection(seen.pooler_output), dim=1)


def load_clip(source: str | Path = MODEL, device: str | torch.device = "cpu") -> Clip:
    """CLIP in transformers' layout from a folder or a hub id, in float32.

    Raises ValueError where it is neither, or the folder has no whole CLIP.
    """
    from transformers import CLIPConfig, CLIPModel

    folder = hub.find(source, FILES)
    file = find_copy(folder, "model") or find_copy(folder, "pytorch_model")
    if file is None:
        raise ValueError(f"{folder} has no model.safetensors; give a folder of transformers' CLIPModel, or a hub id")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise ValueError(f"{folder} is a {config.get('model_type')!r}; give a CLIP, such as {MODEL!r}")
    with empty_weights():
        network = CLIPModel(CLIPConfig(**config))
    state = {key: value for key, value in read_state(file).items() if not key.endswith("position_ids")}
    network = filled(network, state, torch.float32, str(file)).to(device)
    facts = {"network": "CLIP", "weights": sha256(file), "resize": "Pillow's bicubic, shorter side, middle cut out"}
    return Clip(network, Tokenizer.from_folder(folder), facts | {"side": network.config.vision_config.image_size})


def similarities(
    clip: Clip,
    videos: Iterable[np.ndarray],
    prompts: Iterable[str],
    *,
    batch: int = 16,
    names: Sequence[object] | None = None,
) -> Tensor:
    """100 times the mean cosine of all frames of each video, uint8 (F, H, W, 3), and its prompt: float64 (N,).

    Videos are taken one by one, ``batch`` frames at a time. Raises ValueError where there are more of one than of the
    other, or naming a video, by ``names`` or counted from 0, whose embeddings are not finite.
    """
    found = []
    for number, (video, prompt) in enumerate(zip_longest(videos, prompts)):
        if video is None or prompt is None:
            raise ValueError(f"there are {number} {'videos' if video is None else 'prompts'}, and more of the other")
        text, groups = clip.of_texts([prompt]), range(0, len(checked_pixels(video, 4)), batch)
        cosines = torch.cat([clip.of_frames(video[i : i + batch]) @ text[0] for i in groups])
        found.append(100 * cosines.double().mean().cpu())
        if not found[-1].isfinite():
            name = f"video {number}" if names is None else names[number]
            raise ValueError(f"{name}: its embedding or its prompt's is NaN or infinite; check CLIP's weights")
    return torch.stack(found) if found else torch.empty(0, dtype=torch.float64)


def clipsim(
    values: Tensor, clip: Clip, *, about: Mapping[str, Any] | None = None, resamples: int = 1000, seed: int = 0
) -> Score:
    """The mean of ``similarities`` (N,), with its 95 % interval over videos.

    ``about`` is what else the figure depends on (prompts, seeds), as JSON's types; it goes into the protocol's hash.
    """
    return Score(
        metric="CLIPSIM",
        value=_mean(values),
        interval=interval(_mean, values, resamples=resamples, seed=seed),
        n={"generated": len(values)},
        facts={**(about or {}), **facts(clip), "n": [len(values)]},
    )


def facts(clip: Clip) -> dict[str, Any]:
    """What similarities depend on beside videos and prompts."""
    return {**clip.facts, "metric": "CLIPSIM", "version": VERSION, "scale": 100, "frames": "all"}


def of_folders(
    clip: Clip,
    folders: Sequence[Path],
    *,
    prompts: Path | None = None,
    mixed: bool = False,
    keep: Path | None = None,
    progress: Progress = silent,
) -> Scored:
    """The similarity of each folder's videos to their prompts, which ``folders.prompted`` finds; kept in ``keep``.

    Raises ValueError where folders have different prompts, whose figures do not compare, unless ``mixed`` is said.
    """
    reels = [prompted(folder, prompts) for folder in dict.fromkeys(folders)]
    check_counts({str(one.place): len(one.files) for one in reels}, mixed)
    if len({said_hash(one) for one in reels}) > 1 and not mixed:
        raise ValueError(
            f"{reels[0].place} and others have different prompts, so their figures do not compare; ask all for the "
            "same, or say mixed"
        )
    return of_reels(clip, reels, keep=keep, progress=progress)


def of_reels(clip: Clip, reels: Sequence[Reel], *, keep: Path | None = None, progress: Progress = silent) -> Scored:
    """The same of videos whose prompts are known."""
    scores, met, remarks = {}, {}, []
    for one in reels:
        name, about = str(one.place), {"prompts": said_hash(one)}
        measure = partial(similarities, clip, prompts=one.prompts, names=one.files)
        asked = {**facts(clip), "prompts": one.prompts}
        values, met[name] = measured(one, asked, measure, keep=keep, progress=progress)
        make = partial(clipsim, values, clip, about=about)
        scores[name] = [kept_score(keep, {**facts(clip), **about}, [values], make)]
        remarks += one.remarks
    return Scored(scores, remarks + mixtures(met), {})


def said_hash(one: Reel) -> str:
    """Of the prompts, whatever their order."""
    return facts_hash({"prompts": sorted(one.prompts)})


def pixels(frames: np.ndarray, side: int = 224) -> Tensor:
    """Frames uint8 (F, H, W, 3) as CLIP sees them: float32 (F, 3, side, side), each channel about -2..2."""
    height, width = checked_pixels(frames, 4).shape[1:3]
    shorter = min(height, width)
    size = [int(side * length / shorter) for length in (width, height)]
    left, top = ((length - side) // 2 for length in size)
    box = (left, top, left + side, top + side)
    cut = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC).crop(box) for frame in frames]
    scaled = torch.from_numpy(np.stack([np.asarray(picture) for picture in cut])).permute(0, 3, 1, 2) / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def _mean(values: Tensor) -> float:
    return float(values.mean())
