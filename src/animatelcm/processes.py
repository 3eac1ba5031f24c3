"""Several processes at one run: how they begin, what they agree on, what they average. The loop is training's."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from animatelcm.checkpoint import TrainState
from animatelcm.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(hours=2)
"""How long processes wait for one that samples or saves."""
AGREE_EVERY = 10
"""Steps after which processes ask each other whether one was interrupted."""


def accelerator(config: TrainConfig) -> Accelerator:
    """The door to devices and other processes. Raises ValueError for processes that do not know of each other, and for
    float16 without a GPU."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError('mixed_precision="fp16" needs a GPU and there is none here; choose "bf16" or "no"')
    alike = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    AcceleratorState._reset_state()  # of this process' run before, whose precision may have been another
    found = Accelerator(
        mixed_precision=config.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), alike]
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and found.num_processes == 1:
        raise ValueError(
            f"{world} processes were started (WORLD_SIZE={world}) and would each train alone in the same folder; set "
            "ACCELERATE_USE_CPU=true where there is no GPU, or use accelerate launch -m animatelcm train ..."
        )
    return found


def address(accelerator: Accelerator, number: int) -> int:
    """Of the ``number``-th batch of this process among those of all: where it is drawn from. The batches of a step are
    the same however processes share them."""
    return number * accelerator.num_processes + accelerator.process_index


def means(accelerator: Accelerator, found: list[dict[str, Tensor]]) -> dict[str, float]:
    """Figures of the steps since the last time, averaged over these and over processes; ``found`` is emptied. Until
    then they stay where they were computed, and no step waits for them."""
    names = list(found[0])
    values = torch.stack([torch.stack([step[name].detach().float() for name in names]) for step in found]).mean(0)
    found.clear()
    return dict(zip(names, accelerator.reduce(values, "mean").tolist(), strict=True))


def ending(config: TrainConfig, accelerator: Accelerator, state: TrainState, asked: bool) -> bool:
    """Whether any process was asked to end: they all leave after the same step, or none does. They agree every few
    steps, and where one of them has just saved or sampled: each time they wait for one another."""
    if accelerator.num_processes == 1:
        return asked
    if all(state.step % every for every in (AGREE_EVERY, config.save_every, config.sample_every)):
        return False
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device)).item())
