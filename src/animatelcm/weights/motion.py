"""Motion modules in files: AnimateDiff's layout, which AnimateLCM shares, and diffusers' MotionAdapter.

Positions are a fixed sinusoid: checked where a file has them, never kept, made anew. An AnimateLCM file has none.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from animatelcm.nets.motion import sinusoid
from animatelcm.weights.files import State, find_copy, read_state, write_safetensors
from animatelcm.weights.keys import (
    TEMPORAL,
    WRAPPED,
    Shape,
    Structure,
    image_encoder_shapes,
    is_motion,
    is_positions,
    motion_shapes,
    position_widths,
    to_animatediff,
    to_diffusers,
)

Layout = Literal["animatediff", "diffusers"]

HEADS, GROUPS, ROWS = 8, 32, 64
"""What AnimateDiff's files do not say: attention heads, groups of the norm, and rows where a file has no positions."""
IMAGE_ENCODER = "img_encoder."
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
"""Stem of the file in a diffusers folder."""
MOST, WIDEST = 8, 16_384
"""Levels, motion modules in a block on the way down and transformer blocks in each that a file may have, and channels:
what a file should hold is listed from their numbers, so a small file could ask for a list without end."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_ADDRESS = re.compile(
    r"(?:(down|up)_blocks\.([0-9]+)|mid_block)\.motion_modules\.([0-9]+)\.(?:transformer_blocks\.([0-9]+)\.)?"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class MotionFile:
    """Motion modules as a file holds them, with its facts."""

    state: State
    """Weights by our names, as stored; without positions."""
    structure: Structure
    layout: Layout
    rows: int | None
    """Positions in the file; None where it has none."""
    image_encoder: State = field(default_factory=dict)
    """AnimateLCM's encoder of a first frame, names without ``img_encoder.``; empty where there is none."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """The config.json of a diffusers folder; empty for a bare file."""

    @property
    def channels(self) -> tuple[int, ...]:
        return self.structure.channels

    @property
    def layers(self) -> int:
        return self.structure.layers

    @property
    def mid_block(self) -> bool:
        return self.structure.mid_block


def read_motion(path: Path) -> MotionFile:
    """Motion modules from a file in either layout, or from the folder of a diffusers ``MotionAdapter``.

    Takes a training checkpoint's motion modules and leaves its other weights. Raises ValueError with the file and its
    first key that is missing, that no motion module has, or that has another shape, numbers that are not finite, or
    positions that are not the sinusoid.
    """
    path = Path(path)
    settings = _read_settings(path)
    file = weights_file(path)
    found = read_state(file, lambda key: is_motion(key) or key.removeprefix(WRAPPED).startswith(IMAGE_ENCODER))
    motion = {key: value for key, value in found.items() if is_motion(key)}
    names = _names(file, (key for key in motion if not is_positions(key)))
    layout: Layout = "animatediff" if any(TEMPORAL in key for key in motion) else "diffusers"
    state = {ours: motion[theirs] for ours, theirs in names.items()}
    structure = _structure(file, state, names)
    shown = (
        names if layout == "diffusers" else {ours: to_animatediff(ours) for ours in motion_shapes(structure)} | names
    )
    _check(file, state, motion_shapes(structure), shown)
    rows = _rows(file, {key: value for key, value in motion.items() if is_positions(key)}, structure)
    encoder = {
        key.removeprefix(WRAPPED).removeprefix(IMAGE_ENCODER): value
        for key, value in found.items()
        if key not in motion
    }
    _check_image_encoder(file, encoder, structure.channels)
    _check_settings(path, settings, structure, rows)
    return MotionFile(
        state=state, structure=structure, layout=layout, rows=rows, image_encoder=encoder, settings=settings
    )


def config(file: MotionFile) -> dict[str, object]:
    """The settings of motion modules in the words of a diffusers ``MotionAdapter``'s config, and ``motion_norm``.

    What a folder's config.json says comes first. Files say neither heads nor groups, which are AnimateDiff's, and its
    norm sees a frame at a time, in its own files and in others' copies of them.
    """
    levels, layers, mid_block, depth = file.structure
    derived = {
        "block_out_channels": list(levels),
        "motion_layers_per_block": layers,
        "motion_transformer_layers_per_block": depth,
        "motion_mid_block_layers_per_block": 1,
        "motion_transformer_layers_per_mid_block": depth,
        "motion_num_attention_heads": HEADS,
        "motion_norm_num_groups": GROUPS,
        "motion_max_seq_length": file.rows or ROWS,
        "use_motion_mid_block": mid_block,
        "motion_norm": "per_frame",
    }
    return derived | dict(file.settings)


