"""How a model calls its networks: graphs that end where weights move, and exact convolutions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from animatelcm.model import VideoModel

CONVOLUTIONS = torch.backends.cudnn.conv


@pytest.fixture
def model(fresh_model) -> VideoModel:
    return replace(fresh_model)


def test_a_model_that_moves_drops_its_graphs(model):
    model._graphs._record = lambda call: (lambda: None, call())
    for forget in (lambda: model.to("cpu"), model.forget_graphs):
        for _ in range(2):
            model._graphs(torch.nn.Identity(), torch.ones(1))
        assert len(model._graphs) == 1
        forget()
        assert len(model._graphs) == 0


@pytest.fixture
def seen(model, monkeypatch):
    """What convolutions of float32 are computed in where a network is at work."""
    found: list[str] = []
    hooks = [
        network.register_forward_pre_hook(lambda *_: found.append(CONVOLUTIONS.fp32_precision))
        for network in (model.unet, model.vae.encoder, model.vae.decoder)
    ]
    before = CONVOLUTIONS.fp32_precision
    monkeypatch.setattr(torch.Tensor, "to", _stays(torch.Tensor.to))
    CONVOLUTIONS.fp32_precision = "tf32"
    yield found
    CONVOLUTIONS.fp32_precision = before
    for hook in hooks:
        hook.remove()


def _stays(to):
    """Nothing goes to a device: there is none."""
    return lambda self, *given: to(self, *(part for part in given if not isinstance(part, torch.device)))


def _work(model: VideoModel) -> None:
    x = torch.zeros(1, 16, 2, 8, 8, dtype=model.unet.dtype)
    text = torch.zeros(1, 4, model.unet.config.cross_attention_dim, dtype=model.unet.dtype)
    with torch.inference_mode():
        model.predict(x, torch.tensor([5]), text)
        model.encode(torch.zeros(1, 3, 2, 64, 64))
        model.draw(x[0].transpose(0, 1))


@pytest.mark.parametrize(("device", "said"), [("cuda", "ieee"), ("cpu", "tf32")])
def test_float32_is_float32_on_a_gpu_too(model, seen, monkeypatch, device, said):
    monkeypatch.setattr(VideoModel, "device", property(lambda _: torch.device(device)))
    _work(model)
    assert seen == [said] * 3
    assert CONVOLUTIONS.fp32_precision == "tf32"
    monkeypatch.setattr(type(model.unet), "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _work(model)
    assert CONVOLUTIONS.fp32_precision == "tf32"


def test_half_precision_is_left_as_it_is(model, seen, monkeypatch):
    monkeypatch.setattr(VideoModel, "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(type(model.unet), "dtype", property(lambda _: torch.bfloat16))
    with model.exact():
        assert CONVOLUTIONS.fp32_precision == "tf32"
