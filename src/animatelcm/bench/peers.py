"""The same weights in diffusers: what users would run otherwise."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from animatelcm import video
from animatelcm.bench.workload import PROMPT, Case
from animatelcm.model import VideoModel
from animatelcm.nets.autoencoder import Autoencoder
from animatelcm.nets.text_encoder import TextEncoder
from animatelcm.nets.unet import VideoUNet
from animatelcm.sampling import initial_noise
from animatelcm.tokenizer import Tokenizer
from animatelcm.weights.files import State

if TYPE_CHECKING:
    from diffusers import AnimateDiffPipeline, AutoencoderKL, UNetMotionModel
    from transformers import CLIPTextModel, CLIPTokenizer

_Network = TypeVar("_Network", bound=nn.Module)
SCRIPT = """
import sys
import torch
from diffusers import AnimateDiffPipeline
from animatelcm import video
folder, out, prompt, steps, frames, height, width = sys.argv[1:]
pipe = AnimateDiffPipeline.from_pretrained(folder)
made = pipe(prompt, num_frames=int(frames), num_inference_steps=int(steps), height=int(height), width=int(width),
            guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
video.write(video.to_uint8(made), out, fps=8, overwrite=True)
"""
"""A script of a user of diffusers, from a folder to a file; the file is written as ours is."""


def _as_loaded(value: Tensor) -> Tensor:
    """A copy in the order of files. (``contiguous`` would leave 1x1 kernels as they are, which then tell torch to take
    images for channels-last.)"""
    return value.detach().clone(memory_format=torch.contiguous_format)


def motion_unet(unet: VideoUNet) -> UNetMotionModel:
    """diffusers' video network with copies of these weights, in the memory order in which it loads them.

    Its GroupNorm in motion modules sees all frames at once (``MotionConfig.norm = "joint"``).
    """
    from diffusers import UNetMotionModel

    assert unet.motion is not None
    spatial = unet.config.to_diffusers()
    for key in ("_class_name", "flip_sin_to_cos", "freq_shift"):  # it has none of them, only Stable Diffusion's values
        spatial.pop(key)
    heads = spatial.pop("attention_head_dim")
    for key in ("down_block_types", "up_block_types"):
        spatial[key] = tuple(kind.replace("2D", "Motion") for kind in spatial[key])
    with torch.device("meta"):
        theirs = UNetMotionModel(
            **spatial,
            num_attention_heads=heads,
            motion_num_attention_heads=unet.motion.num_attention_heads,
            motion_max_seq_length=unet.motion.max_frames,
            use_motion_mid_block=unet.motion.use_mid_block,
        )
    return _copied(theirs, {**unet.state_dict(), **unet.positions()}).to(unet.dtype)


def autoencoder(vae: Autoencoder) -> AutoencoderKL:
    """diffusers' autoencoder with copies of these weights."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(vae.config.to_diffusers())
    return _copied(theirs, vae.state_dict())


def text_encoder(ours: TextEncoder) -> CLIPTextModel:
    """transformers' text encoder with copies of these weights, by the names that its release has."""
    from transformers import CLIPTextConfig, CLIPTextModel

    theirs = CLIPTextModel(CLIPTextConfig.from_dict(ours.config.to_transformers()))
    prefix = "text_model." if hasattr(theirs, "text_model") else ""
    state = {prefix + name.removeprefix("text_model."): value for name, value in ours.state_dict().items()}
    return _copied(theirs, state).to(ours.words.device)


def tokenizer(ours: Tokenizer) -> CLIPTokenizer:
    """transformers' tokenizer from the files that ours writes."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder))
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _copied(theirs: _Network, state: State) -> _Network:
    theirs.load_state_dict({name: _as_loaded(value) for name, value in state.items()}, assign=True)
    return theirs.eval().requires_grad_(False)


def pipeline(model: VideoModel) -> AnimateDiffPipeline:
    """diffusers' ``AnimateDiffPipeline`` with ``LCMScheduler`` and copies of a model's weights, silent."""
    from diffusers import AnimateDiffPipeline, LCMScheduler

    pipe = AnimateDiffPipeline(
        vae=autoencoder(model.vae),
        text_encoder=text_encoder(model.text_encoder),
        tokenizer=tokenizer(model.tokenizer),
        unet=motion_unet(model.unet),
        motion_adapter=None,
        scheduler=LCMScheduler.from_config(model.schedule.to_diffusers("LCMScheduler")),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compiled_pipeline(model: VideoModel) -> AnimateDiffPipeline:
    """diffusers' pipeline, its network compiled for the shapes of one case. What was compiled for earlier ones is
    forgotten: with it Dynamo would take shapes for variable from the second case on."""
    torch._dynamo.reset()
    pipe = pipeline(model)
    pipe.unet = torch.compile(pipe.unet, dynamic=False)
    return pipe


def networks(pipe: AnimateDiffPipeline) -> list[nn.Module]:
    """All that is loaded."""
    return [pipe.unet, pipe.vae, pipe.text_encoder]


def denoised(pipe: AnimateDiffPipeline, model: VideoModel, case: Case) -> Tensor:
    """``workload.denoised`` by diffusers."""
    return pipe(**_arguments(model, case), output_type="latent").frames


def to_frames(pipe: AnimateDiffPipeline, model: VideoModel, case: Case) -> np.ndarray:
    """``workload.to_frames`` by diffusers: (B, F, H, W, 3)."""
    return video.to_uint8(pipe(**_arguments(model, case), output_type="np").frames)


def to_file(pipe: AnimateDiffPipeline, model: VideoModel, case: Case, folder: str) -> None:
    """``workload.to_file`` by diffusers, written as ours is."""
    for i, frames in enumerate(to_frames(pipe, model, case)):
        video.write(frames, Path(folder) / f"theirs-{i}.mp4", fps=model.facts.fps, overwrite=True)


def _arguments(model: VideoModel, case: Case) -> dict[str, Any]:
    noise = initial_noise(model, case.request(model))
    return {
        "prompt": [PROMPT] * case.batch,  # it ignores num_videos_per_prompt
        "num_frames": case.frames,
        "height": case.size,
        "width": case.size,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "latents": noise.to(model.device, model.unet.dtype),
        "generator": torch.Generator(model.device).manual_seed(0),
    }
