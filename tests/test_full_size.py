"""Stable Diffusion 1.5, AnimateLCM and two LoRAs at their real size, with random numbers: memory, time, one step.

``pytest -m slow tests/test_full_size.py -s`` prints the figures. It takes minutes, 10 GB of memory and 5 GB of disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, MotionAdapter
from safetensors.torch import save_file

import standins
from animatelcm.bundle import load
from animatelcm.images import write_image
from animatelcm.nets import sd15
from animatelcm.saving import save

WIDTHS = (320, 640, 1280, 1280)
PARAMETERS = 859_520_964 + 83_653_863 + 123_060_480 + 453_209_280
OURS = """
import json, resource, sys, time
import torch
from animatelcm import Pipeline
base, motion, fast, style = sys.argv[1:]
began = time.perf_counter()
pipe = Pipeline.from_pretrained(base, motion=motion, loras=[(fast, 0.8), (style, 0.5)], dtype=torch.float16, keep=False)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
count = sum(p.numel() for net in pipe.model.networks.values() for p in net.parameters())
print(json.dumps({"seconds": seconds, "peak": peak, "parameters": count}))
"""
THEIRS = """
import json, resource, sys, time
import torch
began = time.perf_counter()
from diffusers import AnimateDiffPipeline, LCMScheduler, MotionAdapter, StableDiffusionPipeline
base, motion, fast, style, config = sys.argv[1:]
half = {"torch_dtype": torch.float16}
adapter = MotionAdapter.from_single_file(motion, config=config + "/motion", **half)
image = StableDiffusionPipeline.from_single_file(base, config=config, **half)
pipe = AnimateDiffPipeline(vae=image.vae, text_encoder=image.text_encoder, tokenizer=image.tokenizer, unet=image.unet,
                           motion_adapter=adapter, scheduler=LCMScheduler())
