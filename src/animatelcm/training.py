"""The training loop. It knows no method: an objective gives one loss a clip, the loop reduces and steps.

With processes.py the only file that knows accelerate. A run is resumable at any step: data and noise are drawn by
address (seed, step, rank), so weights, optimiser and average are the whole state.
"""

from __future__ import annotations

import math
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from animatelcm import checkpoint, processes, stages, video
from animatelcm.checkpoint import TrainState
from animatelcm.config import TrainConfig
from animatelcm.data.batches import ClipBatch, draw_indices, prefetched
from animatelcm.data.clips import FolderDataset
from animatelcm.ema import Ema
from animatelcm.log import RunLog
from animatelcm.model import VideoModel
from animatelcm.objectives import Draw, Terms
from animatelcm.request import SampleRequest
from animatelcm.rng import generator
from animatelcm.sampling import sample
from animatelcm.saving import save
from animatelcm.sources import open_source

if TYPE_CHECKING:
    from accelerate import Accelerator

LEAST_SCALE = 2.0**-10
"""Of float16's losses: 2^16, what a scaler begins with, halved 26 times. No finite gradient needs less."""


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
    accelerator = processes.accelerator(config)
    claim = _claim(config, resume, accelerator)
    model = stages.starting_model(config).to(accelerator.device)
    state = _fresh_state(config, model)
    state.processes, state.scaler = accelerator.num_processes, accelerator.scaler
    if claim.saved is not None:
        checkpoint.restore(state, claim.saved)
    stages.round_frozen(config, model)
    if config.compile:
        model.unet.compile(dynamic=False)
    _run(config, accelerator, model, state, stop_after, claim.note)
    if state.step < config.steps:
        return None
    if accelerator.is_main_process:
        with averaged(state):
            _finish(config, model, state)
    accelerator.wait_for_everyone()
    return config.folder / "model"


class _Claim(NamedTuple):
    """What a run goes on from, and what to say of that."""

    saved: Path | None
    note: str


def _claim(config: TrainConfig, resume: bool, accelerator: Accelerator) -> _Claim:
    """Make the run's folder and write down what runs in it."""
    saved = checkpoint.finished(config.folder / "checkpoints")
    if saved and not resume:
        raise ValueError(f"{config.folder} holds a run already; add --resume to continue it, or choose another name")
    note = checkpoint.continues(config, accelerator.num_processes, saved[-1]) if saved else ""
    if accelerator.is_main_process:
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "config.json").write_text(config.to_json() + "\n")
    return _Claim(saved[-1] if saved else None, note)


def _fresh_state(config: TrainConfig, model: VideoModel) -> TrainState:
    parameters = dict(stages.named_trainable(model, config))
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    target = Ema(config.consistency.mu, parameters) if config.objective == "consistency" else None
    return TrainState(0, parameters, Ema(config.ema_decay, parameters), optimizer, target, start=_start(model))


def _start(model: VideoModel) -> str:
    """What a run began with: the same for the same weights."""
    return "/".join(model.fingerprint(part) for part in model.networks)


def _run(
    config: TrainConfig,
    accelerator: Accelerator,
    model: VideoModel,
    state: TrainState,
    stop_after: int | None,
    note: str = "",
) -> None:
    """Steps from ``state.step`` to the end, an interrupt or ``stop_after``."""
    source = open_source(config, model, accelerator.process_index, accelerator.num_processes)
    step_module, optimizer = accelerator.prepare(_Step(model, stages.objective(config, model, state)), state.optimizer)
    draw = partial(draw_indices, len(source.dataset), config.batch_size, seed=config.seed, rank=0)

    def drawn(number: int) -> ClipBatch:
        return source.batches(draw(step=processes.address(accelerator, number)))

    last = config.steps if stop_after is None else min(stop_after, config.steps)
    main = accelerator.is_main_process
    log = RunLog(config.folder, config.name, state.step, config.steps) if main else None
    numbers = (state.step * config.gradient_accumulation_steps, last * config.gradient_accumulation_steps)
    ahead = prefetched(drawn, *numbers, source.workers)
    found: list[dict[str, Tensor]] = []
    state.scale = 0.0 if state.scaler is None else state.scaler.get_scale()
    with log or nullcontext(), _interrupt() as interrupted, ahead as batches:
        if log is not None and note:
            log.note(note)
        while state.step < last and not processes.ending(config, accelerator, state, interrupted()):
            began = time.perf_counter()
            terms = gradients(config, accelerator, step_module, batches, state.step)
            norm = update(config, accelerator, optimizer, state)
            found.append({"loss": terms.loss.mean(), **terms.logs, "grad_norm": norm})
            figures = processes.means(accelerator, found) if state.step % config.log_every == 0 else {}
            state.seconds += time.perf_counter() - began  # the line above waits for a device that lags
            if log is not None:
                _after_step(config, model, state, figures, log)
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
        draw = partial(generator, config.seed, processes.address(accelerator, number), 0)
        with accelerator.no_sync(step_module) if left else nullcontext():  # processes meet at the last one
            terms = step_module(batches(number), draw)
            accelerator.backward(terms.loss.mean() / count)
        found.append(Terms(terms.loss.detach(), terms.logs))
    logs = {name: torch.stack([terms.logs[name] for terms in found]).mean(0) for name in found[0].logs}
    return Terms(torch.cat([terms.loss for terms in found]), logs)


