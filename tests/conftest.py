"""Fixtures: a tiny model with random weights, and no network."""

from __future__ import annotations

import os
import socket

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


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
