"""The bundle on disk.

Folder layout: a diffusers Stable Diffusion folder (``unet``, ``vae``, ``text_encoder``, ``tokenizer``, ``scheduler``,
``model_index.json``), which diffusers' own pipelines load as an image model. Beside it ``motion_adapter``, a diffusers
``MotionAdapter``; of a distilled model also ``loras/image_lcm.safetensors`` (kohya), ``motion_adapter_teacher``, and
styles in ``styles/NAME.safetensors`` (kohya). ``adapters/NAME`` holds what may stand beside the UNet: diffusers' folder
of a ControlNet or T2I-Adapter, or an image encoder with the keys of AnimateLCM's ``img_encoder``. ``animatelcm.json``
holds the facts that travel with the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from animatelcm import building
from animatelcm.adapters import Beside, read
from animatelcm.building import read_json, read_part
from animatelcm.fusion import fuse
from animatelcm.hub import ASSETS, find
from animatelcm.ldm import read_checkpoint
from animatelcm.model import Facts, VideoModel
from animatelcm.nets import sd15
from animatelcm.nets.autoencoder import Autoencoder
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig
from animatelcm.schedule import NoiseSchedule
from animatelcm.tokenizer import Tokenizer, read_merges
from animatelcm.vae import FILES as VAE_FILES
from animatelcm.vae import read_vae
from animatelcm.weights.files import State
from animatelcm.weights.lora import read_lora
from animatelcm.weights.motion import config as motion_settings
from animatelcm.weights.motion import read_motion

FACTS_FILE = "animatelcm.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGE_LORA = Path("loras") / "image_lcm.safetensors"
ADAPTERS = "adapters"
TEACHER = "motion_adapter_teacher"


def load(
    source: str | Path = "emoji",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    teacher: bool = False,
    image_scale: float = 1.0,
    adapters: Collection[str] | None = None,
    keep_teacher: bool = True,
    vae: str | Path = "",
) -> VideoModel:
    """Load a model: "emoji" (embedded), a folder, a checkpoint of Stable Diffusion 1.x (.safetensors, .ckpt), or a
    Hugging Face id (``hub.find``). Weights are converted to ``dtype``, convolutions kept in channels-last order.

    A distilled bundle comes with its image acceleration fused at ``image_scale``; ``teacher`` loads the many-step model
    that it was distilled from: no acceleration, the teacher's temporal layers, the teacher's settings. ``adapters``
    are loaded by their names, None: all of them; without ``keep_teacher`` a distilled model's teacher is not read, and
    not saved again. ``vae``: where the autoencoder is that takes the place of the model's own (``vae.read_vae``).
    Raises ValueError where a part is missing or does not fit, naming the file.
    """
    place, other = find(source), find(vae, VAE_FILES, "autoencoder") if vae else None
    if teacher:
        _check_teacher(place, str(source))
    if place.is_file():
        model = _from_file(place, dtype, other)
    else:
        model = _from_folder(place, str(source), dtype, other, with_teacher=teacher or keep_teacher)
    model.adapters = _read_adapters(place, adapters, dtype, model)
    model.to(device)
    if teacher:
        return _as_teacher(model)
    if model.image_lora and image_scale:
        fuse(model, image=image_scale)
    return model


def _check_teacher(folder: Path, name: str) -> None:
    """Whether a teacher's temporal layers are there, where the bundle says that they differ from its own."""
    if read_facts_file(folder, name).teacher.get("motion") and not (folder / TEACHER).is_dir():
        raise ValueError(
            f"{folder} lacks {TEACHER}, the temporal layers of its teacher: copy that folder back from where the model "
            "comes from, or do without the teacher (no --teacher)"
        )


