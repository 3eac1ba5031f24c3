"""What OpenVINO compiles computes what the network does, with the weights that it has now."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from animatelcm.nets import openvino
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.openvino import Compiled
from animatelcm.nets.unet import VideoUNet
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample_steps
from networks import SMALL

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unet() -> VideoUNet:
    torch.manual_seed(0)
    unet = VideoUNet(SMALL, MotionConfig(num_attention_heads=2, norm_num_groups=4))
    for name, parameter in unet.named_parameters():  # or layers over time would add nothing, and prove nothing
        if "motion_modules" in name and "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return unet.eval().requires_grad_(False)


def inputs(frames: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return noise(1, 4, frames, 8, 8, seed=seed), torch.tensor([900 - seed]), noise(1, 7, 6, seed=seed + 9)


@torch.inference_mode()
def test_a_compiled_call_is_the_call_with_the_new_numbers(unet) -> None:
    fast, results = Compiled(), []
    for seed in range(2):
        x, t, text = inputs(seed=seed)
        (remembered,) = unet.remember(t, text)
        features = [noise(1, c, 3, h, h, seed=seed) for c, h in ((8, 8), (16, 4))]
        options = {"features": features, "motion": True, "remembered": remembered}
        plain = unet(x, t, text, **options)  # first: layers keep weights in oneDNN's order then
        results.append((fast(unet, x, t, text, **options), plain))
    assert len(fast) == 1
    for ours, plain in results:
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    assert (results[0][0] - results[1][0]).abs().max() > 0.1
    assert sys.modules["openvino_telemetry"] is None  # nothing is told to its makers


@torch.inference_mode()
def test_weights_that_change_are_compiled_anew(unet) -> None:
    fast, (x, t, text) = Compiled(), inputs(1)
    before = fast(unet, x, t, text)
    unet.conv_out.weight.mul_(2.0)
    after = fast(unet, x, t, text)
    torch.testing.assert_close(after, unet(x, t, text), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 0.1


def test_few_kinds_are_kept_and_copies_begin_with_none(unet, monkeypatch) -> None:
    class Request:
        def infer(self) -> None:
            pass

        def get_output_tensor(self, _) -> SimpleNamespace:
            return SimpleNamespace(data=[0.0])

    made = []
    monkeypatch.setattr(openvino, "MOST", 2)
    monkeypatch.setattr(
        openvino, "_compiled", lambda _, given: made.append(given[0][0].shape[2]) or ([*given[0]], Request())
    )
    fast = Compiled()
    for frames in (1, 2, 1, 3, 2, 1):
        fast(unet, *inputs(frames))
    assert (made, len(fast)) == ([1, 2, 3, 1], 2)  # the oldest goes
    assert len(copy.deepcopy(fast)) == 0
    fast.forget()
    assert len(fast) == 0


def test_half_precision_is_refused(unet) -> None:
    x, t, text = inputs()
    with pytest.raises(ValueError, match=r"compiles float32 networks of a CPU here, this one is bfloat16 on cpu"):
        Compiled()(unet.bfloat16(), x, t, text)


def test_a_missing_package_is_named_before_anything_is_made(fresh_model, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = replace(fresh_model)
    with pytest.raises(ValueError, match=r"pip install 'animatelcm\[openvino\]'"):
        model.compile_as("openvino")
    assert model.compile == "auto"


def test_a_video_is_the_same(fresh_model) -> None:
    request = SampleRequest(prompt="a parrot", num_frames=4, width=32, height=32, num_inference_steps=2, seed=5)
    model = replace(fresh_model)
    plain = [*sample_steps(model, request)][-1].latents
    model.compile_as("openvino")
    fast = [*sample_steps(model, request)][-1].latents
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=0)
    assert not torch.equal(fast, plain)  # or nothing was compiled
