"""A model on disk: what is saved is loaded, here and in diffusers, from a folder or from the hub's cache."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from animatelcm.bundle import load
from animatelcm.hub import ASSETS, find
from animatelcm.request import SampleRequest
from animatelcm.sampling import initial_noise, sample_steps
from animatelcm.saving import save


def test_a_saved_bundle_is_the_same_model(fresh_model, fresh_folder):
    again = load(fresh_folder)
    assert again.schedule == fresh_model.schedule
    assert again.facts == fresh_model.facts
    for name, network in fresh_model.networks.items():
        ours, theirs = network.state_dict(), again.networks[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(again.embed(["a parrot", ""]), fresh_model.embed(["a parrot", ""]))


def test_half_precision_files_are_half_the_size_and_load_as_float32(fresh_model, fresh_folder, tmp_path):
    save(fresh_model, tmp_path / "half")
    sizes = [sum(f.stat().st_size for f in path.rglob("*.safetensors")) for path in (fresh_folder, tmp_path / "half")]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.01)
    assert all(p.dtype == torch.float32 for n in load(tmp_path / "half").networks.values() for p in n.parameters())


@pytest.mark.parametrize("source", ["random weights", "the shipped bundle"])
def test_diffusers_draws_the_same_picture(fresh_folder, source):
    from diffusers import StableDiffusionPipeline

    path = find("emoji") if source == "the shipped bundle" else fresh_folder
    model = load(path, teacher=True)
    pipe = StableDiffusionPipeline.from_pretrained(path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    request = SampleRequest(prompt="a parrot", num_frames=1, num_inference_steps=8, guidance_scale=4.0, seed=3)
    request = request.resolved(model.facts)
    noise = initial_noise(model, request)
    with torch.inference_mode():
        *_, last = sample_steps(model, request)
        ours = model.vae.decode(last.latents[:, :, 0] / model.vae.config.scaling_factor)[0]
    theirs = pipe(
        "a parrot",
        num_inference_steps=8,
        guidance_scale=4.0,
        latents=noise[:, :, 0],
        height=64,
        width=64,
        output_type="np",
    ).images[0]
    assert np.abs(theirs - (ours.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)).max() < 1e-3


def test_diffusers_loads_the_temporal_layers(fresh_model, fresh_folder):
    from diffusers import MotionAdapter

    state = MotionAdapter.from_pretrained(fresh_folder / "motion_adapter", local_files_only=True).state_dict()
    ours = fresh_model.unet.state_dict()
    motion = {key for key in ours if "motion_modules" in key}
    assert {key for key in state if not key.endswith("pos_embed.pe")} == motion
    assert all(torch.equal(state[key], ours[key]) for key in motion)


def test_the_text_encoder_has_the_classic_keys(fresh_folder):
    from safetensors import safe_open

    with safe_open(fresh_folder / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118


def test_encode_and_decode_keep_shapes_and_chunks_do_not_matter(fresh_model):
    pixels = torch.rand(2, 3, 5, 64, 64) * 2 - 1
    with torch.inference_mode():
        latents = fresh_model.encode(pixels)
        assert latents.shape == (2, 16, 5, 8, 8)
        whole, parts = fresh_model.decode(latents), fresh_model.decode(latents, chunk=3)
    assert whole.shape == (2, 5, 64, 64, 3)
    assert np.abs(whole.astype(int) - parts).max() <= 1


def test_frames_are_encoded_one_by_one(fresh_model):
    pixels = torch.rand(1, 3, 4, 64, 64) * 2 - 1
    with torch.inference_mode():
        video = fresh_model.encode(pixels)
        alone = fresh_model.encode(pixels[:, :, 2:3])
    assert torch.allclose(video[:, :, 2:3], alone, atol=1e-4)


@pytest.mark.parametrize("source", ["no/such/model", "nothing-here", "owner/absent"])
def test_a_model_that_is_not_there_is_one_sentence(source):
    with pytest.raises(ValueError, match=source):
        load(source)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"unet/config\.json"):
        load(tmp_path)


def test_a_hub_id_loads_from_the_local_cache(fresh_folder, tmp_path):
    """The cache as the hub lays it out: models--owner--name/{refs/main, snapshots/<commit>/...}."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--someone--emoji"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(fresh_folder)
    code = "from animatelcm.bundle import load; print(load('someone/emoji').facts.name)"
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "emoji"


def test_saving_replaces_whole_or_not_at_all(fresh_model, fresh_folder, tmp_path, monkeypatch):
    target = tmp_path / "model"
    save(fresh_model, target)
    before = sorted(p.name for p in target.rglob("*"))
    monkeypatch.setattr(type(fresh_model.tokenizer), "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(fresh_model, target)
    assert sorted(p.name for p in target.rglob("*")) == before
    assert json.loads((target / "animatelcm.json").read_text())["name"] == "emoji"


def test_an_image_model_gains_motion_without_changing(fresh_model):
    from animatelcm.miniature import fresh
    from animatelcm.model import with_motion
    from animatelcm.nets import emoji as shapes

    image = fresh(seed=5)
    video = with_motion(image, shapes.MOTION)
    x, t, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([500]), image.embed(["a parrot"])
    with torch.inference_mode():
        per_frame = torch.cat([image.unet(x[:, :, f : f + 1], t, text) for f in range(3)], dim=2)
        assert torch.allclose(video.unet(x, t, text), per_frame, atol=1e-5)


def test_the_shipped_model_is_small():
    """40 MB for base, acceleration, both kinds of temporal layers and a style; 48 with its adapters."""
    folder = ASSETS / "emoji" / "model"
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 48e6
    assert sum(size for path, size in sizes.items() if path.parts[0] != "adapters") < 40e6
