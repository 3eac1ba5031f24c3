"""How good are the miniature's clips? Every setting and kind of prompt is one row of figures, measured once.

Prompts are the captions of clips from a seed that no recipe trains on; prompt i is sampled with seed i, at the model's
own size and length. What figures are is in ``judge``.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import animatelcm
from animatelcm import video
from animatelcm.adapters import IMAGE, lacking, settings_of
from animatelcm.data.batches import to_pixels
from animatelcm.data.emoji import Shot, drawn
from animatelcm.data.sprites import CLIP_FRAMES, SpritePack
from animatelcm.evaluate import steered
from animatelcm.evaluate.bootstrap import average, ends
from animatelcm.evaluate.judge import Judge, Progress, Protocol, silent
from animatelcm.evaluate.paired import keep_samples, samples_path
from animatelcm.evaluate.prompts import SHEET, prompts
from animatelcm.evaluate.report import Kind, Row, Steer, facts_hash, read_row, row_path, write_row
from animatelcm.evaluate.takes import Take, keep_clips
from animatelcm.model import CORE, Facts, VideoModel
from animatelcm.model_source import ModelSource
from animatelcm.request import Sampler, SampleRequest, Spacing
from animatelcm.sampling import sample


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How clips are sampled; as text "lcm@4", "ddim@25:4" with guidance, "ddim@4:2/trailing" with that spacing."""

    sampler: Sampler
    steps: int
    guidance: float = 1.0
    spacing: Spacing = "leading"

    def __post_init__(self) -> None:
        self.request("", seed=0)

    def __str__(self) -> str:
        guidance = "" if self.guidance == 1 else f":{self.guidance:.12g}"
        return f"{self.sampler}@{self.steps}{guidance}" + ("" if self.spacing == "leading" else f"/{self.spacing}")

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read what ``str`` wrote; guidance may be left out where it is 1. Raises ValueError for anything else."""
        found = re.fullmatch(r"([^@]+)@(\d+)(?::(\d+(?:\.\d+)?))?(?:/(\w+))?", text)
        if not found:
            raise ValueError(f"setting {text!r} is not SAMPLER@STEPS[:GUIDANCE], such as lcm@4 or ddim@25:4")
        spacing = cast(Spacing, found[4] or "leading")
        return cls(sampler=cast(Sampler, found[1]), steps=int(found[2]), guidance=float(found[3] or 1), spacing=spacing)

    @classmethod
    def of(cls, facts: Facts) -> Setting:
        """The model's own."""
        return cls(sampler=cast(Sampler, facts.sampler), steps=facts.num_inference_steps, guidance=facts.guidance_scale)

    def request(self, prompt: str, *, seed: int, num_frames: int | None = None) -> SampleRequest:
        return SampleRequest(
            prompt=prompt,
            prompt_syntax="plain",  # as captions are in training
            sampler=self.sampler,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            spacing=self.spacing,
            num_frames=num_frames,
            seed=seed,
        )


Maker = Callable[[Shot, int], Take]
"""(what is asked for, seed) -> the clip."""


def sampled(model: VideoModel, setting: Setting, protocol: Protocol, shot: Shot, seed: int) -> Take:
    """The clip that is judged: of the shot's caption, steered by its real clip as the protocol has it."""
    num_frames = 1 if len(shot.poses) == 1 else None
    given = steered.condition(shot, protocol.pack, protocol.steer)
    request = setting.request(shot.caption, seed=seed, num_frames=num_frames)
    if given.image is not None:
        request = replace(request, colour_match=0.0)
    (made,) = sample(model, request, condition=given)
    first = None if given.image is None else _through(model, given.image[None])[0]
    return Take(made.frames, sum(made.seconds.values()), made.evaluations, first, made.request, made.precision)


def _real(pack: SpritePack, shot: Shot, seed: int) -> Take:
    return Take(drawn(shot, pack))


def _autoencoded(model: VideoModel, pack: SpritePack, shot: Shot, seed: int) -> Take:
    return Take(_through(model, drawn(shot, pack)))


