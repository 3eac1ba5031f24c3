from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D

import networks
from animatelcm.nets import blocks
from animatelcm.nets.blocks import Downsampler, DownStage, ResnetBlock, SpatialTransformer, Upsampler, UpStage
from animatelcm.nets.motion import MotionConfig, MotionModule

SMALL = replace(networks.SMALL, layers_per_block=3)
MOTION = MotionConfig(num_attention_heads=2, norm_num_groups=4)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return noise(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("out_channels", [8, 12])
@torch.no_grad()
def test_resnet_block_is_diffusers(out_channels) -> None:
    theirs = ResnetBlock2D(in_channels=8, out_channels=out_channels, temb_channels=10, groups=4, eps=1e-5)
    ours = ResnetBlock(8, out_channels, 10, 4, 1e-5)
    ours.load_state_dict(theirs.state_dict())
    x, emb = images(3, 8, 5, 6), noise(3, 10)
    close(ours(x, torch.nn.functional.silu(emb)), theirs(x, emb))


@pytest.mark.parametrize("linear", [True, False])
@torch.no_grad()
def test_spatial_transformer_is_diffusers(linear) -> None:
    theirs = Transformer2DModel(
        2,
        4,
        in_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=6,
        use_linear_projection=linear,
    )
    ours = SpatialTransformer(8, 2, 6, layers=2, groups=4, linear=linear)
    ours.load_state_dict(theirs.state_dict())
    x, text = images(3, 8, 5, 6), noise(3, 7, 6)
    close(ours(x, text), theirs(x, text).sample)


@torch.no_grad()
def test_projections_by_convolution_and_by_matrix_are_one() -> None:
    conv = SpatialTransformer(8, 2, 6, layers=1, groups=4, linear=False)
    linear = SpatialTransformer(8, 2, 6, layers=1, groups=4, linear=True)
    linear.load_state_dict(
        {key: value.flatten(1) if value.dim() == 4 else value for key, value in conv.state_dict().items()}
    )
    x, text = images(3, 8, 5, 6), noise(3, 7, 6)
    close(conv(x, text), linear(x, text))


def test_tokens_are_a_view_of_the_image_and_back() -> None:
    x = images(3, 8, 5, 6)
    tokens = blocks._tokens(x)
    assert tokens.is_contiguous()
    back = blocks._image(tokens, (5, 6))
    assert tokens.data_ptr() == x.data_ptr() == back.data_ptr()
    assert torch.equal(back, x)
    assert back.stride() == x.stride()


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (1, 2)])
@torch.no_grad()
def test_halving_and_growing_back_are_diffusers_at_every_parity(size) -> None:
    down, up = Downsample2D(8, use_conv=True, name="op"), Upsample2D(8, use_conv=True)
    ours_down, ours_up = Downsampler(8), Upsampler(8)
    ours_down.load_state_dict(down.state_dict())
    ours_up.load_state_dict(up.state_dict())
    x = images(2, 8, *size)
    half = ours_down(x)
    assert half.shape[2:] == tuple((side + 1) // 2 for side in size)
    close(half, down(x))
    close(ours_up(half, size), up(half, output_size=size))


@torch.no_grad()
def test_features_enter_before_the_second_motion_module() -> None:
    stage = DownStage(SMALL, MOTION, 0).eval()
    seen: list[torch.Tensor] = []
    for module in stage.motion_modules:
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    arguments = (images(4, 8, 4, 4), noise(4, 32), noise(2, 7, 6), 2)
    feature = images(4, 8, 4, 4, seed=1)
    stage(*arguments, None)
    stage(*arguments, feature)
    without, given = seen[:3], seen[3:]
    assert torch.equal(given[0], without[0])
    close(given[1] - without[1], feature)
    assert (given[2] - without[2]).abs().max() > 0.01


@torch.no_grad()
def test_up_stage_takes_its_own_skip_connections_last_first() -> None:
    stage = UpStage(SMALL, None, 1)
    skips = [images(2, channels, 4, 4, seed=i) for i, channels in enumerate((8, 8, 8, 16, 16, 16))]
    taken: list[torch.Tensor] = []
    for resnet in stage.resnets:
        resnet.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0][:, 16:]))
    kept = list(skips)
    stage(images(2, 16, 4, 4, seed=9), noise(2, 32), noise(2, 7, 6), None, kept)
    assert len(kept) == 2
    assert all(torch.equal(a, b) for a, b in zip(taken, reversed(skips[2:]), strict=True))


def test_checkpointing_computes_every_layer_twice_time_included() -> None:
    stage = DownStage(SMALL, MOTION, 0)
    calls: list[type] = []
    for module in stage.modules():
        if isinstance(module, ResnetBlock | SpatialTransformer | MotionModule):
            module.register_forward_pre_hook(lambda module, _: calls.append(type(module)))
    arguments = (images(4, 8, 4, 4).requires_grad_(), noise(4, 32), noise(2, 7, 6), 2, None)
    for times in (1, 2):
        stage.checkpointing = times == 2
        calls.clear()
        stage(*arguments)[-1].sum().backward()
        assert {kind: calls.count(kind) for kind in set(calls)} == dict.fromkeys(
            (ResnetBlock, SpatialTransformer, MotionModule), 3 * times
        )