def _from_folder(folder: Path, name: str, dtype: torch.dtype, vae: Path | None, *, with_teacher: bool) -> VideoModel:
    if not (folder / "unet" / "config.json").is_file():
        raise ValueError(
            f"{folder} is no model folder: unet/config.json is missing; give a diffusers folder, a checkpoint "
            "or a hub id"
        )
    motion, temporal = None, {}
    if (folder / "motion_adapter" / "config.json").is_file():
        found = read_motion(folder / "motion_adapter")
        motion, temporal = MotionConfig.from_diffusers(motion_settings(found)), found.state
    state = read_part(folder / "unet", "diffusion_pytorch_model") | temporal
    config, text = folder / "unet" / "config.json", folder / "text_encoder"
    model = VideoModel(
        unet=building.unet(UNetConfig.from_diffusers(read_json(config)), motion, state, dtype, str(folder / "unet")),
        vae=_vae_of_folder(folder / "vae", dtype, vae),
        text_encoder=building.text_encoder(read_json(text / "config.json"), _read_text_state(text), dtype, str(text)),
        tokenizer=Tokenizer.from_folder(folder / "tokenizer"),
        schedule=NoiseSchedule.from_diffusers(read_json(folder / "scheduler" / "scheduler_config.json")),
        facts=read_facts_file(folder, name),
        teacher_motion=_teacher_motion(folder / TEACHER, dtype) if with_teacher else {},
    )
    _read_loras(model, folder)
    return model


def _vae_of_folder(folder: Path, dtype: torch.dtype, other: Path | None) -> Autoencoder:
    config = read_json(folder / "config.json") if other is None or (folder / "config.json").is_file() else {}
    if other is not None:
        return read_vae(other, config, dtype)
    return building.autoencoder(config, read_part(folder, "diffusion_pytorch_model"), dtype, str(folder))


def _read_adapters(
    folder: Path, names: Collection[str] | None, dtype: torch.dtype, model: VideoModel
) -> dict[str, nn.Module]:
    wanted = [place for place in adapter_folders(folder) if names is None or place.name in names]
    return {place.name: read(place, place.name, Beside.of(model), dtype) for place in wanted}


def adapter_folders(folder: Path) -> list[Path]:
    return [path.parent for path in sorted((folder / ADAPTERS).glob("*/config.json"))]


def _read_text_state(folder: Path) -> State:
    return read_part(folder, "model" if any(folder.glob("model*.safetensors")) else "pytorch_model")


def _teacher_motion(folder: Path, dtype: torch.dtype) -> State:
    state = read_motion(folder).state if folder.is_dir() else {}
    return {key: value.to(dtype) for key, value in state.items()}


def _from_file(path: Path, dtype: torch.dtype, vae: Path | None) -> VideoModel:
    """A single-file checkpoint, with CLIP's tokenizer and Stable Diffusion's noise."""
    found = read_checkpoint(path, dtype, vae=vae is None)
    own = building.autoencoder(found.vae_config, found.vae, dtype, f"{path}: vae") if vae is None else None
    return VideoModel(
        unet=building.unet(found.unet_config, None, found.unet, dtype, f"{path}: unet"),
        vae=own or read_vae(vae, {}, dtype),
        text_encoder=building.text_encoder(found.text_config, found.text, dtype, f"{path}: text encoder"),
        tokenizer=Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), sd15.TOKENS),
        schedule=NoiseSchedule(beta_schedule="scaled_linear"),
        facts=Facts(name=path.stem),
    )


def _as_teacher(model: VideoModel) -> VideoModel:
    """The many-step model of a bundle, in place of the distilled one; its own teacher is itself."""
    model.unet.load_state_dict(model.teacher_motion, strict=False)
    return replace(model, facts=model.facts.of_teacher(), teacher_motion={})


def _read_loras(model: VideoModel, folder: Path) -> None:
    modules = model.modules()
    if (folder / IMAGE_LORA).is_file():
        model.image_lora = read_lora(folder / IMAGE_LORA, modules)
    for path in sorted((folder / "styles").glob("*.safetensors")):
        model.styles[path.stem] = read_lora(path, modules)


def read_facts_file(folder: Path, name: str) -> Facts:
    """What a bundle was made for; the defaults of its name where it does not say."""
    path = folder / FACTS_FILE
    return Facts(**read_json(path)) if path.is_file() else Facts(name=name)