@torch.inference_mode()
def _through(model: VideoModel, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (F, H, W, 3) as the autoencoder gives them back."""
    return model.decode(model.encode(to_pixels([frames])))[0]


def evaluate(
    model: VideoModel,
    label: str,
    *,
    settings: Sequence[Setting],
    protocol: Protocol,
    out: Path,
    kinds: Sequence[Kind] = ("clips",),
    ceilings: bool = False,
    keep: int = 0,
    source: ModelSource | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> list[Row]:
    """One row for every setting and kind of prompt, written to ``out / "rows"`` as soon as it is measured, and beside
    it what each clip brings to its figures, by which rows are told apart (``paired``).

    A row of the same model and protocol that lies there is taken as it is; ``force`` replaces those of others, and of
    earlier versions, which did not keep what clips bring.
    ``ceilings`` adds what the measurement itself is worth: rows of the real clips of the prompts, and of these
    through the model's autoencoder, the best that a network could reach with it. ``label`` names the model in rows.

    The first ``keep`` clips of each row that is measured now are kept in ``out / "clips"`` (``takes``), and the real
    clips that steered them; where the model's ``source`` is given, with the line that makes each again.

    Raises ValueError where the model makes no such clips, or a row of another model or protocol is in the way.
    """
    _check_model(model, kinds, protocol.steer)
    if keep < 0:
        raise ValueError(f"keep={keep} clips; give how many of each setting and kind are kept, 0 or more")
    makers: dict[str, Maker] = {str(setting): partial(sampled, model, setting, protocol) for setting in settings}
    if ceilings:
        makers["real"] = partial(_real, protocol.pack)
        makers["autoencoded"] = partial(_autoencoded, model, protocol.pack)
    about = {
        "model": label,
        "fingerprint": fingerprint(model, protocol.steer),
        "protocol": facts_hash(protocol.facts),
        "hardware": hardware(model),
    }
    found = {(kind, name): _kept(row_path(out, kind, name), about, force) for name in makers for kind in kinds}
    judge, rows = Judge(protocol, out, progress), []
    for (kind, name), row in found.items():
        if row is None:
            shots, takes = _made(kind, name, makers[name], judge)
            options = {"protocol": protocol, "source": source, "fps": model.facts.fps}
            keep_clips(out, kind, name, shots[:keep], takes[:keep], **options)
            figures, samples = _measured(kind, shots, takes, judge)
            row, path = Row(**about, kind=kind, setting=name, **figures), row_path(out, kind, name)
            keep_samples(samples, path, row, shots, judge.real_file.name)
            write_row(row, path)
        rows.append(row)
    return rows


def _check_model(model: VideoModel, kinds: Sequence[Kind], steer: Steer) -> None:
    if steer and steer not in model.adapters:
        raise lacking(steer, model.adapters)
    if steer and "images" in kinds:
        raise ValueError(f"steer={steer!r} is judged on clips; leave the kind images out")
    if set(kinds) == {"images"}:
        return
    if model.unet.motion is None:
        raise ValueError(f"model {model.facts.name!r} has no temporal layers: judge its images (kinds images)")
    if model.facts.num_frames != CLIP_FRAMES:
        raise ValueError(f"motions last {CLIP_FRAMES} frames, but this model's clips {model.facts.num_frames}")


def _kept(path: Path, about: dict[str, str], force: bool) -> Row | None:
    if not path.is_file():
        return None
    row = read_row(path)
    same = all(getattr(row, name) == about[name] for name in ("fingerprint", "protocol"))
    if force and not (same and samples_path(path).is_file()):
        return None
    if same:
        return row
    raise ValueError(f"{path} is of another model or protocol; choose another folder, or --force to replace it")


def _made(kind: Kind, name: str, make: Maker, judge: Judge) -> tuple[list[Shot], list[Take]]:
    shots, takes = prompts(kind, judge.protocol.data(judge.protocol.prompt_seed, judge.protocol.clips)), []
    for seed, shot in enumerate(shots):
        takes.append(make(shot, seed))
        judge.progress(f"{name}, {kind}", seed + 1, len(shots))
    return shots, takes


def _measured(
    kind: Kind, shots: list[Shot], takes: list[Take], judge: Judge
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The figures of a row, and what each clip brings to them."""
    seconds = [take.seconds for take in takes if take.seconds is not None]
    made = {"seconds": median(seconds) if seconds else None, "evaluations": takes[0].evaluations}
    figures, guided = judge.figures(kind, shots, [take.frames for take in takes]), _steered(judge, shots, takes)
    figures["intervals"] |= {name: found for name, each in guided.items() if (found := ends(average, each))}
    samples = figures.pop("samples") | guided
    return {**made, **figures, **{name: average(each) for name, each in guided.items()}}, samples


def _steered(judge: Judge, shots: list[Shot], takes: list[Take]) -> dict[str, Tensor]:
    """Figures of clips that something steered, a row a clip."""
    steer, pack = judge.protocol.steer, judge.protocol.pack
    if not steer:
        return {}
    clips, real = [take.frames for take in takes], [drawn(shot, pack) for shot in shots]
    if steer != IMAGE:
        return steered.following(steer, shots, clips, real, pack)
    firsts = [clip[0] if take.first is None else take.first for take, clip in zip(takes, real, strict=True)]
    return steered.keeping(judge.classifier.network, clips, real, firsts)


def contact_sheet(model: VideoModel, setting: Setting, progress: Progress = silent) -> np.ndarray:
    """16 fixed prompts with seed 0, eight frames of each clip: uint8 (H, W, 3)."""
    rows = []
    for prompt in SHEET:
        rows.append(sample(model, setting.request(prompt, seed=0))[0].frames)
        progress(f"{setting}, contact sheet", len(rows), len(SHEET))
    return video.contact_sheet(rows, SHEET, columns=8)


def fingerprint(model: VideoModel, steer: Steer = "") -> str:
    """A hash of all that a model brings to its clips: weights, of what steers too, noise schedule, size and length; of
    an image encoder also its settings, as how strong motion is."""
    size = [model.facts.width, model.facts.height, model.facts.num_frames]
    weights = {part: model.fingerprint(part) for part in (*CORE, *([f"adapter_{steer}"] if steer else []))}
    settings = {"encoder": settings_of(model.adapters[IMAGE])} if steer == IMAGE else {}
    return facts_hash({"weights": weights, "schedule": model.schedule.to_diffusers(), "size": size, **settings})


def hardware(model: VideoModel) -> str:
    """What the seconds were measured on."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name()
    chip = platform.processor() or platform.machine()
    return f"{chip}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What ran."""
    return {
        "animatelcm": animatelcm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
