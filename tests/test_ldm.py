"""Checkpoints in one file, against diffusers' own loader on the same bytes."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import standins
from animatelcm.bench import peers
from animatelcm.bundle import ASSETS, load
from animatelcm.ldm import read_checkpoint
from animatelcm.nets import sd15
from animatelcm.saving import save
from animatelcm.schedule import NoiseSchedule
from animatelcm.tokenizer import Tokenizer, read_merges
from networks import same_state

TEXT = 64
"""One attention head of CLIP's."""


@pytest.fixture(scope="module")
def state():
    return standins.fill(standins.ldm_checkpoint(text=TEXT, layers=2), seed=3)


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("ldm") / "dreamy.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The diffusers folder, without weights, of a Stable Diffusion 1.5 with shrunken widths."""
    folder = tmp_path_factory.mktemp("configs")
    text = {**sd15.TEXT, "hidden_size": TEXT, "num_hidden_layers": 2, "num_attention_heads": 1}
    text["intermediate_size"] = 4 * TEXT
    StableDiffusionPipeline(
        vae=AutoencoderKL(**{**sd15.VAE, "block_out_channels": standins.SMALL}),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=peers.tokenizer(Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), sd15.TOKENS)),
        unet=UNet2DConditionModel(block_out_channels=standins.SMALL, cross_attention_dim=TEXT),
        scheduler=DDIMScheduler.from_config(NoiseSchedule(beta_schedule="scaled_linear").to_diffusers()),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder)
    return folder


def _as_now(state, network):
    """A text encoder's state by the names that the installed transformers has."""
    prefix = "text_model." if hasattr(network, "text_model") else ""
    return {prefix + name.removeprefix("text_model."): value for name, value in state.items()}


def _equal(model, pipeline) -> bool:
    theirs = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    ours = {part: net.state_dict() for part, net in model.networks.items()}
    ours["text_encoder"] = _as_now(ours["text_encoder"], theirs["text_encoder"])
    return all(
        ours[part].keys() == net.state_dict().keys()
        and all(torch.equal(value, ours[part][key]) for key, value in net.state_dict().items())
        for part, net in theirs.items()
    )


def test_a_checkpoint_loads_as_diffusers_loads_it(file, configs):
    pipeline = StableDiffusionPipeline.from_single_file(str(file), config=str(configs), torch_dtype=torch.float32)
    assert _equal(load(file), pipeline)


def test_a_checkpoint_as_a_pickle_in_half_precision_with_averages_is_the_same_model(state, file, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    averages = standins.fill(standins.ldm_checkpoint(text=TEXT, layers=2, ema=True), torch.float16, seed=4)
    averages = {key: value for key, value in averages.items() if key.startswith("model_ema.")}
    torch.save({"global_step": 7, "state_dict": half | averages}, tmp_path / "half.ckpt")
    one, two = load(tmp_path / "half.ckpt"), load(file)
    for part, network in two.networks.items():
        found = one.networks[part].state_dict()
        assert all(torch.equal(value.half(), found[key].half()) for key, value in network.state_dict().items())


def test_what_a_checkpoint_lacks_is_said(state, tmp_path):
    cases = {
        "autoencoder": {key: value for key, value in state.items() if not key.startswith("first_stage_model.")},
        "text encoder": {key: value for key, value in state.items() if not key.startswith("cond_stage_model.")},
        "middle_block": {key: value for key, value in state.items() if "middle_block.0.in_layers.0" not in key},
        "no checkpoint": {"lora_unet_mid.alpha": torch.ones(1)},
        "Stable Diffusion XL": state | {"conditioner.embedders.0.x": torch.ones(1)},
        "Stable Diffusion 2": state | {"cond_stage_model.model.x": torch.ones(1)},
        "inpainting": state | {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)},
    }
    flat = state | {"model.diffusion_model.input_blocks.4.0.in_layers.2.weight": torch.ones(())}
    cases |= {"another shape": flat, "tensors": state | {f"first_stage_model.{i}": torch.ones(1) for i in range(5000)}}
    for what, broken in cases.items():
        path = tmp_path / "broken.safetensors"
        save_file(broken, path)
        with pytest.raises(ValueError, match=f"broken.*({what}|mid_block)"):
            load(path)


def test_a_checkpoint_saved_as_a_folder_loads_in_diffusers(file, tmp_path):
    model = load(file)
    save(model, tmp_path / "model", dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert _equal(model, pipeline)
    assert pipeline.tokenizer("a cat").input_ids == model.tokenizer(["a cat"])[0, :4].tolist()
    assert json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())["beta_schedule"] == (
        "scaled_linear"
    )


def test_weights_are_held_as_they_are_stored_where_asked(file):
    model = load(file, dtype=torch.float16)
    assert {p.dtype for net in model.networks.values() for p in net.parameters()} == {torch.float16}
    stored = load_file(file)["model.diffusion_model.out.2.weight"]
    assert torch.equal(model.unet.conv_out.weight, stored.half())


def test_a_half_precision_copy_stands_in_for_a_missing_full_one(file, tmp_path):
    save(load(file), tmp_path / "model", dtype=torch.float16)
    unet = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = load(tmp_path / "model")
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    after = load(tmp_path / "model")
    assert same_state(after.unet.state_dict(), before.unet.state_dict())


def test_the_autoencoder_of_older_diffusers_is_read(file, tmp_path):
    save(load(file), tmp_path / "model", dtype=torch.float32)
    path = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    new = load(tmp_path / "model").vae.state_dict()
    words = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for key, value in load_file(path).items():
        for theirs, older in words.items():
            key = key.replace(theirs, older)
        old[key] = value
    assert old.keys() != new.keys()
    save_file(old, path)
    again = load(tmp_path / "model").vae.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in new.items())


def test_widths_are_read_off_the_tensors(file):
    found = read_checkpoint(file)
    assert found.unet_config.block_out_channels == standins.SMALL
    assert found.unet_config.cross_attention_dim == found.text_config["hidden_size"] == TEXT
