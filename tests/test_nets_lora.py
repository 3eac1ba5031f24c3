from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from animatelcm.config import LCM_TARGETS
from animatelcm.nets import lora, sd15
from animatelcm.nets.layers import Linear, PointwiseConv
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import Lora, LoraLayer
from lora_files import TINY

pytest.importorskip("peft")

CONFIG = TINY


@pytest.fixture
def unet() -> VideoUNet:
    torch.manual_seed(0)
    network = VideoUNet(CONFIG, MotionConfig(num_attention_heads=2, norm_num_groups=8, max_frames=4))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("proj_out.weight") and "motion_modules" in name:
                parameter.normal_(std=0.2)
    return network.eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = (noise(2, 4, 3, 8, 8), torch.tensor([3, 987]), noise(2, 7, 12, seed=1))


def random_lora(unet: VideoUNet, *, rank: int = 2, alpha: float = 3.0, motion: bool = False) -> Lora:
    """For every layer but the motion modules', or for those."""
    part: Lora = {}
    for name, value in unet.state_dict().items():
        if value.dim() > 1 and ("motion_modules" in name) == motion:
            down = 0.2 * noise(rank, *value.shape[1:], seed=len(part))
            up = 0.2 * noise(value.shape[0], rank, *[1] * (value.dim() - 2), seed=len(part) + 500)
            part[f"unet.{name.removesuffix('.weight')}"] = LoraLayer(down, up, alpha)
    return part


def added(unet: VideoUNet, part: Lora, scale: float) -> torch.Tensor:
    """The output of the network whose weights are the sum."""
    sums = fused({f"unet.{key}": value for key, value in unet.state_dict().items()}, [(part, scale)])
    return functional_call(unet, {key.removeprefix("unet."): value for key, value in sums.items()}, INPUTS)


def close(a: torch.Tensor, b: torch.Tensor, within: float) -> bool:
    return (a - b).abs().max() <= within * max(1.0, b.abs().max().item())


def test_fresh_layers_change_nothing(unet):
    before = unet(*INPUTS)
    lora.inject(unet, rank=3, alpha=2.0, targets=LCM_TARGETS)
    live = lora.factors(unet)
    assert all(a.abs().max() > 0 and not b.any() for a, b, _ in live.values())
    assert {alpha for *_, alpha in live.values()} == {2.0}
    assert close(unet(*INPUTS), before, 1e-6)


def test_what_is_ejected_leaves_the_network_as_it_was(unet):
    modules, attributes = dict(unet.named_modules()), set(vars(unet))
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    lora.inject(unet, rank=3, alpha=2.0, targets=LCM_TARGETS)
    live = {f"unet.{path}": factors for path, factors in lora.factors(unet).items()}
    taken = lora.eject(unet)
    assert [(name, id(module)) for name, module in unet.named_modules()] == [(n, id(m)) for n, m in modules.items()]
    assert set(vars(unet)) == attributes
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    assert taken.keys() == live.keys()
    for path, (a, b, alpha) in live.items():
        assert torch.equal(taken[path].down, a)
        assert torch.equal(taken[path].up, b)
        assert taken[path].alpha == alpha
        assert taken[path].down.data_ptr() != a.data_ptr()
    assert lora.eject(unet) == {}
    lora.inject(unet, rank=1, alpha=1.0, targets=LCM_TARGETS[:1])  # and it can be done again


def test_layers_draw_what_the_sum_of_weights_draws(unet):
    part = random_lora(unet)
    before, expected = unet(*INPUTS), added(unet, part, 1.0)
    lora.attach(unet, part)
    assert close(unet(*INPUTS), expected, 1e-5)
    assert (expected - before).abs().max() > 0.1
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    taken = lora.eject(unet)
    assert taken.keys() == part.keys()
    for path, layer in part.items():
        assert torch.equal(taken[path].down, layer.down)
        assert torch.equal(taken[path].up, layer.up)


@given(st.floats(-2, 2, width=32))
@settings(max_examples=8, deadline=None)
def test_a_scaled_view_is_the_sum_at_that_scale(scale):
    unet = VideoUNet(CONFIG)
    part = random_lora(unet)
    expected = added(unet, part, scale)
    lora.attach(unet, part)
    live = copy.deepcopy(unet.state_dict())
    assert close(functional_call(unet, lora.scaled(unet, scale), INPUTS), expected, 2e-5)
    assert all(torch.equal(value, live[key]) for key, value in unet.state_dict().items())


def test_scale_0_is_the_network_without_layers(unet):
    before, part = unet(*INPUTS), random_lora(unet)
    lora.attach(unet, part)
    assert close(functional_call(unet, lora.scaled(unet, 0.0), INPUTS), before, 1e-6)


