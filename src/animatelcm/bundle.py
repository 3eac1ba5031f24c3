"""The bundle on disk.

Folder layout: a diffusers Stable Diffusion folder (``unet``, ``vae``, ``text_encoder``, ``tokenizer``, ``scheduler``,
``model_index.json``), which diffusers' own pipelines load as an image model. Beside it ``motion_adapter``, a diffusers
``MotionAdapter``; of a distilled model also ``loras/image_lcm.safetensors`` (kohya), ``motion_adapter_teacher``, and
styles in ``styles/NAME.safetensors`` (kohya). ``animatelcm.json`` holds the facts that travel with the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from animatelcm.fusion import fuse
from animatelcm.model import Facts, VideoModel
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.request import ModelSource
from animatelcm.schedule import NoiseSchedule
from animatelcm.weights.files import State, read_safetensors, write_safetensors
from animatelcm.weights.formats import Lora, modelspec, read_lora, write_lora

_T = TypeVar("_T")
ASSETS = Path(__file__).parent / "assets"
FACTS_FILE = "animatelcm.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGE_LORA = Path("loras") / "image_lcm.safetensors"
HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*/*.json", "*/*.txt", "*/*.safetensors"]


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


def save(model: VideoModel, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the bundle; the folder appears whole or not at all, and replaces one that is there.

    What ``fusion.fuse`` added is left out where it can be added again: the base is written, and LoRAs beside it.
    ``fusion.baked`` makes a sum permanent.
    """
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write_networks(model, unfinished, dtype)
    _write_loras(model, unfinished, dtype)
    model.tokenizer.save_pretrained(str(unfinished / "tokenizer"))
    _write_json(unfinished / "scheduler" / "scheduler_config.json", model.schedule.to_diffusers())
    _write_json(unfinished / "model_index.json", MODEL_INDEX)
    _write_json(unfinished / FACTS_FILE, asdict(model.facts))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def _write_networks(model: VideoModel, folder: Path, dtype: torch.dtype) -> None:
    unet = _base_state(model, "unet", dtype)
    config = model.unet.config
    _write_part(folder / "unet", config.to_diffusers(), {k: v for k, v in unet.items() if "motion_modules" not in k})
    if model.unet.motion is not None:
        positions = {key: value.to(dtype) for key, value in model.unet.positions().items()}
        motion = {key: value for key, value in unet.items() if "motion_modules" in key}
        teacher = {key: value.to(dtype) for key, value in model.teacher_motion.items()}
        for name, state in {"motion_adapter": motion, "motion_adapter_teacher": teacher}.items():
            if state:
                _write_part(folder / name, model.unet.motion.to_diffusers(config), state | positions)
    _write_part(folder / "vae", _plain_config(model.vae.config), _base_state(model, "vae", dtype))
    # The classic key prefix: every release of transformers reads it, while what newer ones write older ones do not.
    text = _base_state(model, "text_encoder", dtype)
    text = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in text.items()}
    text_config = {"architectures": ["CLIPTextModel"], **model.text_encoder.config.to_diff_dict()}
    _write_part(folder / "text_encoder", text_config, text, weights="model.safetensors", config="config.json")


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
    lora: Lora, path: Path, *, title: str, kind: str, base: str, dtype: torch.dtype = torch.float16
) -> None:
    """One LoRA as a kohya file that says what it is (ModelSpec)."""
    layer = next(iter(lora.values()))
    today = date.today().isoformat()
    facts = modelspec(title=title, kind=kind, base=base, rank=layer.rank, alpha=layer.alpha, date=today)
    write_lora(lora, path, metadata=facts, dtype=dtype)


def load(
    source: str | Path = "emoji",
    *,
    device: torch.device | str = "cpu",
    teacher: bool = False,
    image_scale: float = 1.0,
) -> VideoModel:
    """Load a bundle: "emoji" (embedded), a folder, or a Hugging Face id. Weights are float32, in channels-last order.

    A distilled bundle comes with its image acceleration fused at ``image_scale``; ``teacher`` loads the many-step model
    that it was distilled from: no acceleration, the teacher's temporal layers, the teacher's settings. Raises
    ValueError where a folder is no bundle, naming what is missing.
    """
    folder = find(source)
    if not (folder / "unet" / "config.json").is_file():
        raise ValueError(
            f"{folder} is no model folder: unet/config.json is missing; give a diffusers folder or a hub id"
        )
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    model = VideoModel(
        unet=_load_unet(folder),
        vae=_quietly(AutoencoderKL.from_pretrained, folder / "vae"),
        text_encoder=_quietly(CLIPTextModel.from_pretrained, folder / "text_encoder", dtype=torch.float32),
        tokenizer=_quietly(CLIPTokenizer.from_pretrained, folder / "tokenizer"),
        schedule=NoiseSchedule.from_diffusers(_read_json(folder / "scheduler" / "scheduler_config.json")),
        facts=_load_facts(folder, str(source)),
        teacher_motion=_read_motion_state(folder / "motion_adapter_teacher"),
    )
    _read_loras(model, folder)
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    model.to(device)
    if teacher:
        return _as_teacher(model)
    if model.image_lora and image_scale:
        fuse(model, image=image_scale)
    return model


