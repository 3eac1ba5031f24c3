"""Fixtures: a tiny model with random weights, and no network."""

from __future__ import annotations

import os
import socket

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # workers share the cores: threads beyond them only wait
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of processes that tests begin
    torch.set_num_threads(threads)


LONG = ("test_chain.py", "test_assembly.py", "test_training.py", "test_planning.py", "test_evaluate_judge.py")
"""Begun first: a worker that is left with one of them at the end keeps the others waiting."""


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # else xdist begins with the files that hold most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def fresh_model():
    """The miniature with random weights, temporal layers included and made to act."""
    from animatelcm.miniature import fresh
    from animatelcm.model import with_motion
    from animatelcm.nets import emoji as shapes

    model = with_motion(fresh(seed=1), shapes.MOTION).to("cpu")
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if "motion_modules" in name and "transformer_blocks" not in name and "proj_out" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=source))
    for network in model.networks.values():
        network.eval().requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def fresh_folder(fresh_model, tmp_path_factory):
    """The same on disk, in float32; not to be written to."""
    from animatelcm.saving import save

    path = tmp_path_factory.mktemp("fresh") / "model"
    save(fresh_model, path, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def steered_folder(fresh_model, tmp_path_factory):
    """The same in float16, with adapters that read edges and poses and an image encoder; not to be written to."""
    from animatelcm.saving import save
    from test_condition import beside

    path = tmp_path_factory.mktemp("steered") / "model"
    save(beside(fresh_model), path)
    return path


@pytest.fixture(scope="session")
def narrow_folder(fresh_model, tmp_path_factory):
    """The miniature made narrow, distilled: an acceleration, a style, two adapters that read maps, a teacher, all with
    random weights, in float32; not to be written to."""
    from dataclasses import replace

    from animatelcm.nets import lora
    from animatelcm.nets.adapters import controlnet, t2i_adapter
    from animatelcm.nets.motion import MotionConfig
    from animatelcm.nets.unet import VideoUNet
    from animatelcm.saving import save
    from networks import NARROW, shaken

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = shaken(VideoUNet(NARROW, MotionConfig(num_attention_heads=2, norm_num_groups=8)))
        edge, pose = t2i_adapter(NARROW, 8), controlnet(NARROW, (4, 8, 8, 16))
    lora.inject(unet, rank=2, alpha=2.0, targets=("to_q",))
    acceleration = lora.eject(shaken(unet, seed=1))
    motion = {name: 2 * value for name, value in unet.state_dict().items() if "motion_modules" in name}
    model = replace(fresh_model, unet=unet, image_lora=acceleration, teacher_motion=motion)
    model.styles, model.adapters = {"drawn": acceleration}, {"edge": shaken(edge), "pose": shaken(pose)}
    path = tmp_path_factory.mktemp("narrow") / "model"
    save(model, path, dtype=torch.float32)
    return path
