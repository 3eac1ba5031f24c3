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
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from animatelcm import checkpoint, objectives, video
from animatelcm.bundle import load, save, write_named_lora
from animatelcm.checkpoint import TrainState
from animatelcm.config import ConsistencyConfig, DataConfig, TrainConfig
from animatelcm.data.batches import Batches, ClipBatch, ClipDataset, draw_indices, latent_batches, pixel_batches
from animatelcm.data.clips import FolderDataset
from animatelcm.data.emoji import EmojiClips, EmojiImages
from animatelcm.data.sprites import SMALL_CONCEPTS, SpritePack
from animatelcm.ema import Ema
from animatelcm.log import RunLog
from animatelcm.miniature import fresh
from animatelcm.model import VideoModel, with_motion
from animatelcm.nets import emoji as shapes
from animatelcm.nets import lora
from animatelcm.nets.motion import MotionConfig
from animatelcm.objectives import Draw, Terms
from animatelcm.request import SampleRequest
from animatelcm.rng import generator
from animatelcm.roles import consistency_roles
from animatelcm.sampling import sample

if TYPE_CHECKING:
    from accelerate import Accelerator

FEW_STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "lcm"}
"""How a distilled model is sampled."""


class _Step(nn.Module):
    """The objective as a module, so that one ``prepare`` covers every network it trains."""

    def __init__(self, model: VideoModel, objective: Callable[[ClipBatch, Draw], Terms]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(model.networks)
        self.objective = objective

    def forward(self, batch: ClipBatch, draw: Draw) -> Terms:
        return self.objective(batch, draw)


def train(config: TrainConfig, *, resume: bool = False, stop_after: int | None = None) -> Path:
    """Run a recipe; returns the folder of the finished (or stopped) run's model.

    ``resume`` continues from the newest complete checkpoint, ``stop_after`` leaves at that step as an interrupt
    would: with a checkpoint. Raises ValueError if the run's folder is in use and ``resume`` is not asked for.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    _claim(config, resume)
    model = _starting_model(config).to(accelerator.device)
    state = _fresh_state(config, model)
    saved = checkpoint.finished(config.folder / "checkpoints")
    if resume and saved:
        checkpoint.restore(state, saved[-1])
    _run(config, accelerator, model, state, stop_after)
    if accelerator.is_main_process:
        with averaged(state):
            _finish(config, model, state)
    return config.folder / "model"


def _claim(config: TrainConfig, resume: bool) -> None:
    """Make the run's folder and write down what runs in it."""
    if checkpoint.finished(config.folder / "checkpoints") and not resume:
        raise ValueError(f"{config.folder} holds a run already; add --resume to continue it, or choose another name")
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.json").write_text(config.to_json() + "\n")


def _starting_model(config: TrainConfig) -> VideoModel:
    """The many-step model with what will train in it: fresh temporal or LoRA layers, or those of stage 1."""
    model = fresh(config.seed) if config.model == "new" else load(config.model, teacher=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.trainable == "motion" and model.unet.motion is None:
            model = with_motion(model, shapes.MOTION if model.facts.name == "emoji" else MotionConfig())
        if config.lora is not None:
            lora.inject(model.unet, rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)
    if config.trainable in ("autoencoder", "image"):
        model = replace(model, image_lora={}, styles={})  # they were made for other weights
    if config.objective == "consistency":
        model = _to_distil(config, model)
    model.unet.enable_gradient_checkpointing(config.gradient_checkpointing)
    for _, parameter in named_trainable(model, config):
        parameter.requires_grad_(True)
    return model


def _to_distil(config: TrainConfig, model: VideoModel) -> VideoModel:
    """Settings of a few-step model; where temporal layers will train, the teacher's are kept and stage 1 is there."""
    teacher = {name: getattr(model.facts, name) for name in FEW_STEPS}
    schedule = replace(model.schedule, solver_steps=config.consistency.solver_steps)
    model = replace(model, schedule=schedule, facts=replace(model.facts, **FEW_STEPS, teacher=teacher))
    if config.trainable == "motion":
        motion = {name: value for name, value in model.unet.state_dict().items() if "motion_modules" in name}
        model.teacher_motion = {name: value.clone() for name, value in motion.items()}
        if config.consistency.decouple:
            if not model.image_lora:
                raise ValueError(
                    f"{config.model} has no image acceleration to build on: run image_lcm first, "
                    "or learn both at once with --consistency.no-decouple and --lora"
                )
            lora.attach(model.unet, model.image_lora)
    return model


def named_trainable(model: VideoModel, config: TrainConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a config trains, by state-file name."""
    for part, network in model.networks.items():
        for name, parameter in network.named_parameters():
            if _kind(part, name) == config.trainable or (config.trains_lora and _kind(part, name) == "lora"):
                yield f"{part}.{name}", parameter


def _kind(part: str, name: str) -> str:
    if part == "unet" and "motion_modules" in name:
        return "motion"
    if ".lora_A." in name or ".lora_B." in name:
        return "lora"
    return "autoencoder" if part == "vae" else "image"


def _fresh_state(config: TrainConfig, model: VideoModel) -> TrainState:
    parameters = dict(named_trainable(model, config))
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    target = Ema(config.consistency.mu, parameters) if config.objective == "consistency" else None
    return TrainState(0, parameters, Ema(config.ema_decay, parameters), optimizer, target)


def _run(
    config: TrainConfig, accelerator: Accelerator, model: VideoModel, state: TrainState, stop_after: int | None
) -> None:
    """Steps from ``state.step`` to the end, an interrupt or ``stop_after``."""
    source = open_source(config, model)
    step_module, optimizer = accelerator.prepare(_Step(model, _objective(config, model, state)), state.optimizer)
    last = min(stop_after or config.steps, config.steps)
    with RunLog(config.folder, config.name, state.step, config.steps) as log, _interrupt() as interrupted:
        while state.step < last and not interrupted():
            began = time.perf_counter()
            draw = partial(generator, config.seed, state.step, accelerator.process_index)
            indices = draw_indices(
                len(source.dataset),
                config.batch_size,
                seed=config.seed,
                step=state.step,
                rank=accelerator.process_index,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, state.step)
            terms = step_module(source.batches(indices), draw)
            accelerator.backward(terms.loss.mean())
            accelerator.clip_grad_norm_(state.parameters.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.ema.decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))
            state.ema.update(state.parameters)
            if state.target is not None:
                state.target.update(state.parameters)
            state.seconds += time.perf_counter() - began
            _after_step(config, accelerator, model, state, terms, log)
        if accelerator.is_main_process:
            checkpoint.save(state, config.folder / "checkpoints", config.to_json())
        if isinstance(source.dataset, FolderDataset):
            log.note(source.dataset.summary())


def _objective(config: TrainConfig, model: VideoModel, state: TrainState) -> Callable[[ClipBatch, Draw], Terms]:
    if config.objective == "autoencoder":
        return partial(objectives.autoencoder, model)
    if config.objective == "consistency":
        return partial(_distil, config.consistency, model, state)
    options = {
        "text_dropout": config.text_dropout,
        "max_weight": config.max_loss_weight,
        "word_weight": config.word_weight,
    }
    return partial(objectives.diffusion, model, **options)


def _distil(config: ConsistencyConfig, model: VideoModel, state: TrainState, batch: ClipBatch, draw: Draw) -> Terms:
    assert state.target is not None
    roles = consistency_roles(
        model.unet,
        config,
        step=state.step,
        average={name.removeprefix("unet."): value for name, value in state.target.state_dict().items()},
        teacher_motion=model.teacher_motion,
    )
    return objectives.consistency(model, roles, batch, draw, config=config)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: a linear warm-up, then constant or half a cosine down to 1 %."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.lr_schedule == "constant" or step < config.warmup_steps:
        return config.learning_rate * warm
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _after_step(
    config: TrainConfig, accelerator: Accelerator, model: VideoModel, state: TrainState, terms: Terms, log: RunLog
) -> None:
    """What the outside sees of a step: figures, checkpoints, sample sheets, each at its interval."""
    if not accelerator.is_main_process:
        return
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
    if not config.data.cache:
        return Source(dataset, pixel_batches(dataset))
    facts = f"{config.data}/{_content(config.data)}/{model.fingerprint('vae')}"
    with torch.no_grad():
        path = config.out / "cache" / config.data.kind
        return Source(dataset, latent_batches(dataset, model.encode, path, facts=facts))


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


def _finish(config: TrainConfig, model: VideoModel, state: TrainState) -> None:
    """Write the bundle, with what was done to it, and a LoRA that was learned by itself too."""
    learned = lora.eject(model.unet)
    if config.lora is not None:
        name, fast = config.lora.name, config.objective == "consistency"
        kind = "acceleration" if fast else "style"
        write_named_lora(learned, config.folder / f"{name}.safetensors", title=name, kind=kind, base=model.facts.name)
        if fast:
            model.image_lora = learned
        else:
            model.styles[name] = learned
    done = {"steps": state.step, "clips": state.step * config.batch_size, "seconds": round(state.seconds)}
    done |= {"hardware": hardware(), "torch": torch.__version__}
    facts = replace(model.facts, trained={**model.facts.trained, config.name: done})
    save(replace(model, facts=facts), config.folder / "model", dtype=torch.float32)


def hardware() -> str:
    """The processor that trains, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
