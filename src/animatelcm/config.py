"""What a training run is, as frozen data: visible defaults, checked when made, strict when read."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DataKind = Literal["emoji-images", "emoji-clips", "folder"]
Objective = Literal["autoencoder", "diffusion", "consistency"]
Trainable = Literal["autoencoder", "decoder", "image", "motion", "lora", "adapter"]
AdapterKind = Literal["image", "image_tokens", "t2i_adapter", "controlnet"]
FED_BACK = ("edge", "tile", "pose")
"""Kinds of control maps that frames can be held against by a function with a gradient; pose: the miniature's."""
LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""What LCM-LoRA changes: 278 layers of Stable Diffusion 1.5."""


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
    moments: float = 0.5
    """Share of images that are moments of motions; the rest stands still."""
    degrade: bool = False
    """Make clips look as web videos do: blurred, blocky, watermarked, vaguely captioned."""
    num_frames: int = 16
    frame_stride: int = 1
    """Of a folder's videos: each so manieth frame; AnimateDiff learned from each fourth."""
    fps: float | None = None
    """In place of frame_stride: frames that show at this rate, whatever a video's own; slower videos are left out."""
    window: Literal["first", "random"] = "first"
    """Which frames of a folder's video are its clip: those it begins with, or from a place drawn with ``seed``."""
    repeats: int = 1
    """Clips of each video, at random places of their own; where nothing is kept (``cache``) more cost nothing."""
    caption_column: str | None = None
    """Of metadata.jsonl and metadata.csv; None: text, or else caption."""
    maps: Path | None = None
    """For an adapter that reads maps: a folder of them, frame for frame, by the names of the clips' files. None: they
    are made from the clips."""
    width: int = 64
    height: int = 64
    cache: bool = True
    """Encode every clip once and keep the latents (fp16) beside the run."""
    workers: int | None = field(default=None, compare=False)
    """Threads that make the next batches meanwhile, which changes nothing else; None: 2 where files are decoded at each
    step, 0 elsewhere."""

    def __post_init__(self) -> None:
        if (self.kind == "folder") != (self.path is not None):
            raise ValueError(
                f'data.kind={self.kind!r} with data.path={self.path}: kind "folder" and a path go together'
            )
        for name, least in {"num_frames": 1, "frame_stride": 1, "repeats": 1, "width": 1, "height": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: give {least} or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"data.workers={self.workers}: give 0 (none) or more")
        if self.fps is not None and (self.fps <= 0 or self.frame_stride > 1):
            raise ValueError(
                f"data.fps={self.fps} with data.frame_stride={self.frame_stride}: give fps above 0, and a stride of 1"
            )
        defaults = {
            "repeats": 1,
            "frame_stride": 1,
            "fps": None,
            "window": "first",
            "caption_column": None,
            "maps": None,
        }
        given = [name for name, value in defaults.items() if getattr(self, name) != value]
        if given and self.kind != "folder":
            raise ValueError(
                f'data.{given[0]} is for the files of data.kind "folder", not for {self.kind!r}; leave it out'
            )
        if self.repeats > 1 and self.window == "first":
            raise ValueError(
                f"data.repeats={self.repeats} are the same clips again; add data.window random, or leave repeats out"
            )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank layers beside the spatial ones; what they add counts alpha / rank."""

    name: str = "style"
    """Of its file, and of the style in the bundle."""
    rank: int = 64
    alpha: float = 8.0
    targets: tuple[str, ...] = LCM_TARGETS
    """Ends of the names of layers that get one."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(f"a LoRA needs rank >= 1, alpha > 0 and targets, got {self.rank}, {self.alpha}")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"lora.name={self.name!r} is to name a file: choose letters, digits, '_', '-' and '.'")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A network beside the UNet that shows it something: a picture, or a layout."""

    name: str = "i2v"
    """Of its folder in the bundle; of one that reads layouts, the kind of maps that it reads (edge, pose, depth)."""
    kind: AdapterKind = "image"
    """image: AnimateLCM's encoder of a picture; image_tokens: its cells as words, for comparison; t2i_adapter,
    controlnet: diffusers' networks."""
    sees: Literal["latent", "pixels"] = "latent"
    """Of kind image: what goes in."""
    spread: Literal["repeat", "first"] = "repeat"
    """Of kind image: the picture at every frame, or at the first one alone."""
    motion_scale: float = 0.8
    """Of kind image: how strong the frames' positions are, and will be where a request does not say."""
    start: Literal["fresh", "model"] = "fresh"
    """Where it begins: from nothing, or as the model's own of that name."""

    def __post_init__(self) -> None:
        if (self.name == "i2v") == self.reads_maps or not self.name.isidentifier():
            raise ValueError(
                f"adapter.name={self.name!r} with kind={self.kind!r}: an encoder of pictures is named i2v, and what "
                "reads maps after their kind, such as edge"
            )

    @property
    def reads_maps(self) -> bool:
        return self.kind in ("t2i_adapter", "controlnet")


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency distillation (AnimateLCM, section 4; the names of its symbols)."""

    solver_steps: int = 50
    """N: the sparse timesteps out of 1000 that are distilled; sampling visits some of them."""
    k: int | None = None
    """How many of the 1000 timesteps one solver step leads back; None: to the sparse neighbour, 1000 / N."""
    w_min: float = 5.0
    w_max: float = 15.0
    """Guidance that the teacher's step is augmented with (eq. 7, 8), uniform; w = 0 is none, w = scale - 1."""
    huber_c: float = 1e-3
    distance: Literal["elements", "clip"] = "elements"
    """Pseudo-Huber of every element, averaged (released code), or of the whole clip's norm (as the paper writes)."""
    first_frame: float = 1.0
    """How many other frames a clip's first one counts for: an encoder of pictures has to give that one back."""
    feedback: float = 0.0
    """How much it counts that the maps found in predicted frames are those an adapter was shown (``feedback``)."""
    feedback_frames: int = 4
    """Of a clip, drawn at random at each step: so many are decoded for it."""
    feedback_steps: int = 4
    """Of the sampler that makes those frames from noise; they are looked at after any of its evaluations."""
    delta: float = 0.0
    gamma: float = 1.0
    """lambda_n = (1 - delta n / N)^gamma (eq. 10)."""
    mu: float = 0.95
    """Decay of the target's average."""
    mu_lora: float | None = None
    """Decay with which a frozen LoRA reaches the target; None: mu, as if the merged weights were averaged."""
    target: Literal["ema", "online"] = "ema"
    """Who makes the target: the average, or the student itself without gradient."""
    earlier: Literal["teacher", "noise", "guided-noise"] = "teacher"
    """Who makes the earlier point: the teacher's guided step (eq. 8); the clip's own noise (eq. 12: no teacher); or
    that noise with the guidance that the image model gives each frame."""
    init: Literal["ema", "direct"] = "ema"
    """How a frozen LoRA comes to an averaged target: by averaging (the paper's initialisation strategy), or at once."""
    decouple: bool = True
    """Temporal layers learn on top of stage 1's frozen LoRA; False: both learn on videos, without stage 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.w_min <= self.w_max:
            raise ValueError(f"w_min={self.w_min}, w_max={self.w_max}: give 0 <= w_min <= w_max")
        for name in ("mu", "mu_lora", "delta"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be within 0..1")
        if self.huber_c <= 0:
            raise ValueError(f"huber_c={self.huber_c} must be positive, in units of latents")
        if self.gamma < 0:
            raise ValueError(f"gamma={self.gamma} must be 0 (all timesteps alike) or more")
        if self.first_frame <= 0:
            raise ValueError(f"first_frame={self.first_frame} must be positive; 1 weights all frames alike")
        if not 1 <= self.solver_steps <= 1000 or (self.k is not None and self.k < 1):
            raise ValueError(f"solver_steps={self.solver_steps} (1..1000) or k={self.k} (1 or more) is out of range")
        if self.feedback < 0 or self.feedback_frames < 1 or not 1 <= self.feedback_steps <= self.solver_steps:
            given = f"feedback={self.feedback}, feedback_frames={self.feedback_frames}"
            raise ValueError(
                f"{given}, feedback_steps={self.feedback_steps}: give a weight of 0 (none) or more, one frame or more, "
                "and 1 to solver_steps steps"
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
    motion: Path | None = None
    """Temporal layers to begin with in place of the model's own: AnimateDiff's file, or a MotionAdapter's folder."""
    beta_schedule: Literal["linear", "scaled_linear"] | None = None
    """Noise to train under, where it is not the model's own: AnimateDiff's is linear, Stable Diffusion's is not."""
    lora: LoraConfig | None = None
    """LoRA layers to train; where only temporal layers train, those of the model's stage 1 are there, frozen."""
    adapter: AdapterConfig | None = None
    """The adapter to train, from scratch, or with ``lora`` by LoRA layers on the one of the model."""
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    """For objective "consistency"."""
    out: Path = Path("runs/out")
    steps: int = 1000
    batch_size: int = 32
    """Clips or images of one forward pass, on each device."""
    gradient_accumulation_steps: int = 1
    """Batches of one optimiser step, one after another: gradients of so many times more clips, in the same memory."""
    learning_rate: float = 1e-4
    lr_schedule: Literal["constant", "onecycle"] = "constant"
    """Constant after the warm-up, or the warm-up and then half a cosine down to 1 % of the rate."""
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    text_dropout: float = 0.1
    timestep_shift: float = 1.0
    """Above 1: draw noisy timesteps more often, as Stable Diffusion 3 shifts them; 1 draws all alike."""
    max_loss_weight: float = 1.0
    """Above 1: weight the noise error of a timestep by 1 + 1 / SNR up to this bound; 1 weights all alike."""
    word_weight: float = 0.0
    """Where the text encoder trains: how much it counts that every word stays legible in the text embedding."""
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """fp16 is for GPUs; it resolves small differences of large numbers eight times as finely as bf16."""
    compile: bool = False
    """Fuse the UNet's operations by torch.compile: minutes at the first step, for runs of thousands."""
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    sample_every: int = 1000
    sample_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            *("steps", "batch_size", "gradient_accumulation_steps", "learning_rate"),
            *("log_every", "save_every", "sample_every"),
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift={self.timestep_shift} must be positive; 1 draws all timesteps alike")
        if self.max_loss_weight < 1:
            raise ValueError(f"max_loss_weight={self.max_loss_weight} must be 1 (all timesteps alike) or more")
        for name in ("ema_decay", "text_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be within 0..1")
        if (self.objective == "autoencoder") != (self.trainable in ("autoencoder", "decoder")):
            raise ValueError(
                f"objective={self.objective!r} cannot train {self.trainable!r}: "
                'objective="autoencoder" is for "autoencoder" or "decoder", and these are for it'
            )
        if self.data.kind == "emoji-images" and self.trainable == "motion":
            raise ValueError('trainable="motion" needs clips; choose data.kind "emoji-clips" or "folder"')
        if self.data.num_frames == 1 and self.trainable == "motion":
            raise ValueError('data.num_frames=1: trainable="motion" needs clips; give as many as the model makes')
        if self.objective == "consistency" and self.trainable not in ("lora", "motion", "adapter"):
            raise ValueError(f'objective="consistency" trains "lora", "motion" or "adapter", not {self.trainable!r}')
        if (self.trainable == "adapter") != (self.adapter is not None):
            raise ValueError('adapter describes what trains: give it with trainable="adapter", only there')
        if self.adapter is not None and (self.model == "new" or self.sample_prompts):
            raise ValueError("an adapter stands beside a model that exists, and has no sample_prompts; give neither")
        if self.consistency.feedback > 0 and (self.adapter is None or self.adapter.name not in FED_BACK):
            given = None if self.adapter is None else self.adapter.name
            raise ValueError(
                f"consistency.feedback is for adapters of {', '.join(FED_BACK)}, whose maps frames are held against; "
                f"with adapter.name={given!r} set it to 0"
            )
        if self.consistency.feedback > 0 and self.adapter.name == "pose" and self.data.kind == "folder":
            raise ValueError(
                "consistency.feedback finds things on the miniature's plain backgrounds alone, not where pose maps of "
                'data.kind "folder" have them; set it to 0'
            )
        if self.adapter is not None and self.lora is None and self.objective == "consistency" and self._taught:
            raise ValueError(
                'a teacher has no new adapter: set consistency.earlier="noise", or give lora to adapt one that is there'
            )
        if self.trainable != "adapter" and self.trains_lora != (self.lora is not None):
            raise ValueError(
                'lora describes what trains: give it with trainable="lora", "adapter" or without decoupling, only there'
            )
        if self.objective == "consistency" and not self._taught and self.trainable != "adapter":
            given = self.consistency.earlier
            raise ValueError(f'consistency.earlier="{given}" is for trainable="adapter"; others have a teacher')

    @property
    def _taught(self) -> bool:
        return self.consistency.earlier == "teacher"

    @property
    def trains_lora(self) -> bool:
        """Whether LoRA layers learn: by themselves, or with the temporal layers where nothing is decoupled."""
        coupled = self.objective == "consistency" and self.trainable == "motion" and not self.consistency.decouple
        return self.trainable == "lora" or coupled

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
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if described := [option for option in options if dataclasses.is_dataclass(option)]:
        return _from_dict(described[0], value, where)
    if Path in options:
        return Path(value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        raise ValueError(f"{where}={value!r} is not one of {', '.join(map(repr, typing.get_args(hint)))}")
    if hint in (int, float, bool, str) and not isinstance(value, (int, float) if hint is float else hint):
        raise ValueError(f"{where}={value!r} must be of type {hint.__name__}")
    return value