def update(
    config: TrainConfig, accelerator: Accelerator, optimizer: torch.optim.Optimizer, state: TrainState
) -> Tensor:
    """What follows a backward pass: weights go by their gradients, averages after them, and the step is counted.
    Returns the gradients' norm before it is clipped.

    Where float16 overflowed, the scaler keeps weights and optimiser as they were, and only the step is counted."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, state.updates)
    norm = accelerator.clip_grad_norm_(state.parameters.values(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if _overflowed(state):
        state.skipped += 1
        return norm
    state.ema.decay = min(config.ema_decay, (1 + state.updates) / (10 + state.updates))
    state.ema.update(state.parameters)
    if state.target is not None:
        state.target.update(state.parameters)
    return norm


def _overflowed(state: TrainState) -> bool:
    """Whether the gradients of this step were not finite, so that the scaler has lowered its scale. (accelerate's
    ``step_was_skipped`` does not see it: a fused optimiser skips by itself.) The host waits for the device here."""
    if state.scaler is None:
        return False
    before, state.scale = state.scale, state.scaler.get_scale()
    if state.scale < LEAST_SCALE:
        raise ValueError(
            f"step {state.step}: gradients are not finite in fp16 however small their scale; begin again with "
            "--mixed-precision bf16 or a lower --learning-rate, or look at the data"
        )
    return state.scale < before


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: a linear warm-up, then constant or half a cosine down to 1 %."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.lr_schedule == "constant" or step < config.warmup_steps:
        return config.learning_rate * warm
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _after_step(
    config: TrainConfig, model: VideoModel, state: TrainState, figures: Mapping[str, float], log: RunLog
) -> None:
    """What the outside sees of a step: figures, checkpoints, sample sheets, each at its interval."""
    if figures:
        log(state.step, figures if state.scaler is None else {**figures, "loss_scale": state.scale})
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


def write_samples(config: TrainConfig, model: VideoModel, step: int) -> Path:
    """A sheet of the run's prompts in ``samples/`` of its folder: one row a clip, or one row of images. Nothing is
    compiled for its shapes."""
    data, model = config.data, replace(model, compile="none")  # graphs of weights that change would only take memory
    size: dict[str, int] = {}
    if data.kind == "folder":
        size = {"num_frames": data.num_frames, "width": data.width, "height": data.height}
    elif data.kind == "emoji-images":
        size = {"num_frames": 1}
    half = stages.HALF.get(config.mixed_precision)
    eager = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
    with torch.autocast(model.device.type, half, enabled=half is not None), eager:  # frozen weights are rounded then
        rows = [
            sample(model, SampleRequest(prompt=prompt, prompt_syntax="plain", seed=i, **size))[0].frames
            for i, prompt in enumerate(config.sample_prompts)
        ]
    path = config.folder / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    still = len(rows[0]) == 1
    sheet = video.contact_sheet([np.concatenate(rows)]) if still else video.contact_sheet(rows, config.sample_prompts)
    video.write_image(sheet, path, overwrite=True)
    return path


def _finish(config: TrainConfig, model: VideoModel, state: TrainState) -> Path:
    """Write the bundle, with what was done to it."""
    left = stages.result(config, _exact(config, model, state))
    clips = state.step * state.processes * config.gradient_accumulation_steps * config.batch_size
    done = {"steps": state.step, "clips": clips, "seconds": round(state.seconds)}
    done |= {"hardware": hardware(), "torch": torch.__version__}
    facts = replace(left.facts, trained={**left.facts.trained, config.name: done})
    beside = stages.adapters_left(config)
    save(replace(left, facts=facts), config.folder / "model", dtype=torch.float32, adapters_of=beside)
    return config.folder / "model"


def _exact(config: TrainConfig, model: VideoModel, state: TrainState) -> VideoModel:
    """The model with frozen weights as they were read, where the run has rounded them, beside those that it trained."""
    if config.mixed_precision == "no":
        return model
    found = stages.starting_model(config)
    if _start(found) != state.start:
        raise ValueError(
            f"{config.model} is not what this run began with; put that back, and add --resume to have the model written"
        )
    _assign(dict(stages.named_trainable(found, config)), state.parameters)
    return found


def hardware() -> str:
    """The processor that trains, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
