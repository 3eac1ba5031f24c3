from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import MotionAdapter
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch.utils._python_dispatch import TorchDispatchMode

import networks
from animatelcm.nets import fused
from animatelcm.nets.motion import MotionConfig, MotionModule, TemporalAttention, sinusoid
from animatelcm.nets.unet import VideoUNet

SMALL = replace(networks.SMALL, layers_per_block=2, cross_attention_dim=8)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return noise(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def acting(channels: int, **settings) -> MotionModule:
    """A motion module whose every weight is random, the last map's too."""
    torch.manual_seed(0)
    module = MotionModule(channels, MotionConfig(num_attention_heads=4, norm_num_groups=4, **settings)).eval()
    torch.nn.init.normal_(module.proj_out.weight, std=0.3)
    torch.nn.init.normal_(module.proj_out.bias)
    return module


def diffusers_twin(module: MotionModule, channels: int) -> AnimateDiffTransformer3D:
    theirs = AnimateDiffTransformer3D(
        num_attention_heads=4,
        attention_head_dim=channels // 4,
        in_channels=channels,
        num_layers=len(module.transformer_blocks),
        norm_num_groups=4,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=64,
    )
    missing, unexpected = theirs.load_state_dict(module.state_dict(), strict=False)
    assert all(key.endswith("pos_embed.pe") for key in missing)
    assert not unexpected
    return theirs.eval()


class FrameByFrame(torch.nn.Module):
    """A norm of (B, C, F, h, w) that sees one frame at a time."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.norm(frame) for frame in video.unbind(2)], dim=2)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("norm", ["joint", "per_frame"])
@torch.no_grad()
def test_agrees_with_diffusers_and_differs_in_the_norm_alone(norm, layers) -> None:
    module, x = acting(16, norm=norm, layers=layers), images(2 * 5, 16, 4, 6)
    theirs = diffusers_twin(module, 16)
    if norm == "per_frame":
        theirs.norm = FrameByFrame(theirs.norm)
    expected = theirs(x, num_frames=5)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(module(x, 5), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_norms_differ_only_where_frames_differ() -> None:
    per_frame, joint = acting(16), acting(16, norm="joint")
    still = images(1, 16, 4, 4).expand(5, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(per_frame(still, 5), joint(still, 5), atol=1e-5, rtol=0)
    moving = still * torch.arange(1.0, 6.0).view(5, 1, 1, 1)
    assert (per_frame(moving, 5) - joint(moving, 5)).abs().max() > 0.01


def test_fresh_module_changes_nothing_and_learns_from_its_last_map_on() -> None:
    module, x = MotionModule(16, MotionConfig(num_attention_heads=4, norm_num_groups=4)), images(6, 16, 4, 4)
    y = module(x, 6)
    assert torch.equal(y, x)
    (y * noise(6, 16, 4, 4, seed=1)).sum().backward()
    moved = {name for name, parameter in module.named_parameters() if parameter.grad.abs().max() > 0}
    assert moved == {"proj_out.weight", "proj_out.bias"}


@torch.no_grad()
def test_frames_are_told_apart_by_their_positions_alone() -> None:
    module, x = acting(16), images(5, 16, 3, 3)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert (module(x, 5)[order] - module(x[order], 5)).abs().max() > 1e-3
    module.positions.zero_()
    torch.testing.assert_close(module(x, 5)[order], module(x[order], 5), atol=1e-5, rtol=0)


@torch.no_grad()
def test_pixels_and_videos_do_not_see_each_other() -> None:
    attention, x = TemporalAttention(12, 3), noise(2, 4, 5, 12)
    moved = x.clone()
    moved[1, 2, 3] += 1
    changed = (attention(moved) - attention(x)).abs().amax(dim=-1) > 0
    assert changed[1, :, 3].all()
    assert changed.sum() == 4


@torch.no_grad()
def test_attention_in_chunks_is_attention_at_once(monkeypatch) -> None:
    attention, x = TemporalAttention(12, 3), noise(2, 4, 5, 12)
    whole = attention(x)
    for rows in (1, 7, 29):
        monkeypatch.setattr(fused, "MAX_ROWS", rows)
        torch.testing.assert_close(attention(x), whole, atol=1e-6, rtol=0)


@torch.no_grad()
def test_joined_weights_attend_as_they_did_apart() -> None:
    attention, x = TemporalAttention(12, 3), noise(2, 4, 5, 12)
    apart = attention(x)
    attention.join()
    assert attention._joined() is not None
    torch.testing.assert_close(attention(x), apart, atol=1e-6, rtol=0)


@torch.no_grad()
def test_attention_calls_stay_below_65536_rows(monkeypatch) -> None:
    rows = []

    def recorded(q, k, v):
        rows.append(q.shape[:3].numel())
        return q

    monkeypatch.setattr(fused, "attention", recorded)
    TemporalAttention(2, 2)(noise(3, 1, 20_000, 2))
    assert sum(rows) == 3 * 20_000 * 2
    assert max(rows) < 65_536


class Copies(TorchDispatchMode):
    """Counts the operations that only move memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        moves = (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.cat)
        self.count += func.overloadpacket in moves
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["joint", "per_frame"])
@torch.no_grad()
def test_memory_is_not_rearranged(norm, monkeypatch) -> None:
    monkeypatch.setattr(fused, "SMALL_SCORES", 0)  # spelled out, a CPU writes the result twice
    module, x = acting(16, norm=norm), images(2 * 5, 16, 4, 6)
    with Copies() as copies:
        y = module(x, 5)
        assert copies.count == 0
        module(x.contiguous(), 5)
        assert copies.count > 0
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [16, 24])
def test_positions_are_diffusers(channels) -> None:
    torch.testing.assert_close(sinusoid(64, channels), SinusoidalPositionalEmbedding(channels, 64).pe[0])


