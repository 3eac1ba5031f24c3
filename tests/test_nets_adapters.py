"""Adapters beside a VideoUNet, against diffusers' networks frame by frame."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn

from animatelcm.nets import adapters
from animatelcm.nets.adapters import (
    NOTHING,
    Adapter,
    Clues,
    Hints,
    begin_as_copy,
    control_hints,
    controlnet,
    t2i_adapter,
    t2i_hints,
)
from animatelcm.nets.image_encoder import ImageEncoder, ImageEncoderConfig, ImageTokens
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from networks import TWO

SD15 = UNetConfig(block_out_channels=(16, 32, 32, 32), cross_attention_dim=12, attention_head_dim=4, norm_num_groups=8)
"""Stable Diffusion 1.5 made narrow."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random(network: nn.Module) -> nn.Module:
    """Every number drawn, those that begin as zeros too."""
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            if parameter.ndim > 1 and not parameter.any():
                parameter.copy_(noise(*parameter.shape, seed=i) / parameter[0].numel() ** 0.5)
    return network.eval().requires_grad_(False)


def unet(config: UNetConfig, *, motion: bool = False) -> VideoUNet:
    torch.manual_seed(0)
    return random(VideoUNet(config, MotionConfig(num_attention_heads=4, norm_num_groups=8) if motion else None))


def control(network: VideoUNet) -> ControlNetModel:
    torch.manual_seed(1)
    return random(controlnet(network.config, (4, 6, 8, 16)))


