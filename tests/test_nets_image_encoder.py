"""AnimateLCM's encoder of a picture, against its layout as published and against its formula by hand."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import standins
from animatelcm.nets import emoji
from animatelcm.nets.image_encoder import ImageEncoder, ImageEncoderConfig, ImageTokens
from animatelcm.weights.keys import image_encoder_shapes

NARROW = ImageEncoderConfig(channels=(8, 12, 12, 16), in_channels=4)
"""Widths change at two of the three steps down, as in Stable Diffusion 1.5."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def acting(config: ImageEncoderConfig) -> ImageEncoder:
    """An encoder whose every number is random, in float64."""
    network = ImageEncoder(config).double().eval().requires_grad_(False)
    for i, parameter in enumerate(network.parameters()):
        parameter.copy_(0.3 * noise(*parameter.shape, seed=i))
    return network


def by_hand(state: dict[str, Tensor], frames: Tensor, motion_scale: float) -> list[Tensor]:
    """The published layout: frames (F, C, h, w) of one video -> one (F, C', h', w') a level."""

    def conv(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    x = conv("conv_in", frames, padding=1)
    x = x + motion_scale * standins.waves(len(frames), x.shape[1])[:, :, None, None]
    features = []
    for i in range(len({key.split(".")[1] for key in state if key.startswith("body.")})):
        if i in (2, 4, 6):
            last = [torch.arange(side).tolist() + [side - 1] * (side % 2) for side in x.shape[2:]]
            x = x[:, :, last[0]][:, :, :, last[1]]
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        if f"body.{i}.in_conv.weight" in state:
            x = conv(f"body.{i}.in_conv", x)
        x = x + conv(f"body.{i}.block2", conv(f"body.{i}.block1", x, padding=1).clamp(min=0))
        if i % 2:
            features.append(x)
    return features


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ImageEncoderConfig(), 76_827_840),
        (ImageEncoderConfig(channels=emoji.UNET["block_out_channels"], in_channels=16), None),
        (NARROW, None),
    ],
)
def test_its_state_is_that_of_the_files(config, parameters):
    with torch.device("meta"):
        found = {key: tuple(value.shape) for key, value in ImageEncoder(config).state_dict().items()}
    assert found == image_encoder_shapes(config.channels, config.in_channels)
    if config.in_channels == 4:
        published = standins.image_encoder(config.channels)
        assert found == {key.removeprefix("img_encoder."): shape for key, shape in published.items()}
    count = sum(torch.Size(shape).numel() for shape in found.values())
    assert parameters in (None, count)


def test_a_fresh_one_says_where_a_frame_stands_and_nothing_else():
    finest, *others = ImageEncoder(NARROW)(noise(2, 4, 6, 5), 7, motion_scale=0.5)
    expected = 0.5 * standins.waves(7, 8).float().T[None, :, :, None, None].expand(2, 8, 7, 6, 5)
    torch.testing.assert_close(finest, expected, atol=1e-6, rtol=0)
    assert len(others) == 3
    assert all((level == 0).all() for level in others[:2])


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 3)])
@pytest.mark.parametrize("spread", ["repeat", "first"])
def test_features_are_those_of_the_formula(size, spread):
    network = acting(ImageEncoderConfig(**{**vars(NARROW), "spread": spread}))
    image = noise(2, 4, *size).double()
    features = network(image, 5, motion_scale=0.8)
    for one in range(2):
        frames = image[one].expand(5, -1, -1, -1).clone()
        if spread == "first":
            frames[1:] = 0
        # positions are made in float32, whatever the weights are
        for ours, theirs in zip(features, by_hand(network.state_dict(), frames, 0.8), strict=True):
            assert theirs.abs().max() > 0.1
            torch.testing.assert_close(ours[one].transpose(0, 1), theirs, atol=1e-5, rtol=0)


def test_a_picture_of_pixels_is_its_blocks_as_channels():
    """Channel c, row i and column j of a block come to channel 4 c + 2 i + j."""
    network = acting(ImageEncoderConfig(channels=(8, 12), in_channels=3, sees="pixels", downscale=2))
    image = noise(1, 3, 6, 8).double()
    blocks = torch.stack([image[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], dim=1)
    expected = by_hand(network.state_dict(), blocks.expand(3, -1, -1, -1), 1.0)
    for ours, theirs in zip(network(image, 3, 1.0), expected, strict=True):
        torch.testing.assert_close(ours[0].transpose(0, 1), theirs, atol=1e-5, rtol=0)


def test_without_motion_all_frames_are_alike():
    network = acting(NARROW)
    image = noise(1, 4, 6, 6).double()
    for still, moving in zip(network(image, 4, 0.0), network(image, 4, 0.8), strict=True):
        assert torch.equal(still, still[:, :, :1].expand_as(still))
        assert not torch.allclose(moving[:, :, 0], moving[:, :, 1])


def test_a_video_of_more_frames_begins_with_those_of_fewer():
    network, image = acting(NARROW), noise(1, 4, 6, 6).double()
    for few, many in zip(network(image, 3), network(image, 20), strict=True):
        torch.testing.assert_close(many[:, :, :3], few)


@pytest.mark.parametrize("config", [NARROW, ImageEncoderConfig(sees="pixels", in_channels=3, spread="first")])
def test_its_settings_survive_their_file(config):
    assert ImageEncoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sees": "sounds"}, "sees='sounds'"),
        ({"spread": "last"}, "spread='last'"),
        ({"channels": []}, "channels="),
        ({"channels": [320] * 9}, "channels="),
        ({"channels": [10**9]}, "16384"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"in_channels": "4"}, "in_channels="),
        ({"downscale": 10**6}, "downscale="),
        ({"chanels": [8]}, "chanels"),
    ],
)
def test_impossible_settings_are_explained(settings, named):
    with pytest.raises(ValueError, match=named):
        ImageEncoderConfig.from_json({"_class_name": "ImageEncoder", **settings})


def test_tokens_are_one_a_cell_and_know_their_place():
    torch.manual_seed(0)
    network, image = ImageTokens(4, 12).eval(), noise(2, 4, 3, 5)
    with torch.no_grad():
        tokens = network(image)
        cells = image.flatten(2).transpose(1, 2)
        hidden = F.gelu(network.proj(F.layer_norm(cells, (4,), network.norm.weight, network.norm.bias)))
        expected = network.out(hidden) + standins.waves(15, 12).float()
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)