def test_positions_travel_with_the_device_but_not_with_the_state() -> None:
    module = MotionModule(16, MotionConfig(num_attention_heads=4, norm_num_groups=4))
    assert "positions" not in module.state_dict()
    assert module.positions.shape == (64, 16)
    assert module.to(torch.float64).positions.dtype == torch.float64


@pytest.mark.parametrize("mid", [True, False])
def test_weights_and_config_fit_a_diffusers_motion_adapter(mid) -> None:
    config = MotionConfig(num_attention_heads=2, norm_num_groups=4, use_mid_block=mid, norm="joint")
    written = config.to_diffusers(SMALL)
    assert MotionConfig.from_diffusers(json.loads(json.dumps(written))) == config
    adapter = MotionAdapter(
        **{key: value for key, value in written.items() if key not in ("_class_name", "motion_norm")}
    )
    unet = VideoUNet(SMALL, config)
    state = {key: value for key, value in unet.state_dict().items() if "motion_modules" in key}
    adapter.load_state_dict({**state, **unet.positions()}, strict=True)
    read = MotionConfig.from_diffusers(dict(adapter.config))
    assert read.norm == "per_frame"
    assert (read.num_attention_heads, read.use_mid_block, read.max_frames) == (2, mid, 64)


def test_unsupported_adapter_settings_are_named() -> None:
    for key, value in [
        ("conv_in_channels", 9),
        ("motion_num_attention_heads", [8, 4]),
        ("motion_mid_block_layers_per_block", 2),
        ("motion_transformer_layers_per_mid_block", 3),
    ]:
        with pytest.raises(ValueError, match=key):
            MotionConfig.from_diffusers({key: value})
    assert MotionConfig.from_diffusers({"motion_num_attention_heads": [4, 4]}).num_attention_heads == 4
    with pytest.raises(ValueError, match="per_frame, joint"):
        MotionConfig(norm="frame")