def write_motion(
    state: Mapping[str, Tensor],
    path: Path,
    *,
    layout: Layout,
    dtype: torch.dtype = torch.float16,
    rows: int | None = None,
    image_encoder: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write motion modules, by our names and without positions, as safetensors in a layout; round once, to ``dtype``.

    Without ``rows`` there are no positions in AnimateDiff's layout, by which ComfyUI-AnimateDiff-Evolved and
    sd-webui-animatediff know an AnimateLCM; the older AnimateDiff files have 24 or 32 rows. A ``MotionAdapter`` needs
    ``rows``, and has no place for an image encoder (names without ``img_encoder.``).

    Raises ValueError for other tensors than a set of motion modules has, and where a number does not fit ``dtype``.
    """
    path, encoder = Path(path), dict(image_encoder or {})
    structure = _structure(path, state)
    _check(path, state, motion_shapes(structure), {})
    _check_image_encoder(path, encoder, structure.channels)
    if layout == "diffusers" and (rows is None or encoder):
        lack = "needs rows of positions" if rows is None else "has no place for an image encoder"
        raise ValueError(f"{path}: a diffusers MotionAdapter {lack}; give rows, or write the animatediff layout")
    rename = to_animatediff if layout == "animatediff" else to_diffusers
    out = {rename(key): value for key, value in state.items()} | _positions(structure, rows, layout)
    out |= {IMAGE_ENCODER + key: value for key, value in encoder.items()}
    out = {key: value.to(dtype) for key, value in out.items()}
    for key in sorted(out):
        if not out[key].isfinite().all():
            raise ValueError(f"{path}: {key} has numbers that are not finite in {dtype}; nothing is written")
    write_safetensors(out, path, metadata)


def motion_modelspec(*, title: str, base: str, layout: Layout, date: str) -> dict[str, str]:
    """What a file of motion modules says about itself, in the keys of ModelSpec 1.0.0.

    ``base`` is the name of the image model that they were trained on, ``date`` is in ISO 8601. "emoji" is an
    architecture of its own; any other base is a Stable Diffusion 1.5.
    """
    base_architecture = "animatelcm-emoji" if base == "emoji" else "stable-diffusion-v1"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{base_architecture}/motion-module",
        "modelspec.implementation": layout,
        "modelspec.title": title,
        "modelspec.date": date,
    }


def weights_file(path: Path) -> Path:
    """The file of motion modules: the path itself, or what its folder holds. Raises ValueError where it holds none."""
    if not path.is_dir():
        return path
    if (file := find_copy(path, WEIGHTS)) is not None:
        return file
    raise ValueError(
        f"{path} has no motion modules: {WEIGHTS}.safetensors is missing; give a MotionAdapter's folder or a file"
    )


def _read_settings(path: Path) -> dict[str, object]:
    """A folder's config.json; empty for a file."""
    if not path.is_dir():
        return {}
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"{path} is no MotionAdapter: {CONFIG} is missing; give a folder that diffusers saved")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); fetch it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings by name; fetch it again")
    return settings


def _names(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """Our name -> the file's."""
    names: dict[str, str] = {}
    for key in sorted(keys):
        if names.setdefault(to_diffusers(key), key) != key:
            raise ValueError(f"{path}: {key} is the second tensor for {to_diffusers(key)}; keep one of them")
    return names


def _structure(path: Path, state: Mapping[str, Tensor], shown: Mapping[str, str] | None = None) -> Structure:
    """What the weights' names and the first norms' widths say, by which all else is checked; in bounds.

    ``shown`` is what the file calls a weight of ours, if not the same.
    """
    if any("_lora." in key or ".lora_" in key for key in state):
        raise ValueError(f"{path} is a LoRA of motion modules; give the motion modules that it changes")
    if not state:
        raise ValueError(f"{path} has no motion modules; give an AnimateDiff or AnimateLCM file, or a MotionAdapter's")
    shown = shown or {}
    found = [match for match in map(_ADDRESS.match, sorted(state)) if match]
    for match in found:
        if _beyond(match):
            raise ValueError(
                f"{path}: {shown.get(match.string, match.string)} is beyond the {MOST} levels, motion modules in a "
                "block and transformer blocks that are read; take a file for this architecture"
            )
    levels = len({match[2] for match in found if match[1] == "down"})
    layers = len({match[3] for match in found if match[1] == "down"})
    depth = len({match[4] for match in found if match[4]})
    firsts = [f"down_blocks.{i}.motion_modules.0.norm.weight" for i in range(max(levels, 1))]
    for key in firsts:
        if key not in state:
            raise ValueError(f"{path}: {key} is missing; the file is incomplete, fetch it again")
    for key in firsts:
        if not 1 <= state[key].numel() <= WIDEST:
            raise ValueError(
                f"{path}: {shown.get(key, key)} is for {state[key].numel()} channels, expected 1 to {WIDEST}; take a "
                "file for this architecture"
            )
    mid_block = any(key.startswith("mid_block.") for key in state)
    return Structure(tuple(state[key].numel() for key in firsts), layers, mid_block, max(depth, 1))


def _beyond(address: re.Match[str]) -> bool:
    """Whether a weight's level, module or block has a number that is too high; one module more is on the way up."""
    limits = MOST, MOST + (address[1] == "up"), MOST
    numbers = zip(address.groups()[1:], limits, strict=True)
    return any(number and (len(number) > 1 or int(number) >= limit) for number, limit in numbers)


def _check(
    path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, Shape], shown: Mapping[str, str], prefix: str = ""
) -> None:
    """Raise for the first key that is not what it should be, under the name that the file has for it."""
    for key in sorted(shapes.keys() | state.keys()):
        if problem := _problem(state.get(key), shapes.get(key)):
            raise ValueError(f"{path}: {prefix}{shown.get(key, key)} {problem}")


