"""A step of training on a device that the host need not wait for: one without numbers, which cannot be waited for."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from animatelcm import model as models
from animatelcm import objectives, recipes, rng, stages, training
from animatelcm.data import batches
from animatelcm.data.batches import ClipBatch
from animatelcm.model import VideoModel
from animatelcm.rng import generator

META = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Where what the CPU holds was copied to the device otherwise than by ``rng.sent``."""

    def __init__(self) -> None:
        super().__init__()
        self.expected = False
        self.sent = self.strays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        result = func(*args, **(kwargs or {}))
        given = [each for each in args if isinstance(each, torch.Tensor)]
        if any(each.device.type == "cpu" and each.numel() > 1 for each in given) and _on_device(result):
            self.sent, self.strays = self.sent + self.expected, self.strays + (not self.expected)
        return result

    def by(self, send):
        """``rng.sent``, told apart."""

        @contextmanager
        def expecting():
            before, self.expected = self.expected, True
            yield
            self.expected = before

        def sent(*arguments):
            with expecting():
                return send(*arguments)

        return sent


def _on_device(result: object) -> bool:
    found = result if isinstance(result, tuple | list) else [result]
    return any(isinstance(each, torch.Tensor) and each.device == META for each in found)


def crossings(name: str, frames: int, monkeypatch, **kept: torch.Tensor) -> Crossings:
    monkeypatch.setattr(VideoModel, "fingerprint", lambda self, part: "")  # reads weights, once, before all steps
    config = replace(getattr(recipes, name)(), model="emoji")
    model = stages.starting_model(config).to(META)
    state = training._fresh_state(config, model)
    step = stages.objective(config, model, state)
    batch = ClipBatch(
        captions=("a parrot", "a fox"),
        latents=torch.randn(2, 16, frames, 8, 8),
        maps=torch.rand(2, 3, frames, 64, 64),
        **kept,
    )
    model.schedule.level(torch.zeros(1, dtype=torch.long, device=META))  # its tables go there once
    seen = Crossings()
    for module in (objectives, models, batches):
        monkeypatch.setattr(module, "sent", seen.by(rng.sent))
    with seen:
        loss = step(batch, partial(generator, 0, 0, 0)).loss
        loss.mean().backward()
    assert loss.device == META
    return seen


RECIPES = [
    ("style_lora_emoji", 1),
    ("image_lcm_emoji", 1),
    ("video_lcm_emoji", 4),
    ("i2v_emoji", 4),
    ("t2i_adapter_lora_emoji", 4),
]


@pytest.mark.parametrize(("recipe", "frames"), RECIPES)
def test_no_step_asks_the_device_for_a_number(recipe, frames, monkeypatch) -> None:
    """``item``, ``bool`` or an index by a mask fail on this device; what is sent to it goes by pinned memory."""
    seen = crossings(recipe, frames, monkeypatch)
    assert seen.sent >= 4
    assert seen.strays == 0


@pytest.mark.parametrize(("recipe", "frames"), RECIPES[:3])
def test_nor_does_one_with_kept_texts_which_asks_no_text_encoder(recipe, frames, monkeypatch) -> None:
    monkeypatch.setattr(VideoModel, "embed", lambda self, texts: pytest.fail("texts were kept"))
    seen = crossings(recipe, frames, monkeypatch, text=torch.randn(2, 32, 128), no_text=torch.randn(1, 32, 128))
    assert seen.sent >= 4
    assert seen.strays == 0


def test_a_stray_copy_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(objectives, "latents", lambda model, batch: batch.latents.to(model.device))
    assert crossings("video_lcm_emoji", 4, monkeypatch).strays == 1
