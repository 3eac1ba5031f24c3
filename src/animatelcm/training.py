"""The training loop. It knows no method: an objective gives one loss a clip, the loop reduces and steps.

The only file that knows accelerate. A run is resumable at any step: data and noise are drawn by address
(seed, step, rank), so weights, optimiser and average are the whole state.
"""

from __future__ import annotations

import math
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from animatelcm import checkpoint, stages, video
from animatelcm.bundle import save
from animatelcm.checkpoint import TrainState
from animatelcm.config import DataConfig, TrainConfig
from animatelcm.data.batches import (
    Batches,
    ClipBatch,
    ClipDataset,
    draw_indices,
    latent_batches,
    pixel_batches,
    with_looks,
)
from animatelcm.data.clips import FolderDataset
from animatelcm.data.emoji import EmojiClips, EmojiImages
from animatelcm.data.sprites import SMALL_CONCEPTS, SpritePack
from animatelcm.ema import Ema
from animatelcm.log import RunLog
from animatelcm.model import VideoModel
from animatelcm.objectives import Draw, Terms
from animatelcm.request import SampleRequest
from animatelcm.rng import generator
from animatelcm.sampling import sample

if TYPE_CHECKING:
    from accelerate import Accelerator

MAY_CHANGE = ("out", "steps", "log_every", "save_every", "sample_every", "sample_prompts")
"""Fields that a resumed run may have of its own."""


class _Step(nn.Module):
    """The objective as a module, so that one ``prepare`` covers every network it trains."""

    def __init__(self, model: VideoModel, objective: Callable[[ClipBatch, Draw], Terms]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(model.networks)
        self.objective = objective

    def forward(self, batch: ClipBatch, draw: Draw) -> Terms:
        return self.objective(batch, draw)


def train(config: TrainConfig, *, resume: bool = False, stop_after: int | None = None) -> Path | None:
    """Run a recipe; returns the folder of the finished model, or None where it stopped before its last step.

    ``resume`` continues from the newest complete checkpoint, ``stop_after`` leaves at that step as an interrupt
    would: with a checkpoint. Raises ValueError if the run's folder is in use and ``resume`` is not asked for, or if
    what lies there is a run of other settings or from another model.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    saved = _claim(config, resume)
    model = stages.starting_model(config).to(accelerator.device)
    state = _fresh_state(config, model)
    if saved is not None:
        checkpoint.restore(state, saved)
    _run(config, accelerator, model, state, stop_after)
    if state.step < config.steps:
        return None
    if accelerator.is_main_process:
        with averaged(state):
            _finish(config, model, state)
    return config.folder / "model"


def _claim(config: TrainConfig, resume: bool) -> Path | None:
    """Make the run's folder and write down what runs in it. Returns the checkpoint to continue from."""
    saved = checkpoint.finished(config.folder / "checkpoints")
    if saved and not resume:
        raise ValueError(f"{config.folder} holds a run already; add --resume to continue it, or choose another name")
    if saved and (odd := _changed(config, checkpoint.config_of(saved[-1]))):
        raise ValueError(
            f"{config.folder} holds a run with another {odd[0]}; choose another name, or take that value again"
        )
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.json").write_text(config.to_json() + "\n")
    return saved[-1] if saved else None


def _changed(config: TrainConfig, saved: TrainConfig) -> list[str]:
    """Fields that decide what a step does and differ; how long a run is and what it shows may change."""
    names = [field.name for field in fields(TrainConfig) if field.name not in MAY_CHANGE]
    return [name for name in names if getattr(config, name) != getattr(saved, name)]


def _fresh_state(config: TrainConfig, model: VideoModel) -> TrainState:
    parameters = dict(stages.named_trainable(model, config))
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    target = Ema(config.consistency.mu, parameters) if config.objective == "consistency" else None
    start = "/".join(model.fingerprint(part) for part in model.networks)
    return TrainState(0, parameters, Ema(config.ema_decay, parameters), optimizer, target, start=start)


def _run(
    config: TrainConfig, accelerator: Accelerator, model: VideoModel, state: TrainState, stop_after: int | None
) -> None:
    """Steps from ``state.step`` to the end, an interrupt or ``stop_after``."""
    with accelerator.main_process_first():  # one process encodes, the others read what it kept
        source = open_source(config, model)
    step_module, optimizer = accelerator.prepare(_Step(model, stages.objective(config, model, state)), state.optimizer)
    draw = partial(
        draw_indices, len(source.dataset), config.batch_size, seed=config.seed, rank=accelerator.process_index
    )

    def drawn(number: int) -> ClipBatch:
        return source.batches(draw(step=number))

    last = config.steps if stop_after is None else min(stop_after, config.steps)
    main = accelerator.is_main_process
    log = RunLog(config.folder, config.name, state.step, config.steps) if main else None
    with log or nullcontext(), _interrupt() as interrupted:
        while state.step < last and not _any(accelerator, interrupted()):
            began = time.perf_counter()
            terms = gradients(config, accelerator, step_module, drawn, state.step)
            update(config, accelerator, optimizer, state)
            state.seconds += time.perf_counter() - began
            if log is not None:
                _after_step(config, model, state, terms, log)
        if log is not None:
            checkpoint.save(state, config.folder / "checkpoints", config.to_json())
        if log is not None and isinstance(source.dataset, FolderDataset):
            log.note(source.dataset.summary())


def gradients(
    config: TrainConfig,
    accelerator: Accelerator,
    step_module: nn.Module,
    batches: Callable[[int], ClipBatch],
    step: int,
) -> Terms:
    """The backward passes of a step: of its batches, which are those of as many steps of one batch each. Returns all
    of their losses, and the means of their figures. ``batches`` gives the batch of a number."""
    count, found = config.gradient_accumulation_steps, []
    for left, number in zip(reversed(range(count)), range(step * count, (step + 1) * count), strict=True):
        draw = partial(generator, config.seed, number, accelerator.process_index)
        with accelerator.no_sync(step_module) if left else nullcontext():  # processes meet at the last one
            terms = step_module(batches(number), draw)
            accelerator.backward(terms.loss.mean() / count)
        found.append(Terms(terms.loss.detach(), terms.logs))
    logs = {name: torch.stack([terms.logs[name] for terms in found]).mean(0) for name in found[0].logs}
    return Terms(torch.cat([terms.loss for terms in found]), logs)


def update(config: TrainConfig, accelerator: Accelerator, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """What follows a backward pass: weights go by their gradients, averages after them, and the step is counted."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    accelerator.clip_grad_norm_(state.parameters.values(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.ema.decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))
    state.ema.update(state.parameters)
    if state.target is not None:
        state.target.update(state.parameters)


def _any(accelerator: Accelerator, asked: bool) -> bool:
    """Whether any process asks: they all leave after the same step, or none does."""
    if accelerator.num_processes == 1:
        return asked
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device)).item())


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: a linear warm-up, then constant or half a cosine down to 1 %."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.lr_schedule == "constant" or step < config.warmup_steps:
        return config.learning_rate * warm
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _after_step(config: TrainConfig, model: VideoModel, state: TrainState, terms: Terms, log: RunLog) -> None:
    """What the outside sees of a step: figures, checkpoints, sample sheets, each at its interval."""
    if state.step % config.log_every == 0:
        figures = {"loss": terms.loss.detach().mean(), **terms.logs}
        log(state.step, {name: value.item() for name, value in figures.items()})
    if state.step % config.save_every == 0:
        checkpoint.save(state, config.folder / "checkpoints", config.to_json())
    if config.sample_prompts and state.step % config.sample_every == 0:
        with averaged(state):
            path = write_samples(config, model, state.step)
        log.note(f"step {state.step}: samples in {path}")


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """The trained parameters hold their average for a while."""
    online = {name: parameter.detach().clone() for name, parameter in state.parameters.items()}
    _assign(state.parameters, state.ema.state_dict())
    try:
        yield
    finally:
        _assign(state.parameters, online)


@torch.no_grad()
def _assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM end the run after the step in flight, with a checkpoint, instead of at once."""
    asked: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda received, _: asked.append(received)) for number in signals]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class Source(NamedTuple):
    """The data of a run: the clips, and batches of them by index."""

    dataset: ClipDataset
    batches: Batches