def _problem(value: Tensor | None, shape: Shape | None) -> str:
    """What is wrong with a tensor, as the rest of a sentence; empty if nothing is."""
    if value is None:
        return "is missing; the file is incomplete, fetch it again"
    if shape is None:
        return "is no part of the file's motion modules; take a file with whole motion modules and no others"
    if tuple(value.shape) != shape:
        return f"has shape {tuple(value.shape)}, expected {shape}; take a file for this architecture"
    if value.dtype not in DTYPES:
        return f"holds {value.dtype} numbers, expected one of {', '.join(map(str, DTYPES))}; convert the file"
    if not value.isfinite().all():
        return "holds numbers that are not finite; fetch the file again, or take one from before its training failed"
    return ""


def _check_image_encoder(path: Path, encoder: Mapping[str, Tensor], channels: tuple[int, ...]) -> None:
    if not encoder:
        return
    first = encoder.get("conv_in.weight")
    latent = first.shape[1] if first is not None and first.dim() == 4 else 4
    if not 1 <= latent <= WIDEST:
        raise ValueError(
            f"{path}: {IMAGE_ENCODER}conv_in.weight takes {latent} channels, expected 1 to {WIDEST}; take a file for "
            "this architecture"
        )
    _check(path, encoder, image_encoder_shapes(channels, latent), {}, IMAGE_ENCODER)


def _rows(path: Path, positions: Mapping[str, Tensor], structure: Structure) -> int | None:
    """How many positions a file has, each of them as it will be made anew; None where it has none."""
    if not positions:
        return None
    widths = position_widths(structure)
    if lacking := sorted(widths.keys() - {to_diffusers(key) for key in positions}):
        raise ValueError(f"{path}: {lacking[0]} is missing, and others are there; the file is incomplete")
    rows = next(iter(positions.values())).shape[-2:-1]
    for key in sorted(positions):
        value, width = positions[key], widths.get(to_diffusers(key))
        if width is None or tuple(value.shape) != (1, *rows, width) or not value.numel():
            expected = "no positions there" if width is None else f"(1, rows, {width}) with the same rows for all"
            raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}, expected {expected}; fetch it again")
        # A half-precision file's rounding, whatever its type is now.
        rounding = 2**-7 if value.dtype == torch.bfloat16 else 2**-10
        if not (value[0].float() - sinusoid(rows[0], width)).abs().max() < rounding:
            raise ValueError(f"{path}: {key} is not the sinusoid that positions are made of; trained ones are not read")
    return rows[0]


def _positions(structure: Structure, rows: int | None, layout: Layout) -> State:
    """Positions (1, rows, C) by their names in a layout; none for no rows."""
    if rows is None:
        return {}
    state = {key: sinusoid(rows, width)[None] for key, width in position_widths(structure).items()}
    if layout == "diffusers":
        return state
    first = {to_animatediff(key): value for key, value in state.items()}
    return first | {key.replace("attention_blocks.0", "attention_blocks.1"): v.clone() for key, v in first.items()}


def _check_settings(path: Path, settings: Mapping[str, object], structure: Structure, rows: int | None) -> None:
    """Raise where a folder's config.json says otherwise than its weights."""
    channels, layers, mid_block, _ = structure
    known: dict[str, list[object]] = {
        "block_out_channels": [list(channels)],
        "motion_layers_per_block": [layers, [layers] * len(channels)],
        "use_motion_mid_block": [mid_block],
        "motion_max_seq_length": [rows],
    }
    for key, allowed in known.items():
        if key in settings and None not in allowed and settings[key] not in allowed:
            said = f"{key} is {reprlib.repr(settings[key])}, and the weights say {allowed[0]!r}"
            raise ValueError(f"{path / CONFIG}: {said}; take both from one model")
