"""Seconds and memory of one optimiser step of each stage: ours, and the plain one of reference.py.

    python benchmarks/training.py --size emoji --stages video --steps 10

The miniature is the embedded model. ``sd15`` has random weights of Stable Diffusion 1.5's and AnimateDiff's shapes:
whole on a GPU (16 frames of 256x256), with half of every width on a CPU (8 frames of 128x128), where three of them
would not fit.

Time: both in turn in one process, on latents that are there (ours) and on pixels that are there (reference; what it
spends on encoding them is told apart). Memory: each in a fresh process, two steps from copies of the loaded model;
weights, gradients, optimiser, averages and activations count, the autoencoder, the text encoder and what else was
loaded before do not.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from reference import Side, autocast, reference, without_motion
from torch import nn

from animatelcm import recipes, stages, training
from animatelcm.bench import machine
from animatelcm.bench.timing import interleaved, peak_memory
from animatelcm.config import LCM_TARGETS, TrainConfig
from animatelcm.data.batches import ClipBatch, pixel_batches
from animatelcm.hub import ASSETS
from animatelcm.model import Facts, VideoModel
from animatelcm.nets import lora, sd15
from animatelcm.nets.autoencoder import Autoencoder, AutoencoderConfig
from animatelcm.nets.text_encoder import TextConfig, TextEncoder
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.rng import generator
from animatelcm.saving import save
from animatelcm.schedule import NoiseSchedule
from animatelcm.sources import open_dataset
from animatelcm.tokenizer import Tokenizer, read_merges

Stage = Literal["image", "video", "adapter"]
RECIPES: dict[str, dict[Stage, Callable[[], TrainConfig]]] = {
    "emoji": {"image": recipes.image_lcm_emoji, "video": recipes.video_lcm_emoji, "adapter": recipes.i2v_emoji},
    "sd15": {"image": recipes.image_lcm_sd15, "video": recipes.video_lcm_sd15, "adapter": recipes.i2v_sd15},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured."""

    size: Literal["emoji", "sd15"] = "emoji"
    stages: tuple[Stage, ...] = ("image", "video", "adapter")
    steps: int = 10
    """Rounds that are timed, after one that is not."""
    batch_size: int | None = None
    """None: the recipe's."""
    accumulation: int = 1
    """Parts in which ours takes a batch (gradient_accumulation_steps); the reference takes it whole."""
    gradient_checkpointing: bool | None = None
    """None: as the recipe has it."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """None: as the recipe has it; bf16 where that is fp16, whose scaler the reference does not have."""
    json: bool = False
    """Print one JSON object instead of a table."""


class Shape(NamedTuple):
    """Of a model with random weights."""

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    text_width: int = 768
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    rank: int = 64
    frames: int = 16
    side: int = 256
    """Pixels."""
    layers: int = 2
    """Of each level."""
    text_layers: int = 12


HALF = Shape(widths=(160, 320, 640, 640), rank=32, frames=8, side=128)


class Case(NamedTuple):
    """One stage to be measured."""

    stage: Stage
    config: TrainConfig
    drawn: bool
    """Weights and clips are random."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = "emoji"
        shape = None
        if options.size == "sd15":
            shape = Shape() if torch.cuda.is_available() else HALF
            place = str(write_random(shape, Path(folder) / "model"))
        cases = [case(options, stage, place, shape) for stage in options.stages]
        measured = {each.stage: measure(each, options.steps) for each in cases}
    found = {"benchmark": "training", "size": options.size, "machine": machine.facts(), "stages": measured}
    sys.stdout.write((json.dumps(found, indent=2) if options.json else table(found)) + "\n")


def case(options: Options, stage: Stage, place: str, shape: Shape | None) -> Case:
    """A stage as its recipe has it, from the model at ``place``."""
    asked = {name: getattr(options, name) for name in ("batch_size", "gradient_checkpointing", "mixed_precision")}
    changes = {name: value for name, value in asked.items() if value is not None}
    changes |= {"gradient_accumulation_steps": options.accumulation}
    recipe = RECIPES[options.size][stage]()
    if recipe.mixed_precision == "fp16":
        recipe = replace(recipe, mixed_precision="bf16")
    config = replace(recipe, model=place, motion=None, **changes)
    if shape is not None:
        frames = 1 if stage == "image" else shape.frames
        data = replace(config.data, width=shape.side, height=shape.side, num_frames=frames)
        config = replace(config, data=data)
    return Case(stage, config, drawn=shape is not None)


