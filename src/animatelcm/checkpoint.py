"""Checkpoints of a training run: tensors by name in safetensors, a manifest written last, all or nothing.

Layout of ``checkpoints/step-00000500``: ``weights.safetensors`` (what trains, float32), ``ema.safetensors``,
``target.safetensors`` (of a distillation), ``optimizer.safetensors`` (``<parameter>/<state>``), ``manifest.json``
(step, seconds, config). Random state needs no file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from animatelcm.config import TrainConfig
from animatelcm.ema import Ema
from animatelcm.weights.files import State, read_safetensors, write_safetensors

KEEP = 2


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


def restore(state: TrainState, path: Path) -> None:
    """Put a checkpoint back into a fresh state of the same run, in place. Raises ValueError if names differ."""
    manifest = json.loads((path / "manifest.json").read_text())
    if manifest["start"] != state.start:
        raise ValueError(f"{path} began with another model than the one here; choose another name to begin anew")
    state.step, state.seconds = manifest["step"], manifest["seconds"]
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
