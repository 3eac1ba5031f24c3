"""Checkpoints of a training run: tensors by name in safetensors, a manifest written last, all or nothing.

Layout of ``checkpoints/step-00000500``: ``weights.safetensors`` (what trains, float32), ``ema.safetensors``,
``target.safetensors`` (of a distillation), ``optimizer.safetensors`` (``<parameter>/<state>``), ``manifest.json``
(step, seconds, processes, of float16 its scaler, config). Random state needs no file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from animatelcm.config import TrainConfig
from animatelcm.ema import Ema
from animatelcm.weights.files import State, read_safetensors, write_safetensors

KEEP = 2
MAY_CHANGE = (
    "out",
    "steps",
    "log_every",
    "save_every",
    "sample_every",
    "sample_prompts",
    "gradient_checkpointing",
    "compile",
)
"""Fields that a resumed run may have of its own; so it may ``gradient_accumulation_steps``, where processes times that
stays."""


@dataclass
class TrainState:
    """Everything that a run changes: steps done, the trained parameters by name, their average, the optimiser."""

    step: int
    parameters: Mapping[str, Tensor]
    ema: Ema
    optimizer: Optimizer
    target: Ema | None = None
    """The average that makes a consistency distillation's targets."""
    start: str = ""
    """Fingerprint of the model that the run began with, whose frozen parts no checkpoint holds."""
    seconds: float = 0.0
    """Time spent in steps, over all resumptions."""
    processes: int = 1
    """That share a step."""
    scaler: GradScaler | None = None
    """Of float16: what multiplies the loss, so that gradients do not vanish."""
    scale: float = 0.0
    """The scaler's after the last step, known to the host."""
    skipped: int = 0
    """Steps that moved nothing, because their gradients overflowed in float16."""

    @property
    def updates(self) -> int:
        """Steps that moved the weights: what rates and averages count."""
        return self.step - self.skipped


def save(state: TrainState, folder: Path, config: str) -> Path:
    """Write a checkpoint under ``folder`` and drop all but the newest two. Returns its path."""
    final = folder / f"step-{state.step:08d}"
    unfinished = folder / f".{final.name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_safetensors(dict(state.parameters), unfinished / "weights.safetensors")
    write_safetensors(state.ema.state_dict(), unfinished / "ema.safetensors")
    if state.target is not None:
        write_safetensors(state.target.state_dict(), unfinished / "target.safetensors")
    write_safetensors(_optimizer_tensors(state), unfinished / "optimizer.safetensors")
    manifest = {
        "step": state.step,
        "start": state.start,
        "seconds": round(state.seconds, 1),
        "processes": state.processes,
        "skipped": state.skipped,
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "config": json.loads(config),
    }
    (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    unfinished.replace(final)
    for old in finished(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/manifest.json"))


def config_of(path: Path) -> TrainConfig:
    """The config of the run that wrote a checkpoint."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    return TrainConfig.from_json(json.dumps(manifest["config"]))


def processes_of(path: Path) -> int | None:
    """How many processes shared the steps of a checkpoint's run; None in one from before that was written down."""
    return json.loads((path / "manifest.json").read_text(encoding="utf-8")).get("processes")


def continues(config: TrainConfig, processes: int, saved: Path) -> str:
    """What to say where a checkpoint's run goes on with its step split in another way. Raises ValueError if it would
    be another run: how long it is, what it shows and how it keeps to its memory may change, what a step does may not.
    """
    then, before = config_of(saved), processes_of(saved) or processes
    names = [
        field.name for field in fields(TrainConfig) if field.name not in (*MAY_CHANGE, "gradient_accumulation_steps")
    ]
    if odd := [name for name in names if getattr(config, name) != getattr(then, name)]:
        raise ValueError(
            f"{config.folder} holds a run with another {odd[0]}; choose another name, or take that value again"
        )
    now, was = (processes, config.gradient_accumulation_steps), (before, then.gradient_accumulation_steps)
    if math.prod(now) != math.prod(was):
        raise ValueError(
            f"{config.folder} holds a run of {_spoken(was)}, here are {_spoken(now)}; keep the batches of a step by "
            f"--gradient-accumulation-steps, {math.prod(was)} in all"
        )
    return (
        "" if now == was else f"the batches of a step are the same, shared anew: {_spoken(now)}, before {_spoken(was)}"
    )


def _spoken(split: tuple[int, int]) -> str:
    return "{} processes x gradient_accumulation_steps {}".format(*split)


def restore(state: TrainState, path: Path) -> None:
    """Put a checkpoint back into a fresh state of the same run, in place. Raises ValueError if names differ."""
    manifest = json.loads((path / "manifest.json").read_text())
    if manifest["start"] != state.start:
        raise ValueError(f"{path} began with another model than the one here; choose another name to begin anew")
    state.step, state.seconds, state.skipped = manifest["step"], manifest["seconds"], manifest.get("skipped", 0)
    if state.scaler is not None and manifest.get("scaler"):
        state.scaler.load_state_dict(manifest["scaler"])
    weights = read_safetensors(path / "weights.safetensors")
    if odd := weights.keys() ^ state.parameters.keys():
        raise ValueError(f"{path} is of another run: {len(odd)} parameter names differ, e.g. {min(odd)!r}")
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(weights[name])
    state.ema.load_state_dict(read_safetensors(path / "ema.safetensors"))
    if state.target is not None:
        state.target.load_state_dict(read_safetensors(path / "target.safetensors"))
    _restore_optimizer(state, read_safetensors(path / "optimizer.safetensors"))


def _optimizer_tensors(state: TrainState) -> State:
    return {
        f"{name}/{key}": value
        for name, parameter in state.parameters.items()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(state: TrainState, tensors: State) -> None:
    for name, parameter in state.parameters.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"{name}/{key}")) is not None:
                value = value.to(parameter.device)
                # moments keep the parameter's strides: sums over memory in another order would round differently
                moment = value.shape == parameter.shape
                state.optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value) if moment else value