def write_random(shape: Shape, folder: Path) -> Path:
    """A bundle with stage 1's LoRA, temporal layers that act, and random weights in everything."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {**sd15.UNET, "block_out_channels": shape.widths, "cross_attention_dim": shape.text_width}
        levels = len(shape.widths) - 1  # that attend to the text
        settings |= {
            "layers_per_block": shape.layers,
            "down_block_types": ("CrossAttnDownBlock2D",) * levels + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * levels,
        }
        unet = VideoUNet(UNetConfig.from_diffusers(settings), sd15.MOTION)
        for name, parameter in unet.named_parameters():
            if "motion_modules" in name and "transformer_blocks" not in name and "proj_out" in name:
                nn.init.normal_(parameter, std=0.02)
        lora.inject(unet, rank=shape.rank, alpha=shape.rank, targets=LCM_TARGETS)
        for _, b, _ in lora.factors(unet).values():
            nn.init.normal_(b, std=0.02)
        learned = lora.eject(unet)
        text = {**sd15.TEXT, "hidden_size": shape.text_width, "intermediate_size": 4 * shape.text_width}
        text |= {"num_hidden_layers": shape.text_layers}
        model = VideoModel(
            unet=unet,
            vae=Autoencoder(AutoencoderConfig(**{**sd15.VAE, "block_out_channels": shape.vae_widths})),
            text_encoder=TextEncoder(TextConfig(**text)),
            tokenizer=Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), sd15.TOKENS),
            schedule=NoiseSchedule(),
            facts=Facts(name="random"),
            image_lora=learned,
        )
    save(model, folder)
    return folder


def starting(case: Case) -> VideoModel:
    """What the stage begins with, on the device that it trains on."""
    model = stages.starting_model(case.config)
    if case.drawn and case.stage == "image":
        without_motion(model.unet)  # the recipe's base has none
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def batches(case: Case, model: VideoModel) -> tuple[ClipBatch, ClipBatch]:
    """The same clips as latents, rounded as the cache of latents rounds them, and as pixels."""
    data, size = case.config.data, case.config.batch_size
    if case.drawn:
        shape = (size, 3, data.num_frames, data.height, data.width)
        pixels = 2 * torch.rand(shape, generator=generator(0, 0, 0, "pixels")) - 1
        as_pixels = ClipBatch(captions=("a cat in the snow",) * size, pixels=pixels)
    else:
        as_pixels = pixel_batches(open_dataset(replace(data, length=size)))(range(size))
    with torch.no_grad():
        latents = model.encode(as_pixels.pixels).half().float()
    return ClipBatch(captions=as_pixels.captions, latents=latents.cpu()), as_pixels


def ours(config: TrainConfig, model: VideoModel) -> Side:
    """A step of ``training.train``, without its data, log and checkpoints."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    state = training._fresh_state(config, model)
    stages.round_frozen(config, model)
    objective = stages.objective(config, model, state)
    module, optimizer = accelerator.prepare(training._Step(model, objective), state.optimizer)

    def backward(batch: ClipBatch, number: int) -> torch.Tensor:
        pieces = parts(batch, config.gradient_accumulation_steps)
        return training.gradients(config, accelerator, module, lambda i: pieces[i % len(pieces)], number).loss.mean()

    def update(number: int) -> None:
        assert number == state.step
        training.update(config, accelerator, optimizer, state)

    return Side(dict(state.parameters), backward, update)


def parts(batch: ClipBatch, count: int) -> list[ClipBatch]:
    """A batch in as many of equal size; several are of latents."""
    if count == 1:
        return [batch]
    size, rest = divmod(len(batch.captions), count)
    if rest:
        raise SystemExit(f"{len(batch.captions)} clips are not taken in {count} parts; choose --accumulation to suit")
    assert batch.latents is not None
    starts = range(0, len(batch.captions), size)
    return [ClipBatch(captions=batch.captions[i : i + size], latents=batch.latents[i : i + size]) for i in starts]


SIDES: dict[str, Callable[[TrainConfig, VideoModel], Side]] = {"ours": ours, "reference": reference}


