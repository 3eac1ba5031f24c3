"""A file that a flag does not take is named, and sent to the flag that does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import standins
from animatelcm.assembly import load_sum
from animatelcm.hub import ASSETS
from animatelcm.model_source import ModelSource

VAE = ASSETS / "emoji" / "model" / "vae"


def _refused(**source) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller reads what it says
        load_sum(ModelSource(**source), keep=False, adapters=())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("a.ckpt", standins.animatelcm_t2v, ("motion module (", "give it as --motion FILE")),
        ("b.safetensors", standins.ldm_checkpoint, ("checkpoint (", "give it as --model FILE")),
    ],
)
def test_what_is_no_lora(name, make, said, tmp_path):
    state = standins.fill(make(), seed=1)
    torch.save(state, tmp_path / name) if name.endswith(".ckpt") else save_file(state, tmp_path / name)
    message = _refused(style=(f"{tmp_path / name}:0.5",))
    assert message.startswith(f"{tmp_path / name} is ")
    assert "--lora takes a LoRA" in message
    assert said[0] in message.lower()
    assert message.endswith(said[1])


def test_an_autoencoder_is_no_lora():
    message = _refused(style=(str(VAE / "diffusion_pytorch_model.safetensors"),))
    assert "is Autoencoder (" in message
    assert message.endswith("give it as --vae FILE")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (VAE, ("is AutoencoderKL", "a whole autoencoder goes in as --vae")),
        (VAE / "diffusion_pytorch_model.safetensors", ("is Autoencoder (", "a whole autoencoder goes in as --vae")),
        (VAE.parent / "unet", ("is UNet2DConditionModel", "--decoder takes an AutoencoderTiny's folder")),
        (VAE.parent / "tokenizer", ("is a folder without config.json and weights", "--decoder takes")),
        ("nowhere/x.safetensors", ("decoder 'nowhere/x.safetensors'", "there is no such file")),
        ("nowhere.safetensors", ("no decoder 'nowhere.safetensors'",)),
    ],
)
def test_what_is_no_small_decoder(place, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir()
    message = _refused(decoder=str(place))
    assert all(part in message for part in said)
