"""A model written as a bundle (``bundle`` says how it lies there), whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animatelcm.adapters import settings_of
from animatelcm.building import read_json
from animatelcm.bundle import ADAPTERS, FACTS_FILE, IMAGE_LORA, TEACHER, WEIGHTS, adapter_folders
from animatelcm.model import VideoModel
from animatelcm.schedule import SchedulerClass
from animatelcm.weights.files import WEIGHT_SUFFIXES, State, write_safetensors
from animatelcm.weights.lora import Layout, Lora, modelspec, plain, write_lora

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.38.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save(
    model: VideoModel,
    folder: Path,
    dtype: torch.dtype = torch.float16,
    *,
    scheduler: SchedulerClass = "DDIMScheduler",
    adapters_of: Path | None = None,
) -> None:
    """Write the bundle; the folder appears whole or not at all, and replaces one that is there.

    What ``fusion.fuse`` added is left out where it can be added again: the base is written, and LoRAs beside it.
    ``fusion.baked`` makes a sum permanent. ``scheduler`` is the one that diffusers' pipelines begin with. Adapters in
    the model folder ``adapters_of`` are copied as they are, but for those whose names ``model`` has.
    """
    with new_folder(Path(folder)) as unfinished:
        _write_networks(model, unfinished, dtype)
        _write_loras(model, unfinished, dtype)
        model.tokenizer.save(unfinished / "tokenizer")
        write_json(unfinished / "scheduler" / "scheduler_config.json", model.schedule.to_diffusers(scheduler))
        write_json(unfinished / "model_index.json", MODEL_INDEX | {"scheduler": ["diffusers", scheduler]})
        write_json(unfinished / FACTS_FILE, asdict(model.facts))
        for place in adapter_folders(adapters_of) if adapters_of else ():
            if place.name not in model.adapters:
                shutil.copytree(place, unfinished / ADAPTERS / place.name)


def scheduler_of(model: VideoModel) -> SchedulerClass:
    """diffusers' scheduler for what a model's weights are: of few steps or of many."""
    return "LCMScheduler" if model.facts.sampler == "lcm" else "DDIMScheduler"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets this name when all went well, and is gone when it did not.

    It replaces a model's or a MotionAdapter's folder. Raises ValueError where the name belongs to anything else.
    """
    check_folder(folder)
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raises ValueError where a folder of weights cannot have this name: a file's, or that of what is kept."""
    if folder.exists() and not _replaceable(folder):
        raise ValueError(f"{folder} exists and is no model folder; choose another name, or move it away")
    if folder.name.endswith(WEIGHT_SUFFIXES):
        raise ValueError(
            f"{folder} is a file's name, and this is written as a folder; leave {folder.suffix} out, or convert it to "
            "a format that is one file (checkpoint, animatediff, kohya, peft)"
        )


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if (folder / "model_index.json").is_file() or not any(folder.iterdir()):
        return True
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == "MotionAdapter"


def _write_networks(model: VideoModel, folder: Path, dtype: torch.dtype) -> None:
    unet = _base_state(model, "unet", dtype)
    config = model.unet.config
    _write_part(folder / "unet", config.to_diffusers(), {k: v for k, v in unet.items() if "motion_modules" not in k})
    if model.unet.motion is not None:
        positions = {key: value.to(dtype) for key, value in model.unet.positions().items()}
        motion = {key: value for key, value in unet.items() if "motion_modules" in key}
        teacher = {key: value.to(dtype) for key, value in model.teacher_motion.items()}
        for name, state in {"motion_adapter": motion, TEACHER: teacher}.items():
            if state:
                _write_part(folder / name, model.unet.motion.to_diffusers(config), state | positions)
    _write_part(folder / "vae", model.vae.config.to_diffusers(), _base_state(model, "vae", dtype))
    text_config, text = model.text_encoder.config.to_transformers(), _base_state(model, "text_encoder", dtype)
    _write_part(folder / "text_encoder", text_config, text, weights="model.safetensors", config="config.json")
    for name, network in model.adapters.items():
        state = _base_state(model, f"adapter_{name}", dtype)
        _write_part(folder / ADAPTERS / name, settings_of(network), state)


def _base_state(model: VideoModel, part: str, dtype: torch.dtype) -> State:
    """One network's weights without what was fused into them; numbers that are not floating point stay as they are."""
    state = model.networks[part].state_dict()
    base = {name: model.kept.get(f"{part}.{name}", value) for name, value in state.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in base.items()}


def _write_loras(model: VideoModel, folder: Path, dtype: torch.dtype) -> None:
    files = {IMAGE_LORA: ("image_lcm", "acceleration", model.image_lora)}
    files |= {Path("styles") / f"{name}.safetensors": (name, "style", lora) for name, lora in model.styles.items()}
    for path, (title, kind, lora) in files.items():
        if lora:
            write_named_lora(lora, folder / path, title=title, kind=kind, base=model.facts.name, dtype=dtype)


def write_named_lora(
    lora: Lora,
    path: Path,
    *,
    title: str,
    kind: str,
    base: str,
    dtype: torch.dtype = torch.float16,
    layout: Layout = "kohya",
) -> None:
    """One LoRA as a file that says what it is (ModelSpec)."""
    layer = next(iter(plain(lora, path).values()))
    today = date.today().isoformat()
    facts = modelspec(title=title, kind=kind, base=base, rank=layer.rank, alpha=layer.alpha, date=today)
    write_lora(lora, path, metadata=facts, dtype=dtype, layout=layout)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Settings as JSON, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, default=list) + "\n", encoding="utf-8")


def _write_part(
    folder: Path,
    facts: dict[str, Any],
    state: dict[str, Tensor],
    weights: str = WEIGHTS,
    config: str = "config.json",
) -> None:
    write_json(folder / config, facts)
    write_safetensors(state, folder / weights)