def open_source(config: TrainConfig, model: VideoModel) -> Source:
    """The data of a run: as pixels, or as latents encoded once and kept in ``<out>/cache``."""
    dataset = open_dataset(config.data)
    batches = _batches(config, model, dataset)
    if config.adapter is None or not (config.adapter.reads_maps or config.adapter.sees == "pixels"):
        return Source(dataset, batches)
    kind = config.adapter.name if config.adapter.reads_maps else None
    return Source(dataset, with_looks(batches, dataset, kind))


def _batches(config: TrainConfig, model: VideoModel, dataset: ClipDataset) -> Batches:
    if not config.data.cache:
        return pixel_batches(dataset)
    facts = f"{config.data}/{_content(config.data)}/{model.fingerprint('vae')}"
    with torch.no_grad():
        path = config.out / "cache" / config.data.kind
        return latent_batches(dataset, model.encode, path, facts=facts)


def open_dataset(data: DataConfig) -> ClipDataset:
    """The clips that a data config describes."""
    if data.path is not None:
        return FolderDataset(data.path, num_frames=data.num_frames, size=(data.height, data.width))
    sheets = {Path(style).stem: Path(style) for style in data.styles if style.endswith(".webp")}
    styles = tuple(Path(style).stem if style.endswith(".webp") else style for style in data.styles)
    pack = SpritePack(extra_styles=sheets)
    concepts = SMALL_CONCEPTS if data.concepts == "small" else tuple(pack.concepts)
    common = {"length": data.length, "seed": data.seed, "concepts": concepts, "styles": styles, "pack": pack}
    if data.kind == "emoji-images":
        return EmojiImages(**common, moments=data.moments)
    return EmojiClips(**common, degrade=data.degrade)


def _content(data: DataConfig) -> list[tuple[str, int, int]]:
    """What tells one state of a folder from another: names, sizes, times of change."""
    files = sorted(path for path in data.path.rglob("*") if path.is_file()) if data.path is not None else []
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def write_samples(config: TrainConfig, model: VideoModel, step: int) -> Path:
    """A sheet of the run's prompts in ``samples/`` of its folder: one row a clip, or one row of images."""
    frames = 1 if config.data.kind == "emoji-images" else None
    rows = [
        sample(model, SampleRequest(prompt=prompt, num_frames=frames, seed=i))[0].frames
        for i, prompt in enumerate(config.sample_prompts)
    ]
    path = config.folder / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet = video.contact_sheet([np.concatenate(rows)]) if frames else video.contact_sheet(rows, config.sample_prompts)
    video.write_image(sheet, path, overwrite=True)
    return path


def _finish(config: TrainConfig, model: VideoModel, state: TrainState) -> Path:
    """Write the bundle, with what was done to it."""
    left = stages.result(config, model)
    clips = state.step * config.gradient_accumulation_steps * config.batch_size
    done = {"steps": state.step, "clips": clips, "seconds": round(state.seconds)}
    done |= {"hardware": hardware(), "torch": torch.__version__}
    facts = replace(left.facts, trained={**left.facts.trained, config.name: done})
    save(replace(left, facts=facts), config.folder / "model", dtype=torch.float32)
    return config.folder / "model"


def hardware() -> str:
    """The processor that trains, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
