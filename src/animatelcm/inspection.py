"""What a file is: a bundle, a weight file, or a video made here, as plain facts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from animatelcm import video
from animatelcm.building import read_json
from animatelcm.bundle import ADAPTERS, FACTS_FILE, IMAGE_LORA
from animatelcm.hub import find
from animatelcm.images import at_home
from animatelcm.weights.families import FAMILIES, Family
from animatelcm.weights.files import WEIGHT_SUFFIXES, find_copy, read_header, read_metadata, sha256
from animatelcm.weights.identify import identify
from animatelcm.weights.motion import weights_file

PARTS = ("unet", "motion_adapter", "vae", "text_encoder")
ADAPTER_WORDS = {
    "ControlNetModel": "ControlNet",
    "T2IAdapter": "T2I-Adapter",
    "ImageEncoder": "image encoder",
    "ImageTokens": "image encoder (tokens)",
}
"""Classes in the config.json of an adapter's folder."""


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about a bundle's folder (or "emoji"), a file of weights or a video, ready for JSON.

    Raises ValueError where a path is none of them.
    """
    path = at_home(path)
    if str(path) == "emoji" or (path / "unet").is_dir():
        return _describe_bundle(find(str(path)))
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        return _describe_weights(path)
    if (path / "config.json").is_file():
        return _describe_part(path)
    if path.suffix.lower() in video.VIDEO_SUFFIXES + video.IMAGE_SUFFIXES or path.is_dir():
        return _describe_video(path)
    raise ValueError(
        f"{path} is neither a model folder, a file of weights ({', '.join(WEIGHT_SUFFIXES)}) nor a video "
        f"({', '.join(video.VIDEO_SUFFIXES)})"
    )


def _describe_bundle(folder: Path) -> dict[str, Any]:
    facts = folder / FACTS_FILE
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    files = list(folder.rglob("*.safetensors"))
    sizes = {part: _count(folder / part) for part in PARTS if (folder / part).is_dir()}
    adapters = {place.parent.name: place.parent for place in sorted((folder / ADAPTERS).glob("*/config.json"))}
    sizes |= {f"adapter {name}": _count(place) for name, place in adapters.items()}
    return {
        "kind": "model" if "motion_adapter" in sizes else "image model",
        "folder": str(folder),
        "parameters": sum(sizes.values()),
        **{f"{part} parameters": count for part, count in sizes.items()},
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
        **_parts(folder),
        **({"adapters": ", ".join(f"{k} ({_adapter(v)})" for k, v in adapters.items())} if adapters else {}),
        "betas": f"{scheduler['beta_schedule']} {scheduler['beta_start']} to {scheduler['beta_end']}",
        **(json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}),
    }


def _parts(folder: Path) -> dict[str, str]:
    """What else the bundle can be made of, where it holds more than one model."""
    teacher = (folder / "motion_adapter_teacher").is_dir()
    styles = sorted(path.stem for path in (folder / "styles").glob("*.safetensors"))
    found = {
        "acceleration": str(IMAGE_LORA) if (folder / IMAGE_LORA).is_file() else "",
        "teacher's motion": "motion_adapter_teacher" if teacher else "",
        "styles": ", ".join(styles),
    }
    return {name: value for name, value in found.items() if value}


def _adapter(folder: Path) -> str:
    """What an adapter's folder holds, for people to read; empty where it is no adapter's."""
    config = read_json(folder / "config.json")
    word = ADAPTER_WORDS.get(str(config.get("_class_name")), "")
    return f"{word} of pixels" if word and config.get("sees") == "pixels" else word


def _describe_part(folder: Path) -> dict[str, Any]:
    """A network's folder: an adapter's, which its settings name, or what the weights in it are."""
    if not (kind := _adapter(folder)):
        return _describe_weights(weights_file(folder))
    if (file := find_copy(folder, "diffusion_pytorch_model")) is None:
        raise ValueError(f"{folder} is a {kind} without its weights: diffusion_pytorch_model.safetensors is missing")
    facts = _describe_weights(file)
    return {**facts, "kind": f"{kind[0].upper()}{kind[1:]} ({facts['parameters']:,} parameters)"}


def _count(folder: Path) -> int:
    """Parameters in a part's weight files; positions are regenerated and do not count."""
    tensors = [item for file in folder.glob("*.safetensors") for item in read_header(file).items()]
    return sum(math.prod(info.shape) for name, info in tensors if not name.endswith("pos_embed.pe"))


def _describe_weights(path: Path) -> dict[str, Any]:
    kind = identify(header := read_header(path))
    family = FAMILIES.get(kind.family)
    return {
        "kind": str(kind),
        "file": str(path),
        "tensors": kind.tensors,
        "parameters": kind.parameters,
        "types": ", ".join(kind.types),
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "sha256": sha256(path),
        **({"settings": _settings(family), "settings from": family.source} if family else {}),
        **({"metadata": read_metadata(path)} if path.suffix == ".safetensors" else {}),
        "first": ", ".join(sorted(header)[:3]),
    }


def _settings(family: Family) -> str:
    """What a family recommends, in one line."""
    scale = f", LoRA scale {family.lora_scale:g}" if family.lora_scale != 1 else ""
    return (
        f"{family.beta_schedule} betas to {family.beta_end:g}, sampler {family.sampler}, "
        f"{family.num_inference_steps} steps on a grid of {family.solver_steps}, "
        f"guidance {family.guidance_scale:g}{scale}"
    )


def _describe_video(path: Path) -> dict[str, Any]:
    header = video.probe(path)
    still = path.suffix.lower() in video.IMAGE_SUFFIXES
    shape = {"frames": header.num_frames} | ({} if still else {"fps": float(header.fps or 0)})
    facts = {"kind": "picture" if still else "video", "file": str(path), **shape}
    if "command" not in header.metadata:
        return {**facts, "made by": "unknown: it carries no recipe of ours"}
    return {**facts, **header.metadata, **shape}
