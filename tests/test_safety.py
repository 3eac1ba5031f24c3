"""Files that would run code, through every door that takes weights."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from animatelcm import Pipeline, load
from animatelcm.assembly import load_sum
from animatelcm.conversion import convert
from animatelcm.fusion import fuse
from animatelcm.inspection import describe
from animatelcm.model_source import ModelSource


class _Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["zip", "legacy", "bare pickle"])
def hostile(request, tmp_path):
    """(a file that would leave a marker, the marker)."""
    marker, file = tmp_path / "marker", tmp_path / "weights.ckpt"
    if request.param == "bare pickle":
        file.write_bytes(pickle.dumps({"state_dict": _Payload(marker)}))
    else:
        state = {"x": torch.ones(2), "state_dict": _Payload(marker)}
        torch.save(state, file, _use_new_zipfile_serialization=request.param == "zip")
    return file, marker


def test_the_payload_is_one(hostile):
    file, marker = hostile
    if file.read_bytes()[:2] == b"PK":
        torch.load(file, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize(
    "door",
    [
        lambda file: load(file),
        lambda file: describe(file),
        lambda file: convert(file, file.with_name("out.safetensors"), to="kohya"),
        lambda file: Pipeline.from_pretrained("emoji", motion=file),
        lambda file: Pipeline.from_pretrained("emoji", loras=[file]),
        lambda file: load_sum(ModelSource(model=str(file))),
        lambda file: load_sum(ModelSource(adapter=(f"i2v={file}",))),
        lambda file: fuse(load("emoji"), style=(file, 1.0)),
        lambda file: fuse(load("emoji"), motion=(file, 1.0)),
    ],
    ids=["load", "inspect", "convert", "motion", "loras", "model", "adapter", "style", "fused motion"],
)
def test_nothing_runs(hostile, door):
    file, marker = hostile
    with pytest.raises(ValueError, match=r"weights\.ckpt"):
        door(file)
    assert not marker.exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "motion_adapter"])
def test_nothing_runs_in_a_folder(hostile, steered_folder, tmp_path, part):
    file, marker = hostile
    shutil.copytree(steered_folder, tmp_path / "model")
    (weights,) = (tmp_path / "model" / part).glob("*.safetensors")
    weights.unlink()
    stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
    file.rename(weights.with_name(f"{stem}.bin"))
    with pytest.raises(ValueError, match=rf"{part}.*\.bin"):
        load(tmp_path / "model")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["edge", "pose", "i2v"])
@pytest.mark.parametrize("door", ["load", "adapter", "inspect", "convert"])
def test_nothing_runs_in_an_adapters_folder(hostile, steered_folder, tmp_path, name, door):
    file, marker = hostile
    folder = tmp_path / "model"
    shutil.copytree(steered_folder, folder)
    place = folder / "adapters" / name
    (place / "diffusion_pytorch_model.safetensors").unlink()
    file.rename(place / "diffusion_pytorch_model.bin")
    doors = {
        "load": lambda: load(folder),
        "adapter": lambda: load_sum(ModelSource(adapter=(f"{name}={place}",))),
        "inspect": lambda: describe(place),
        "convert": lambda: convert(folder, tmp_path / "out", to="bundle"),
    }
    with pytest.raises(ValueError, match=rf"{name}.*\.bin"):
        doors[door]()
    assert not marker.exists()
