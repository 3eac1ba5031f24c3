"""An autoencoder in place of a model's own: diffusers' with the same weights, from every kind of file and folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

import standins
from animatelcm.assembly import load_sum
from animatelcm.bundle import load
from animatelcm.cli import main
from animatelcm.conversion import convert
from animatelcm.inspection import describe
from animatelcm.model_source import ModelSource
from animatelcm.nets import sd15
from animatelcm.provenance import command, recipe
from animatelcm.request import SampleRequest
from animatelcm.saving import save
from animatelcm.vae import read_vae
from networks import same_state

SETTINGS = {**sd15.VAE, "block_out_channels": standins.SMALL}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(11)
    return AutoencoderKL(**SETTINGS).eval()


@pytest.fixture(scope="module")
def places(theirs, tmp_path_factory):
    """The same weights as everything that ``--vae`` takes."""
    folder = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder / "folder")
    theirs.save_pretrained(folder / "model" / "vae")
    ldm = _as_ldm(theirs.state_dict())
    save_file(ldm, folder / "bare.safetensors")
    save_file({f"first_stage_model.{key}": value for key, value in ldm.items()}, folder / "prefixed.safetensors")
    torch.save({"state_dict": ldm | {"loss.logvar": torch.zeros(())}, "global_step": 840_000}, folder / "ema.ckpt")
    torch.save(ldm, folder / "plain.pt")
    names = ("folder", "model", "bare.safetensors", "prefixed.safetensors", "ema.ckpt", "plain.pt")
    return [*(folder / name for name in names), folder / "folder" / "diffusion_pytorch_model.safetensors"]


def _as_ldm(state):
    """By diffusers' own conversion, turned around: CompVis' tensors, each filled with its number, are converted."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    shapes = standins.ldm_vae(standins.SMALL)
    numbered = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(shapes.items())}
    keys = list(shapes)
    found = {
        name: keys[int(value.flatten()[0])] for name, value in convert_ldm_vae_checkpoint(numbered, SETTINGS).items()
    }
    assert found.keys() == state.keys()
    return {key: state[name].reshape(shapes[key]).clone() for name, key in found.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(standins.fill(standins.ldm_checkpoint(text=64, layers=1), seed=3), file)
    return file


@pytest.fixture(scope="module")
def without(checkpoint):
    """The same checkpoint without an autoencoder, as some are shared."""
    file = checkpoint.with_name("without.safetensors")
    state = load_file(checkpoint)
    save_file({key: value for key, value in state.items() if not key.startswith("first_stage_model.")}, file)
    return file


@pytest.mark.parametrize("number", range(7))
def test_every_place_holds_the_same_weights(theirs, places, number):
    assert same_state(read_vae(places[number], {}, torch.float32).state_dict(), theirs.state_dict())


@pytest.mark.parametrize("number", [0, 1])
def test_one_on_the_hub_is_found_by_its_id(theirs, places, checkpoint, tmp_path, monkeypatch, number):
    """An autoencoder's own repository, and a model's, in the local cache as the hub's library lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = tmp_path / "models--owner--other"
    shutil.copytree(places[number], root / "snapshots" / "0123")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123")
    assert same_state(load(checkpoint, vae="owner/other").vae.state_dict(), theirs.state_dict())


def test_it_takes_the_place_of_the_models_own_or_of_none(theirs, places, checkpoint, without):
    own = load(checkpoint)
    for file, place in ((checkpoint, places[0]), (without, places[2])):
        model = load(file, vae=place)
        assert same_state(model.vae.state_dict(), theirs.state_dict())
        assert same_state(model.unet.state_dict(), own.unet.state_dict())
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(model.vae.decode(latents), theirs.decode(latents).sample, atol=1e-5)


def test_a_checkpoint_without_one_says_how_to_give_one(without):
    with pytest.raises(ValueError, match=r"holds no autoencoder .* --vae"):
        load(without)


def test_a_folder_takes_one_too_and_keeps_it_when_it_is_saved(theirs, places, checkpoint, without, tmp_path):
    save(load(checkpoint), tmp_path / "model", dtype=torch.float32)
    source = ModelSource(model=str(tmp_path / "model"), vae=str(places[0]))
    assert same_state(load_sum(source).vae.state_dict(), theirs.state_dict())
    (tmp_path / "model" / "vae" / "config.json").unlink()  # what is replaced need not be there
    assert same_state(load_sum(source).vae.state_dict(), theirs.state_dict())
    convert(without, tmp_path / "folder", to="diffusers", dtype=torch.float32, vae=places[2])
    convert(without, tmp_path / "one.safetensors", to="checkpoint", dtype=torch.float32, vae=places[2])
    for made in (tmp_path / "folder", tmp_path / "one.safetensors"):
        assert same_state(load(made).vae.state_dict(), theirs.state_dict())
    main(["fuse", "--out", str(tmp_path / "fused"), "--model", str(without), "--vae", str(places[3])])
    half = {key: value.half() for key, value in theirs.state_dict().items()}
    assert same_state(load(tmp_path / "fused", dtype=torch.float16).vae.state_dict(), half)


def test_a_video_says_which_one_it_was_drawn_with():
    source = ModelSource(vae="vae-ft-mse-840000-ema-pruned.safetensors")
    request = SampleRequest(prompt="a cat").resolved(load("emoji").facts)
    assert recipe(request, source, "1")["vae"] == source.vae
    assert f"--vae {source.vae}" in command(request, source)
    assert "--vae" not in command(request, ModelSource())


@pytest.mark.parametrize("number", range(7))
def test_inspect_names_it_and_its_flag(places, number):
    if places[number].name == "model":  # which is the folder of a model that lacks the rest
        return
    kind = describe(places[number])["kind"]
    assert kind.startswith("Autoencoder")
    assert "4 latent channels" in kind
    assert "--vae" in kind


@pytest.mark.parametrize(
    ("change", "named"),
    [({"scaling_factor": 0.13025}, "scaling_factor=0.13025"), ({"latent_channels": 8}, "latent_channels=8")],
)
def test_one_for_other_latents_is_refused(tmp_path, change, named):
    AutoencoderKL(**{**SETTINGS, **change}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"other.*{named}"):
        read_vae(tmp_path / "other", {}, torch.float32)


def test_one_of_four_halvings_does_not_fit_a_model_of_others(places):
    with pytest.raises(ValueError, match="latent_channels=4"):
        load("emoji", vae=places[0])


def test_what_is_no_autoencoder_is_refused(places, tmp_path):
    save_file(standins.fill(standins.lcm_lora()), tmp_path / "lora.safetensors")
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    broken = load_file(places[2])
    del broken["decoder.mid.attn_1.q.weight"]
    save_file(broken, tmp_path / "broken.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    said = {
        "lora.safetensors": "holds no autoencoder",
        "tiny": "--decoder",
        "broken.safetensors": "to_q.weight is missing",
    }
    said |= {"empty": "config.json", "list": "diffusion_pytorch_model"}
    for name, named in said.items():
        with pytest.raises(ValueError, match=f"{name}.*{named}"):
            read_vae(tmp_path / name, {}, torch.float32)


def test_a_part_of_a_model_takes_none(places, tmp_path):
    with pytest.raises(ValueError, match=r"goes into a model .* not into 'kohya'"):
        convert("emoji", tmp_path / "x.safetensors", to="kohya", vae=places[0])
    save_file(standins.fill(standins.mm_v2()), tmp_path / "motion.safetensors")
    with pytest.raises(ValueError, match=r"goes into a model .* not into .*motion\.safetensors"):
        convert(tmp_path / "motion.safetensors", tmp_path / "x", to="diffusers", vae=places[0])
