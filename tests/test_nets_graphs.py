"""What a graph needs, tried with a recorder that does as a graph does: a call is repeated on its first tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from animatelcm.nets import graphs
from animatelcm.nets.graphs import Graphs
from animatelcm.nets.motion import MotionConfig
from animatelcm.nets.unet import VideoUNet
from networks import SMALL


def repeated(call):
    """As a CUDA graph: the same arguments, the same result's memory."""
    with torch.inference_mode():
        result = call()

    def replay() -> None:
        with torch.inference_mode():
            result.copy_(call())

    return replay, result


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unet() -> VideoUNet:
    torch.manual_seed(0)
    return VideoUNet(SMALL, MotionConfig(num_attention_heads=2, norm_num_groups=4)).eval()


def inputs(frames: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return noise(1, 4, frames, 8, 8, seed=seed), torch.tensor([900 - seed]), noise(1, 7, 6, seed=seed + 9)


@torch.inference_mode()
def test_a_replay_is_the_call_with_the_new_numbers(unet) -> None:
    fast = Graphs(repeated)
    results = []
    for seed in range(3):
        x, t, text = inputs(seed=seed)
        (remembered,) = unet.remember(t, text)
        features = [noise(1, c, 3, h, h, seed=seed) for c, h in ((8, 8), (16, 4))]
        options = {"features": features, "motion": True, "remembered": remembered}
        results.append((fast(unet, x, t, text, **options), unet(x, t, text, **options)))
    assert len(fast) == 1
    for ours, plain in results:  # kept until now: a later replay must not write into what was given away
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    assert (results[0][0] - results[1][0]).abs().max() > 0.1


@torch.inference_mode()
def test_weights_may_change_in_place_and_choose_a_graph_by_where_they_lie(unet) -> None:
    fast, given = Graphs(repeated), inputs()
    before = fast(unet, *given)
    unet.conv_out.weight.data.mul_(2)
    torch.testing.assert_close(fast(unet, *given), unet(*given))
    assert len(fast) == 1
    unet.conv_out.weight.data = unet.conv_out.weight.data.clone()
    unet.conv_out.weight.data.zero_()
    torch.testing.assert_close(fast(unet, *given), unet(*given))
    assert len(fast) == 2
    assert not torch.equal(fast(unet, *given), before)


@torch.inference_mode()
def test_shapes_flags_and_what_is_left_out_choose_a_graph(unet) -> None:
    fast = Graphs(repeated)
    for count, (given, options) in enumerate(
        [
            (inputs(), {}),
            (inputs(4), {}),
            (inputs(), {"motion": False}),
            (inputs(), {"mid_residual": noise(1, 16, 3, 4, 4)}),
        ]
    ):
        torch.testing.assert_close(fast(unet, *given, **options), unet(*given, **options))
        assert len(fast) == count + 1


@torch.inference_mode()
def test_no_more_than_a_few_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    fast, network = Graphs(repeated), nn.Linear(2, 2)
    for rows in (1, 2, 3, 1):
        x = noise(rows, 2)
        torch.testing.assert_close(fast(network, x), network(x))
        assert len(fast) <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_on_the_device_too(unet) -> None:
    fast, unet = Graphs(), unet.cuda()
    for seed in range(3):
        given = tuple(part.cuda() for part in inputs(seed=seed))
        torch.testing.assert_close(fast(unet, *given), unet(*given), atol=1e-4, rtol=0)
    assert len(fast) == 1