def load_sum(source: ModelSource, *, device: torch.device | str = "cpu") -> VideoModel:
    """The model that a source describes, its styles and acceleration fused at their scales.

    Raises ValueError where a part is missing or does not fit, and where ``image_scale`` has nothing to scale.
    """
    styles = source.styles()
    model = load(source.model, device=device, teacher=source.teacher, image_scale=source.image_scale)
    if source.image_scale not in (0, 1) and not model.acceleration[0]:
        raise ValueError(f"image_scale={source.image_scale}: this model has no image acceleration; leave the scale out")
    if styles:
        fuse(model, style=styles)
    return model


def _as_teacher(model: VideoModel) -> VideoModel:
    """The many-step model of a bundle, in place of the distilled one; its own teacher is itself."""
    model.unet.load_state_dict(model.teacher_motion, strict=False)
    return replace(model, facts=model.facts.of_teacher(), teacher_motion={})


def _read_loras(model: VideoModel, folder: Path) -> None:
    if (folder / IMAGE_LORA).is_file():
        model.image_lora = read_lora(folder / IMAGE_LORA, model.modules())
    for path in sorted((folder / "styles").glob("*.safetensors")):
        model.styles[path.stem] = read_lora(path, model.modules())


def find(source: str | Path) -> Path:
    """Where a bundle lies: the embedded one, a folder, or the local copy of a hub repository (fetched if need be)."""
    if source == "emoji":
        return ASSETS / "emoji" / "model"
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise ValueError(
            f"no model {str(source)!r}: give 'emoji', an existing folder, or a hub id such as 'owner/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(
            f"model {str(source)!r} is neither a folder, nor in the local cache, nor reachable: {error}"
        ) from error


def _quietly(read: Callable[..., _T], folder: Path, **options: Any) -> _T:  # noqa: ANN401 - from_pretrained's
    """Read a part from a local folder without the libraries' own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return read(str(folder), local_files_only=True, **options)
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_unet(folder: Path) -> VideoUNet:
    config = UNetConfig.from_diffusers(_read_json(folder / "unet" / "config.json"))
    state = read_safetensors(folder / "unet" / WEIGHTS)
    motion = None
    if (folder / "motion_adapter" / "config.json").is_file():
        motion, temporal = read_motion_adapter(folder / "motion_adapter")
        state |= temporal
    unet = VideoUNet(config, motion)
    unet.load_state_dict({key: value.float() for key, value in state.items()})
    return unet


class MotionAdapter(NamedTuple):
    """Temporal layers: their shape, and their weights by their names in ``unet``."""

    config: MotionConfig
    state: State


def read_motion_adapter(folder: Path) -> MotionAdapter:
    """Temporal layers from the folder of a diffusers ``MotionAdapter``. Raises ValueError where there are none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no MotionAdapter: config.json is missing; give a folder that diffusers saved")
    return MotionAdapter(MotionConfig.from_diffusers(_read_json(folder / "config.json")), _read_motion_state(folder))


def _read_motion_state(folder: Path) -> State:
    """Temporal layers by their names in ``unet``, without positions, which are regenerated; {} where there are none."""
    weights = read_safetensors(folder / WEIGHTS) if folder.is_dir() else {}
    return {key: value.float() for key, value in weights.items() if not key.endswith("pos_embed.pe")}


def _load_facts(folder: Path, name: str) -> Facts:
    path = folder / FACTS_FILE
    return Facts(**_read_json(path)) if path.is_file() else Facts(name=name)


def _plain_config(config: Any) -> dict[str, Any]:  # noqa: ANN401 - diffusers' FrozenDict
    return {key: value for key, value in dict(config).items() if not key.startswith("_") or key == "_class_name"}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, default=list) + "\n", encoding="utf-8")


def _write_part(
    folder: Path,
    facts: dict[str, Any],
    state: dict[str, Tensor],
    weights: str = WEIGHTS,
    config: str = "config.json",
) -> None:
    _write_json(folder / config, facts)
    write_safetensors(state, folder / weights)
