"""Does the miniature draw what the caption says? Concepts, motions and amount of motion, against real clips.

    python benchmarks/emoji_quality.py --model emoji --out quality

Prints one JSON object, written to OUT/quality.json too, and OUT/teacher-16-prompts.png: 16 prompts, 8 frames each.
Every figure is given for three kinds of clips: ``generated``; ``real`` ones that the same captions describe, which
says what the measurement itself is worth; and the real ones ``autoencoded`` by the model's VAE: what a perfect
network could reach with it.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track

import animatelcm
from animatelcm import video
from animatelcm.data.emoji import BASE_STYLES, Draws, caption, held_out
from animatelcm.data.sprites import MOTIONS, SMALL_CONCEPTS, Pose, SpritePack, render
from animatelcm.evaluate.concepts import ConceptClassifier
from animatelcm.evaluate.motion import classify, motion_amount
from animatelcm.model import VideoModel, load
from animatelcm.request import Sampler, SampleRequest
from animatelcm.sampling import best_device, sample

WHITE = (1.0, 1.0, 1.0)
JUDGED = slice(None, None, 3)  # of 16 frames: 0, 3, ..., 15
PROMPTS = (
    "a parrot",
    "a fox",
    "a butterfly",
    "an octopus",
    "a unicorn",
    "a rocket",
    "a dolphin on a blue background",
    "a 3d penguin on a pink background",
    "a red apple bouncing on a green background",
    "a flat pizza spinning",
    "a cartoon airplane sliding right on a blue background",
    "a red heart growing on a pink background",
    "a balloon sliding up",
    "a bomb shaking on an orange background",
    "a flat banana swinging on a purple background",
    "a honeybee orbiting on a yellow background",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and on how many clips."""

    out: Path
    """Folder for quality.json and the contact sheet."""
    model: str = "emoji"
    """A bundle: "emoji", a folder or a hub id. One without temporal layers is judged by its images alone."""
    steps: int = 25
    guidance: float = 4.0
    sampler: Sampler | None = None
    """None: the model's own."""
    images_per_concept: int = 2
    videos_per_concept: int = 1
    videos_per_motion: int = 4
    held_out_per_motion: int = 2
    """Of pairs of concept and motion that no training clip shows."""
    real_per_prompt: int = 2
    seed: int = 0
    device: str | None = None
    concepts: tuple[str, ...] = SMALL_CONCEPTS
    """Subjects to ask for; they are told from all 64 whatever is chosen here."""
    limit: int | None = None
    """At most so many clips of each kind and rows of the sheet: a smoke run."""


class Ask(NamedTuple):
    """One clip to make: its kind (image, video, motion, held_out_motion), subject, motion ("" for none) and seed."""

    kind: str
    slug: str
    motion: str
    seed: int


Clips = list[tuple[Ask, np.ndarray]]


def plan(options: Options, kinds: Sequence[str]) -> list[Ask]:
    """What to ask for, by the options alone."""
    pairs = {
        "image": [(slug, "") for slug in options.concepts for _ in range(options.images_per_concept)],
        "video": [(slug, "") for slug in options.concepts for _ in range(options.videos_per_concept)],
        "motion": _pairs(options, options.videos_per_motion, unseen=False),
        "held_out_motion": _pairs(options, options.held_out_per_motion, unseen=True),
    }
    chosen = [(kind, *pair) for kind in kinds for pair in pairs[kind][: options.limit]]
    return [Ask(*words, seed=options.seed + i) for i, words in enumerate(chosen)]


def _pairs(options: Options, count: int, *, unseen: bool) -> list[tuple[str, str]]:
    """``count`` concepts of every motion, one round of motions after the other."""
    draws = Draws(options.seed, int(unseen), "emoji-quality-pairs")
    fitting = [[slug for slug in options.concepts if held_out(slug, motion) == unseen] for motion in MOTIONS]
    orders = [sorted(slugs, key=lambda _: draws.uniform()) for slugs in fitting]
    rounds = range(count)
    return [(order[i], name) for i in rounds for name, order in zip(MOTIONS, orders, strict=True) if i < len(order)]


def real_clip(pack: SpritePack, ask: Ask, draws: Draws) -> np.ndarray:
    """A clip that the ask's caption describes, drawn as the training clips are."""
    style = draws.choice([style for style in BASE_STYLES if pack.has(ask.slug, style)])
    motion = ask.motion
    if not motion:
        size = draws.uniform(0.65, 0.95)
        still = Pose(size, draws.uniform(size - 1, 1 - size), draws.uniform(size - 1, 1 - size))
        if ask.kind == "image":
            return render(pack.sprite(ask.slug, style), [still], WHITE)
        if pack.concepts[ask.slug].first_frame is not None:
            return render(pack.clip(ask.slug), [still] * 16, WHITE)
        motion = draws.choice([name for name in MOTIONS if not held_out(ask.slug, name)])
    poses, sizes = MOTIONS[motion]
    return render(pack.sprite(ask.slug, style), poses(draws.uniform(*sizes), draws.uniform(-1, 1)), WHITE)


def generate(model: VideoModel, options: Options, prompt: str, num_frames: int, seed: int) -> np.ndarray:
    request = SampleRequest(
        prompt=prompt,
        num_frames=num_frames,
        seed=seed,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        sampler=options.sampler,
    )
    return sample(model, request)[0].frames