def inputs(frames: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, text, and maps of eight pixels a cell."""
    x, text = noise(batch, 4, frames, 8, 8), noise(batch, 7, 12, seed=1)
    return x, torch.tensor([3, 987][:batch]), text, noise(batch, 3, frames, 64, 64, seed=2).sigmoid()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [SD15, TWO])
@pytest.mark.parametrize("channels", [3, 1])
def test_features_of_a_t2i_adapter_are_diffusers_frame_by_frame(config, channels):
    torch.manual_seed(0)
    shape = {"channels": list(config.block_out_channels), "in_channels": channels, "downscale_factor": 8}
    network = random(T2IAdapter(**shape))
    maps = inputs(3)[3]
    features = t2i_hints(network, maps).features
    assert len(features) == len(config.block_out_channels)
    for f in range(3):
        seen = maps[:, :, f] if channels == 3 else maps[:, :, f].mean(1, keepdim=True)
        for ours, theirs in zip(features, network(seen), strict=True):
            close(ours[:, :, f], theirs)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("config", [SD15, TWO])
def test_residuals_of_a_controlnet_are_diffusers_frame_by_frame(config, frames):
    network, (x, t, text, maps) = control(unet(config)), inputs(frames)
    hints = control_hints(network, x, t, text, maps)
    assert len(hints.skip_residuals) == config.num_skips
    for f in range(frames):
        skips, mid = network(x[:, :, f], t, text, controlnet_cond=maps[:, :, f], return_dict=False)
        close(hints.mid_residual[:, :, f], mid)
        for ours, theirs in zip(hints.skip_residuals, skips, strict=True):
            close(ours[:, :, f], theirs)


def image_twin(network: VideoUNet) -> UNet2DConditionModel:
    """diffusers' image UNet with the same weights."""
    theirs = UNet2DConditionModel.from_config(network.config.to_diffusers()).eval()
    theirs.load_state_dict({key: value for key, value in network.state_dict().items() if "motion_modules" not in key})
    return theirs


@pytest.mark.parametrize("config", [SD15, TWO])
@torch.no_grad()
def test_the_prediction_is_diffusers_controlled_unet(config):
    network = unet(config)
    beside, (x, t, text, maps) = control(network), inputs(1)
    ours = network(x, t, **Adapter(beside)(x, t, text, Clues(maps=maps)).times(0.7).arguments(text))
    skips, mid = beside(x[:, :, 0], t, text, controlnet_cond=maps[:, :, 0], conditioning_scale=0.7, return_dict=False)
    theirs = image_twin(network)(
        x[:, :, 0], t, text, down_block_additional_residuals=skips, mid_block_additional_residual=mid
    ).sample
    close(ours[:, :, 0], theirs)
    assert (network(x, t, text)[:, :, 0] - theirs).abs().max() > 1e-2


@torch.no_grad()
def test_a_fresh_controlnet_adds_nothing_and_begins_as_the_way_down():
    network = unet(TWO, motion=True)
    fresh, state = controlnet(TWO, (4, 6, 8, 16)).eval(), network.state_dict()
    begin_as_copy(fresh, state)
    copied = {key for key, value in fresh.state_dict().items() if key in state and torch.equal(value, state[key])}
    assert copied == {key for key in fresh.state_dict() if not key.startswith("controlnet_")}
    x, t, text, maps = inputs(3)
    hints = control_hints(fresh, x, t, text, maps)
    assert not any(tensor.any() for tensor in (*hints.skip_residuals, hints.mid_residual))
    assert torch.equal(network(x, t, **hints.arguments(text)), network(x, t, text))


def test_a_fresh_t2i_adapter_fits_its_unet():
    x, t, text, maps = inputs(2)
    network = unet(SD15)
    features = t2i_hints(t2i_adapter(SD15, 8).requires_grad_(False), maps).features
    assert [feature.shape[1:] for feature in features] == [(16, 2, 8, 8), (32, 2, 4, 4), (32, 2, 2, 2), (32, 2, 1, 1)]
    assert network(x, t, text, features=features).shape == x.shape


def test_chunks_do_not_matter(monkeypatch):
    network, (x, t, text, maps) = control(unet(TWO)), inputs(18)
    parts = control_hints(network, x, t, text, maps)
    monkeypatch.setattr(adapters, "CHUNK", 1000)
    calls = []
    network.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    whole = control_hints(network, x, t, text, maps)
    assert calls == [36]
    for one, other in zip((*parts.skip_residuals, parts.mid_residual), (*whole[1], whole[2]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_no_more_frames_than_a_chunk_go_through_at_once():
    network, (x, t, text, maps) = control(unet(TWO)), inputs(18, batch=1)
    calls = []
    network.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    control_hints(network, x, t, text, maps)
    assert calls == [adapters.CHUNK, 2]


def _every_kind() -> dict[str, Adapter]:
    network = unet(TWO)
    torch.manual_seed(2)
    shape = ImageEncoderConfig(channels=(16, 32))
    found = {
        "controlnet": control(network),
        "t2i": T2IAdapter(channels=[16, 32], downscale_factor=8),
        "latent": ImageEncoder(shape),
        "pixels": ImageEncoder(ImageEncoderConfig(channels=(16, 32), in_channels=3, sees="pixels", spread="first")),
        "tokens": ImageTokens(4, 12),
    }
    return {name: Adapter(random(network)) for name, network in found.items()}


def _tensors(hints: Hints) -> list[Tensor]:
    return [
        *hints.features,
        *hints.skip_residuals,
        *(x for x in (hints.mid_residual, hints.tokens) if x is not None),
    ]


def _clues() -> Clues:
    maps = inputs(3, batch=1)[3]
    return Clues(image=noise(1, 4, 8, 8, seed=5), pixels=noise(1, 3, 64, 64, seed=6), maps=maps)


@pytest.mark.parametrize("name", ["controlnet", "t2i", "latent", "pixels", "tokens"])
def test_both_halves_of_guidance_get_what_each_would_get_alone(name):
    """[without text, with text] of one video in a batch: the clues are the same, the text is not."""
    adapter, (x, t, text, _), clues = _every_kind()[name], inputs(3), _clues()
    x, t = torch.cat([x[:1], x[:1]]), t[:1].repeat(2)
    both = _tensors(adapter(x, t, text, clues.repeated(2)))
    alone = [_tensors(adapter(x[i : i + 1], t[i : i + 1], text[i : i + 1], clues)) for i in range(2)]
    assert len(both) == len(alone[0]) > 0
    for i in range(2):
        for ours, one in zip(both, alone[i], strict=True):
            torch.testing.assert_close(ours[i : i + 1], one, atol=1e-5, rtol=1e-5)
    if adapter.steady:  # then once a video is enough
        hints = adapter(x[:1], t[:1] - 1, text[:1], clues).repeated(2)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(_tensors(hints), both, strict=True))


def test_only_a_controlnet_looks_at_the_noise():
    assert {name for name, adapter in _every_kind().items() if not adapter.steady} == {"controlnet"}


@torch.no_grad()
def test_several_at_once_add_up():
    kinds, (x, t, text, _), clues = _every_kind(), inputs(3, batch=1), _clues()
    x, t, text = x[:1], t[:1], text[:1]
    hints = {name: adapter(x, t, text, clues) for name, adapter in kinds.items()}
    total = NOTHING
    for part in hints.values():
        total = total.merged(part)
    for i, feature in enumerate(total.features):
        expected = sum(hints[name].features[i] for name in ("t2i", "latent", "pixels"))
        torch.testing.assert_close(feature, expected)
    assert torch.equal(total.tokens, hints["tokens"].tokens)
    twice = hints["controlnet"].merged(hints["controlnet"])
    for one, two in zip(_tensors(hints["controlnet"].times(2.0)), _tensors(twice), strict=True):
        assert torch.equal(one, two)
    beside = hints["tokens"].merged(hints["tokens"])
    assert torch.equal(beside.arguments(text)["text"], torch.cat([text, *[hints["tokens"].tokens] * 2], 1))
    assert all(torch.equal(a, b) for a, b in zip(_tensors(NOTHING.merged(total)), _tensors(total), strict=True))
    assert NOTHING.arguments(text).keys() == {"text"}
    assert unet(TWO, motion=True)(x, t, **total.arguments(text)).isfinite().all()


@pytest.mark.parametrize("name", ["controlnet", "t2i", "latent", "pixels", "tokens"])
def test_what_an_adapter_looks_at_is_named_where_it_is_not_there(name):
    x, t, text, _ = inputs(2)
    with pytest.raises(ValueError, match=r"looks at (picture|control maps)"):
        _every_kind()[name](x, t, text, Clues())