pipe.load_lora_weights(fast, adapter_name="fast")
pipe.load_lora_weights(style, adapter_name="style")
pipe.set_adapters(["fast", "style"], [0.8, 0.5])
pipe.fuse_lora()
pipe.unload_lora_weights()
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""
FORWARD = """
import json, sys, time
import torch
from animatelcm import Pipeline
base, motion, fast, style = sys.argv[1:]
pipe = Pipeline.from_pretrained(base, motion=motion, loras=[(fast, 0.8), (style, 0.5)], keep=False)
began = time.perf_counter()
(video,) = pipe("a cat", num_frames=2, num_inference_steps=1)
print(json.dumps({"seconds": time.perf_counter() - began, "shape": video.frames.shape}))
"""
STEERED = """
import json, resource, sys, time
import torch
from animatelcm import Pipeline, decoding
base, motion, controlnet, image, folder, steered = sys.argv[1:]
adapters = ("canny=" + controlnet,) if steered == "1" else ()
pipe = Pipeline.from_pretrained(base, motion=motion, adapter=adapters, keep=False)
whole = decoding.whole

def keep(name, decode):
    def kept(model, draft):
        torch.save(draft.latents, f"{folder}/{name}.pt")
        return decode(model, draft)
    decoding.whole = kept

def made(**extra):
    (video,) = pipe("a cat", num_frames=2, num_inference_steps=1, seed=1, **extra)
    return video

keep("both" if steered == "1" else "plain", whole)
extra = {"image": image, "control": ("canny=" + image,)} if steered == "1" else {}
plain = {"colour_match": 0.0} if steered == "1" else {}
began = time.perf_counter()
video = made(**extra, **plain)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "shape": video.frames.shape, "phases": video.seconds}))
torch.save(torch.from_numpy(video.frames), f"{folder}/frames_{steered}.pt")
if steered == "1":
    for name, value in extra.items():
        keep(name, lambda model, draft: None)
        made(**{name: value})
    for parameter in pipe.model.adapters["i2v"].parameters():
        torch.nn.init.zeros_(parameter)
    keep("neither", lambda model, draft: None)
    made(image=image, control=(f"canny={image}:0",), motion_scale=0.0)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    shapes = {
        "base": standins.ldm_checkpoint(WIDTHS, standins.VAE, standins.TEXT),
        "motion": standins.animatelcm_t2v(WIDTHS),
        "fast": standins.lcm_lora(WIDTHS, standins.TEXT),
        "style": standins.lcm_lora(WIDTHS, standins.TEXT, rank=32),
    }
    paths = []
    for seed, (name, part) in enumerate(shapes.items()):
        paths.append(str(folder / f"{name}.safetensors"))
        save_file(standins.fill(part, torch.float16, seed=seed), paths[-1])
    return paths


def _settings(folder: Path) -> Path:
    """A diffusers folder without weights, which its loaders of single files want beside them."""
    save_file(standins.fill(standins.ldm_checkpoint(text=64, layers=2)), folder / "tiny.safetensors")
    save(load(folder / "tiny.safetensors"), folder / "settings")
    sizes = {
        "unet": {"block_out_channels": WIDTHS, "cross_attention_dim": standins.TEXT},
        "vae": {"block_out_channels": standins.VAE},
        "text_encoder": sd15.TEXT,
    }
    for part, changed in sizes.items():
        path = folder / "settings" / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with torch.device("meta"):
        MotionAdapter(block_out_channels=WIDTHS, motion_max_seq_length=64).save_config(folder / "settings" / "motion")
    return folder / "settings"


def _run(script: str, *words: str) -> dict:
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_full_size_sum_loads_within_its_memory(files, tmp_path):
    ours = _run(OURS, *files)
    assert ours["parameters"] == PARAMETERS
    sys.stdout.write(f"\nours: {ours}, {ours['peak'] / (2 * PARAMETERS):.2f} x the weights\n")
    assert ours["peak"] <= 1.3 * 2 * PARAMETERS + 0.5e9

    theirs = _run(THEIRS, *files, str(_settings(tmp_path)))
    sys.stdout.write(f"diffusers: {theirs}\n")


@pytest.mark.slow
def test_a_full_size_video_is_made_to_the_end(files):
    made = _run(FORWARD, *files)
    sys.stdout.write(f"\none step of two frames of 512 x 512: {made}\n")
    assert made["shape"] == [2, 512, 512, 3]


@pytest.mark.slow
def test_a_full_size_picture_is_animated_under_a_controlnet(files, tmp_path):
    """Each adapter acts, alone and beside the other, and neither where it has no strength."""
    motion = tmp_path / "i2v.safetensors"
    save_file(standins.fill(standins.animatelcm_i2v(WIDTHS), torch.float16, seed=7), motion)
    torch.manual_seed(0)
    network = ControlNetModel(block_out_channels=WIDTHS, cross_attention_dim=768)
    for parameter in network.parameters():
        if not parameter.any():  # a fresh one adds nothing
            torch.nn.init.normal_(parameter, std=0.02)
    network.half().save_pretrained(tmp_path / "canny")
    picture = tmp_path / "picture.png"
    write_image(np.random.default_rng(0).integers(0, 256, (512, 640, 3), dtype=np.uint8), picture)
    for steered in "01":
        made = _run(STEERED, files[0], str(motion), str(tmp_path / "canny"), str(picture), str(tmp_path), steered)
        sys.stdout.write(f"\none step of two frames, {'steered' if steered == '1' else 'plain'}: {made}\n")
        assert made["shape"] == [2, 512, 512, 3]

    latents = {
        name: torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("plain", "image", "control", "both", "neither")
    }
    plain = latents["plain"]
    assert plain.isfinite().all()
    for one, two in combinations(("plain", "image", "control", "both"), 2):
        apart = float((latents[one] - latents[two]).std() / plain.std())
        sys.stdout.write(f"latents, {one} against {two}: {apart:.1e} of their spread apart\n")
        assert apart > 1e-4
    assert torch.equal(latents["neither"], plain)
    assert not torch.equal(*(torch.load(tmp_path / f"frames_{steered}.pt", weights_only=True) for steered in "01"))
