from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from animatelcm.hub import ASSETS, MOTION_FILES, find

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's local cache with repositories in it, laid out as ``huggingface_hub`` lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(repository: str, files: list[str]) -> Path:
        root = tmp_path / f"models--{repository.replace('/', '--')}"
        (root / "blobs").mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(REVISION)
        for name in files:
            blob = root / "blobs" / hashlib.sha256(name.encode()).hexdigest()
            blob.write_text(name)
            link = root / "snapshots" / REVISION / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return root / "snapshots" / REVISION

    return add


def test_a_repository_is_found_in_the_local_cache(cache):
    snapshot = cache("owner/base", ["model_index.json", "unet/config.json", "unet/model.safetensors"])
    assert find("owner/base") == snapshot


def test_one_file_of_a_repository_is_found_by_name_and_by_address(cache):
    snapshot = cache("owner/lora", ["deep/fast.safetensors", "AnimateLCM_sd15_t2v.ckpt"])
    for source in (
        "owner/lora/deep/fast.safetensors",
        "https://huggingface.co/owner/lora/blob/main/deep/fast.safetensors",
        "https://huggingface.co/owner/lora/resolve/main/deep/fast.safetensors?download=true",
    ):
        assert find(source) == snapshot / "deep" / "fast.safetensors"
    assert find("owner/lora/AnimateLCM_sd15_t2v.ckpt").read_text() == "AnimateLCM_sd15_t2v.ckpt"


def test_temporal_layers_of_a_repository_are_found(cache):
    snapshot = cache("owner/motion", ["config.json", "diffusion_pytorch_model.safetensors"])
    assert find("owner/motion", MOTION_FILES) == snapshot


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("owner/nothing", ["owner/nothing"]),
        ("owner/lora/missing.safetensors", ["owner/lora", "missing.safetensors"]),
        ("owner/lora/notes.txt", ["owner/lora/notes.txt"]),
        ("./no/such/folder", ["./no/such/folder"]),
        ("/no/such/file.safetensors", ["/no/such/file.safetensors"]),
        ("nothing", ["nothing"]),
        ("owner/mistyped.ckpt", ["owner/mistyped.ckpt", "existing file"]),
        ("https://huggingface.co/owner/lora/blob/x.safetensors", ["owner/lora"]),
    ],
)
def test_what_is_missing_is_named(cache, source, named):
    cache("owner/lora", ["here.safetensors"])
    with pytest.raises(ValueError, match=r"give|cache") as error:
        find(source)
    assert all(name in str(error.value) for name in named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["model", "LoRA", "textual inversion"])
def test_a_repository_that_is_missing_is_called_what_it_is(cache, what):
    with pytest.raises(ValueError, match=f"^{what} 'owner/nothing' is neither"):
        find("owner/nothing", what=what)


@pytest.fixture
def no_hub(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", asked)


@pytest.mark.parametrize(
    "source",
    [
        "here/Stable-diffusion/rv.safetensors",
        "here/rv",
        "models/Stable-diffusion/rv.safetensors",
        "my models/Stable-diffusion/rv.safetensors",
        "my/model (1)/rv.safetensors",
        "./rv/x.safetensors",
        "../rv/x.safetensors",
        "~/rv/x.safetensors",
        "~nobody-of-that-name/rv/x.safetensors",
    ],
)
def test_a_path_is_never_looked_for_on_the_hub(source, no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    with pytest.raises(ValueError, match=r"LoRA .*there is no such file or folder; give one that exists") as error:
        find(source, what="LoRA")
    assert "network" not in str(error.value)


def test_a_name_that_may_be_one_is_looked_for_on_the_hub(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("owner/name", "owner/name/x.safetensors", "https://huggingface.co/owner/name"):
        with pytest.raises(AssertionError, match="the hub was asked"):
            find(source)


def test_home_is_where_a_tilde_points(no_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert find("~/x.safetensors") == tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=str(tmp_path / "y.safetensors")):
        find("~/y.safetensors")


def test_what_is_missing_is_called_what_it_is(no_hub):
    assert find("emoji") == ASSETS / "emoji" / "model"
    with pytest.raises(ValueError, match=r"no model 'nofile\.ckpt': give 'emoji', an existing"):
        find("nofile.ckpt")
    with pytest.raises(ValueError, match=r"no motion module 'nofile\.ckpt': give an existing"):
        find("nofile.ckpt", MOTION_FILES, "motion module")