def copied(case: Case, model: VideoModel) -> VideoModel:
    """Another model of its own, but for the parts that no step changes or copies."""
    kept = None if case.config.adapter is None else case.config.adapter.name
    still = [network for name, network in model.adapters.items() if name != kept]
    shared = [model.vae, model.text_encoder, model.tokenizer, model.styles, *still]
    return deepcopy(model, {id(part): part for part in shared})


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Everything about one stage."""
    memory = {name: alone(peaks, name, case) for name in SIDES}
    model = starting(case)
    clips = dict(zip(SIDES, batches(case, model), strict=True))
    sides = {name: make(case.config, copied(case, model)) for name, make in SIDES.items()}
    numbers, losses = {name: count() for name in SIDES}, {name: [] for name in SIDES}

    def step(name: str) -> None:
        losses[name].append(sides[name].step(clips[name], next(numbers[name])))

    @torch.no_grad()
    def encode() -> None:
        with autocast(case.config, model):
            model.encode(clips["reference"].pixels)

    timings = interleaved({**{name: partial(step, name) for name in SIDES}, "encoding": encode}, rounds=rounds)
    seconds = {name: timing.median for name, timing in timings.items()}
    rows = {
        name: {
            **timings[name]._asdict(),
            "steps_per_second": 1 / seconds[name],
            "first_loss": losses[name][0],
            **memory[name],
        }
        for name in SIDES
    }
    return {
        **described(case, model, sides["ours"]),
        **rows,
        "encoding_seconds": seconds["encoding"],
        "speedup": seconds["reference"] / seconds["ours"],
        "speedup_without_encoding": (seconds["reference"] - seconds["encoding"]) / seconds["ours"],
        "memory_ratio": rows["ours"]["memory_bytes"] / rows["reference"]["memory_bytes"],
    }


def described(case: Case, model: VideoModel, side: Side) -> dict[str, Any]:
    """What was measured, in numbers."""
    config, adapter = case.config, case.config.adapter
    networks = [model.unet, *([] if adapter is None else [model.adapters[adapter.name]])]
    return {
        "recipe": config.name,
        "batch_size": config.batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "frames": 1 if case.stage == "image" else config.data.num_frames,
        "width": config.data.width,
        "height": config.data.height,
        "widths": model.unet.config.block_out_channels,
        "mixed_precision": config.mixed_precision,
        "gradient_checkpointing": config.gradient_checkpointing,
        "parameters": sum(value.numel() for network in networks for value in network.parameters()),
        "trainable": sum(value.numel() for value in side.parameters.values()),
    }


def alone(call: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - what the call returns
    """The result of a call in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def peaks(name: str, case: Case) -> dict[str, int]:
    """Bytes of tensors that two steps take at most (``memory_bytes``) in a process that has had ``base_bytes`` at most
    before, with libraries, autoencoder, text encoder and the model that is copied: all of its memory, or the GPU's."""
    model = starting(case)
    clips = dict(zip(SIDES, batches(case, model), strict=True))[name]

    def two_steps() -> None:
        side = SIDES[name](case.config, copied(case, model))
        for number in range(2):  # the optimiser's moments come with the first
            side.step(clips, number)

    if torch.cuda.is_available():
        base = torch.cuda.max_memory_allocated()
    else:
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory_bytes": peak_memory(two_steps), "base_bytes": base}


def table(found: dict[str, Any]) -> str:
    """A line a stage and side."""
    lines = [
        f"{'stage':<8} {'side':<10} {'steps/s':>8} {'s':>8} {'p95 s':>8} {'first s':>8} {'MiB':>8} {'resident':>9}"
    ]
    for stage, figures in found["stages"].items():
        for side in SIDES:
            row = figures[side]
            times = f"{row['steps_per_second']:>8.3f} {row['median']:>8.3f} {row['p95']:>8.3f} {row['first']:>8.3f}"
            lines.append(f"{stage:<8} {side:<10} {times} {row['memory_bytes'] / 2**20:>8.0f}")
        speed = f"{figures['speedup']:.2f} x as fast ({figures['speedup_without_encoding']:.2f} x without encoding)"
        lines.append(f"{stage:<8} {speed}, {figures['memory_ratio']:.2f} of the memory")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
