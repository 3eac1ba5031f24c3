"""What a training run is, as frozen data: visible defaults, checked when made, strict when read."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DataKind = Literal["emoji-images", "emoji-clips", "folder"]
Objective = Literal["autoencoder", "diffusion"]
Trainable = Literal["autoencoder", "image", "motion"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from."""

    kind: DataKind = "emoji-images"
    path: Path | None = None
    """A folder with captions in metadata.jsonl, metadata.csv or .txt files; for kind "folder"."""
    length: int = 40_000
    """Clips of a generated data set."""
    seed: int = 0
    concepts: Literal["small", "all"] = "small"
    """The 64 concepts that two CPU cores can learn, or all of the pack."""
    styles: tuple[str, ...] = ("noto", "fluent-flat", "fluent-3d")
    """Sheets of the pack by name, or the path of any .webp sheet of the same layout (openmoji, say)."""
    degrade: bool = False
    """Make clips look as web videos do: blurred, blocky, watermarked, vaguely captioned."""
    num_frames: int = 16
    width: int = 64
    height: int = 64
    cache: bool = True
    """Encode every clip once and keep the latents (fp16) beside the run."""

    def __post_init__(self) -> None:
        if (self.kind == "folder") != (self.path is not None):
            raise ValueError(
                f'data.kind={self.kind!r} with data.path={self.path}: kind "folder" and a path go together'
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; recipes are functions that return one."""

    name: str
    objective: Objective
    trainable: Trainable
    model: str = "emoji"
    """What it starts from: "emoji", a bundle's folder, a hub id, or "new" for the miniature with random weights."""
    data: DataConfig = field(default_factory=DataConfig)
    out: Path = Path("runs/out")
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-4
    lr_schedule: Literal["constant", "onecycle"] = "constant"
    """Constant after the warm-up, or the warm-up and then half a cosine down to 1 % of the rate."""
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    text_dropout: float = 0.1
    max_loss_weight: float = 1.0
    """Above 1: weight the noise error of a timestep by 1 + 1 / SNR up to this bound; 1 weights all alike."""
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    sample_every: int = 1000
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive = {"steps": self.steps, "batch_size": self.batch_size, "learning_rate": self.learning_rate}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.max_loss_weight < 1:
            raise ValueError(f"max_loss_weight={self.max_loss_weight} must be 1 (all timesteps alike) or more")
        for name in ("ema_decay", "text_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be within 0..1")
        if self.data.kind == "emoji-images" and self.trainable == "motion":
            raise ValueError('trainable="motion" needs clips; choose data.kind "emoji-clips" or "folder"')

    @property
    def folder(self) -> Path:
        """Where the run keeps its config, metrics, samples, checkpoints and the finished model."""
        return self.out / self.name

    def to_json(self) -> str:
        """The resolved config, as written into the run's folder."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what ``to_json`` wrote. Raises ValueError naming an unknown or missing field."""
        return _from_dict(cls, json.loads(text), "config")


def _from_dict(kind: Any, values: dict[str, Any], where: str) -> Any:  # noqa: ANN401 - any dataclass
    known = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := values.keys() - known.keys():
        raise ValueError(f"{where} has no field {min(unknown)!r}; its fields are {', '.join(sorted(known))}")
    hints = typing.get_type_hints(kind)
    try:
        return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401 - any JSON value to any field
    if dataclasses.is_dataclass(hint):
        return _from_dict(hint, value, where)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if Path in options:
        return Path(value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        raise ValueError(f"{where}={value!r} is not one of {', '.join(map(repr, typing.get_args(hint)))}")
    if hint in (int, float, bool, str) and not isinstance(value, (int, float) if hint is float else hint):
        raise ValueError(f"{where}={value!r} must be of type {hint.__name__}")
    return value