def test_motion_modules_are_never_touched(unet):
    temporal = {name: module for name, module in unet.named_modules() if "motion_modules" in name}
    lora.inject(unet, rank=2, alpha=2.0, targets=LCM_TARGETS)
    assert not any("motion_modules" in path for path in lora.factors(unet))
    assert all(unet.get_submodule(name) is module for name, module in temporal.items())
    assert {path.rpartition("motion_modules")[1] for path in temporal} == {"motion_modules"}


def test_gradients_reach_a_and_b_alone(unet):
    lora.attach(unet, random_lora(unet))
    live = [factor for a, b, _ in lora.factors(unet).values() for factor in (a, b)]
    for factor in live:
        factor.requires_grad_(True)
    unet(*INPUTS).square().sum().backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in live)
    trained = {id(factor) for factor in live}
    assert all(parameter.grad is None for parameter in unet.parameters() if id(parameter) not in trained)


def test_the_targets_are_those_of_lcm_lora():
    """278 layers of Stable Diffusion 1.5, 67,252,224 numbers at rank 64: the published LCM-LoRA."""
    with torch.device("meta"):
        unet = VideoUNet(UNetConfig.from_diffusers(sd15.UNET), sd15.MOTION)
        lora.inject(unet, rank=64, alpha=8.0, targets=LCM_TARGETS)
    live = lora.factors(unet)
    assert len(live) == 278
    assert sum(a.numel() + b.numel() for a, b, _ in live.values()) == 67_252_224


def test_a_target_that_names_no_layer_is_named(unet):
    for target in ("to_x", "attn1", "motion_modules.0.proj_in"):
        with pytest.raises(ValueError, match=f"'{target}' names no spatial layer"):
            lora.inject(unet, rank=2, alpha=2.0, targets=("to_q", target))
    assert not lora.factors(unet)


@pytest.mark.parametrize("wrong", ["shape", "rank", "alpha", "part", "motion", "nothing"])
def test_what_cannot_be_attached_is_a_sentence_and_changes_nothing(unet, wrong):
    part = random_lora(unet, motion=wrong == "motion")
    path = min(part)
    layer = part[path]
    part[path] = {
        "shape": LoraLayer(layer.down[:, :-1], layer.up, layer.alpha),
        "rank": LoraLayer(layer.down[:1], layer.up[:, :1], layer.alpha),
        "alpha": LoraLayer(layer.down, layer.up, 1.0),
    }.get(wrong, layer)
    if wrong == "part":
        part["text_encoder.layers.0.fc1"] = layer
    expected = {"shape": path, "part": "text_encoder.layers.0.fc1", "motion": "motion_modules"}.get(wrong, "one rank")
    modules = [id(module) for module in unet.modules()]
    with pytest.raises(ValueError, match=expected):
        lora.attach(unet, {} if wrong == "nothing" else part)
    assert [id(module) for module in unet.modules()] == modules
    assert isinstance(unet.conv_in, nn.Conv2d)


class Layers(nn.Module):
    """One of each kind that LoRAs stand at."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point, self.linear = nn.Conv2d(3, 5, 3, 2, 1), PointwiseConv(5, 4, 1), Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.point(self.wide(x)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("graded", [True, False])
def test_frozen_factors_are_added_to_the_weight_for_the_call(scale, graded, monkeypatch):
    """The same result and the same gradient of the input as PEFT's layers."""
    network = Layers()
    lora.inject(network, rank=2, alpha=3.0, targets=("wide", "point", "linear"))
    for _, b, _ in lora.factors(network).values():
        nn.init.normal_(b)
    results = []
    for peft in (True, False):
        for _, layer in lora.layers(network):
            own = partial(type(layer).forward, layer) if peft else partial(lora._forward, layer)
            monkeypatch.setattr(layer, "forward", own)
        x = noise(2, 3, 6, 8).requires_grad_(graded)
        with torch.set_grad_enabled(graded):
            y = functional_call(network, lora.scaled(network, scale), (x,))
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0] if graded else y))
    (theirs, their_gradient), (ours, gradient) = results
    assert close(ours, theirs, 1e-6)
    assert close(gradient, their_gradient, 1e-5)


def test_frozen_factors_cost_no_product_with_what_comes_in(unet):
    lora.inject(unet, rank=2, alpha=2.0, targets=LCM_TARGETS)
    asked = []
    for _, layer in lora.layers(unet):
        layer.lora_A[lora.ADAPTER].register_forward_hook(lambda *_: asked.append(1))
    unet(*INPUTS)
    assert not asked
    for a, b, _ in lora.factors(unet).values():
        a.requires_grad_(), b.requires_grad_()
    with torch.no_grad():
        unet(*INPUTS)
    assert not asked
    unet(*INPUTS)
    assert len(asked) == len(lora.factors(unet))