def autoencoded(model: VideoModel, frames: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.inference_mode():
        return model.decode(model.encode(pixels))[0]


def figures(clips: Clips, classifiers: dict[str, ConceptClassifier]) -> dict:
    """Every figure of one kind of clips, by the kind of ask."""
    kinds = list(dict.fromkeys(ask.kind for ask, _ in clips))
    by_kind = {kind: [(ask, frames) for ask, frames in clips if ask.kind == kind] for kind in kinds}
    moving = {kind: of_kind for kind, of_kind in by_kind.items() if kind != "image"}
    return {
        "clips": {kind: len(of_kind) for kind, of_kind in by_kind.items()},
        **{
            name: {kind: _concept_accuracy(of_kind, classifier) for kind, of_kind in by_kind.items()}
            for name, classifier in classifiers.items()
        },
        "motion_accuracy": {k: _motion_accuracy(v) for k, v in moving.items() if k != "video"},
        "motion_amount": {k: round(_mean(motion_amount(f) for _, f in v), 3) for k, v in moving.items()},
    }


def _concept_accuracy(clips: Clips, classifier: ConceptClassifier) -> dict:
    frames = np.concatenate([frames[JUDGED] for _, frames in clips])
    truth = [ask.slug for ask, frames in clips for _ in frames[JUDGED]]
    seen = [classifier.concepts[i] for i in classifier.predict(frames)]
    missed = Counter(f"{a} -> {b}" for a, b in zip(truth, seen, strict=True) if a != b)
    return {
        "accuracy": round(1 - missed.total() / len(truth), 4),
        "frames": len(truth),
        "most_missed": dict(missed.most_common(12)),
    }


def _motion_accuracy(clips: Clips) -> dict:
    missed = Counter(f"{ask.motion} -> {seen}" for ask, f in clips if (seen := classify(f)) != ask.motion)
    return {"accuracy": round(1 - missed.total() / len(clips), 4), "clips": len(clips), "missed": dict(missed)}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def ratios(generated: dict, real: dict) -> dict:
    """Amount of motion, generated over real, by kind and over all clips."""
    made, true, clips = (generated["motion_amount"], real["motion_amount"], generated["clips"])
    if not made:
        return {}
    whole = sum(made[kind] * clips[kind] for kind in made) / sum(true[kind] * clips[kind] for kind in made)
    return {**{kind: round(made[kind] / true[kind], 3) for kind in made}, "all": round(whole, 3)}


def circumstances(options: Options, model: VideoModel, asks: Sequence[Ask], seconds: float) -> dict:
    chip = platform.processor() or platform.machine()
    cuda = model.device.type == "cuda"
    return {
        "model": options.model,
        "trained": model.facts.trained,
        "fingerprint": model.fingerprint("unet"),
        "n": len(asks),
        "seed": options.seed,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "sampler": options.sampler or model.facts.sampler,
        "seconds_a_clip": round(seconds / len(asks), 3),
        "hardware": torch.cuda.get_device_name() if cuda else f"{chip}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {
            "animatelcm": animatelcm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def checked(options: Options) -> Options:
    if strange := [slug for slug in options.concepts if slug not in SMALL_CONCEPTS]:
        raise ValueError(f"concept {strange[0]!r} is not among the 64 that are told apart: {', '.join(SMALL_CONCEPTS)}")
    return replace(options, device=options.device or best_device())


def measured(options: Options, model: VideoModel, console: Console) -> dict:
    """The whole report: makes the clips, and the real ones beside them."""
    pack, made = SpritePack(), []
    kinds = ("image", "video", "motion", "held_out_motion") if model.unet.motion else ("image",)
    asks = plan(options, kinds)
    began = time.perf_counter()
    for ask in track(asks, "generating", console=console):
        prompt = caption(pack.concepts[ask.slug].name.lower(), motion=ask.motion)
        made.append((ask, generate(model, options, prompt, 1 if ask.kind == "image" else 16, ask.seed)))
    facts = circumstances(options, model, asks, time.perf_counter() - began)
    draws = [(ask, Draws(ask.seed, i, "emoji-quality-real")) for ask in asks for i in range(options.real_per_prompt)]
    real = [(ask, real_clip(pack, ask, draw)) for ask, draw in draws]
    through = [(ask, autoencoded(model, frames)) for ask, frames in real[:: options.real_per_prompt]]
    classifiers = {
        "concept_accuracy": ConceptClassifier(pack),
        "concept_accuracy_unsoftened": ConceptClassifier(pack, softness=0.0),
    }
    report = {
        name: figures(clips, classifiers)
        for name, clips in {"generated": made, "real": real, "autoencoded": through}.items()
    }
    return {**report, "motion_amount_ratio": ratios(report["generated"], report["real"]), "circumstances": facts}


def contact_sheet(options: Options, model: VideoModel, console: Console) -> np.ndarray:
    prompts = PROMPTS[: options.limit]
    rows = [generate(model, options, p, 16, options.seed) for p in track(prompts, "contact sheet", console=console)]
    return video.contact_sheet(rows, prompts, columns=8)


def main(options: Options) -> None:
    options, console = checked(options), Console(stderr=True)
    model = load(options.model, device=options.device or "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    report = measured(options, model, console)
    (options.out / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if model.unet.motion:
        sheet = contact_sheet(options, model, console)
        video.write_image(sheet, options.out / "teacher-16-prompts.png", overwrite=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
