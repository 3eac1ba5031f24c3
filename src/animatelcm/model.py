"""The bundle: what is loaded, saved and handed around.

Folder layout: a diffusers Stable Diffusion folder (``unet``, ``vae``, ``text_encoder``, ``tokenizer``,
``scheduler``, ``model_index.json``), which diffusers' own pipelines load as an image model, with the temporal layers
beside it (``motion_adapter``, a diffusers ``MotionAdapter``) and ``animatelcm.json``: the facts that travel with the
weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.schedule import NoiseSchedule
from animatelcm.weights.files import read_safetensors, write_safetensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

_T = TypeVar("_T")
ASSETS = Path(__file__).parent / "assets"
FACTS_FILE = "animatelcm.json"
HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*/*.json", "*/*.txt", "*/*.safetensors"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model was made for; the defaults of every request that does not say otherwise."""

    name: str
    width: int = 512
    height: int = 512
    num_frames: int = 16
    fps: float = 8.0
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    trained: dict[str, Any] = field(default_factory=dict)
    """Recipe -> how it was run: steps, seconds, hardware, version."""


@dataclass
class VideoModel:
    """One latent video diffusion model: networks, tokenizer, noise schedule, facts."""

    unet: VideoUNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    facts: Facts

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The parts that hold weights, by the names that state files and recipes use."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: torch.device | str) -> VideoModel:
        """Move every network, in place; convolutions keep channels last."""
        for network in self.networks.values():
            network.to(device=device, memory_format=torch.channels_last)
        return self

    def fingerprint(self, part: str) -> str:
        """A hash of one network's weights."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.networks[part].state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def downscale(self) -> int:
        """Pixels a latent cell covers on each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Text (B strings) -> (B, L, D), the text encoder's last hidden state; longer texts are cut at L tokens."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] -> latents (B, C, F, h, w), the posterior's mean, of unit variance."""
        flat, frames = _fold(pixels.to(self.device))
        mean = self.vae.encode(flat.to(self.vae.dtype)).latent_dist.mode()
        return _unfold(mean.float() * self.vae.config.scaling_factor, frames)

    def decode(self, latents: Tensor, chunk: int = 16) -> np.ndarray:
        """Latents (B, C, F, h, w) -> uint8 frames (B, F, H, W, 3), ``chunk`` frames at a time."""
        flat, _ = _fold(latents)
        parts = []
        for part in flat.split(chunk):
            pixels = self.vae.decode((part / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
            parts.append(pixels.float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8).cpu())
        frames = torch.cat(parts).permute(0, 2, 3, 1)
        return frames.unflatten(0, (latents.shape[0], -1)).numpy()

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the bundle; the folder appears whole or not at all, and replaces one that is there."""
        folder = Path(folder)
        unfinished = folder.with_name(folder.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self._write_parts(unfinished, dtype)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)

    def _write_parts(self, folder: Path, dtype: torch.dtype) -> None:
        state = {key: value.to(dtype) for key, value in self.unet.state_dict().items()}
        spatial = {key: value for key, value in state.items() if "motion_modules" not in key}
        _write_part(folder / "unet", self.unet.config.to_diffusers(), spatial)
        if self.unet.motion is not None:
            motion = {key: value for key, value in state.items() if "motion_modules" in key}
            motion |= {k: v.to(dtype) for k, v in self.unet.positions().items()}
            _write_part(folder / "motion_adapter", self.unet.motion.to_diffusers(self.unet.config), motion)
        vae = {key: value.to(dtype) for key, value in self.vae.state_dict().items()}
        _write_part(folder / "vae", _plain_config(self.vae.config), vae)
        # The classic key prefix: every release of transformers reads it, while what newer ones write older ones do not.
        text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in self.text_encoder.state_dict().items()}
        text = {key: value.to(dtype) if value.is_floating_point() else value for key, value in text.items()}
        text_config = {"architectures": ["CLIPTextModel"], **self.text_encoder.config.to_diff_dict()}
        _write_part(folder / "text_encoder", text_config, text, weights="model.safetensors", config="config.json")
        self.tokenizer.save_pretrained(str(folder / "tokenizer"))
        _write_json(folder / "scheduler" / "scheduler_config.json", self.schedule.to_diffusers())
        _write_json(folder / "model_index.json", MODEL_INDEX)
        _write_json(folder / FACTS_FILE, asdict(self.facts))


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


def load(source: str | Path = "emoji", *, device: torch.device | str = "cpu") -> VideoModel:
    """Load a bundle: "emoji" (embedded), a folder, or a Hugging Face id. Weights are float32, in channels-last order.

    Raises ValueError where a folder is not one, naming what is missing.
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
    )
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    return model.to(device)


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
    state = read_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors")
    motion = None
    if (folder / "motion_adapter" / "config.json").is_file():
        motion = MotionConfig.from_diffusers(_read_json(folder / "motion_adapter" / "config.json"))
        weights = read_safetensors(folder / "motion_adapter" / "diffusion_pytorch_model.safetensors")
        state |= {key: value for key, value in weights.items() if not key.endswith("pos_embed.pe")}
    unet = VideoUNet(config, motion)
    unet.load_state_dict({key: value.float() for key, value in state.items()})
    return unet


def _load_facts(folder: Path, name: str) -> Facts:
    path = folder / FACTS_FILE
    return Facts(**_read_json(path)) if path.is_file() else Facts(name=name)


def with_motion(model: VideoModel, motion: MotionConfig) -> VideoModel:
    """The same model with fresh temporal layers: draws exactly what the image model draws, frame by frame."""
    unet = VideoUNet(model.unet.config, motion)
    unet.load_state_dict(model.unet.state_dict(), strict=False)
    return replace(model, unet=unet)


def _fold(video: Tensor) -> tuple[Tensor, int]:
    """(B, C, F, h, w) -> ((B F), C, h, w) in channels-last order, and F."""
    flat = video.transpose(1, 2).flatten(0, 1)
    return flat.contiguous(memory_format=torch.channels_last), video.shape[2]


def _unfold(flat: Tensor, frames: int) -> Tensor:
    """((B F), C, h, w) -> (B, C, F, h, w)."""
    return flat.unflatten(0, (-1, frames)).transpose(1, 2)


def _plain_config(config: Any) -> dict[str, Any]:  # noqa: ANN401 - diffusers' FrozenDict
    return {key: value for key, value in dict(config).items() if key != "_name_or_path"}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, default=list) + "\n", encoding="utf-8")


def _write_part(
    folder: Path,
    facts: dict[str, Any],
    state: dict[str, Tensor],
    weights: str = "diffusion_pytorch_model.safetensors",
    config: str = "config.json",
) -> None:
    _write_json(folder / config, facts)
    write_safetensors(state, folder / weights)
