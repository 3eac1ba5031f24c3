"""What a graph needs, tried with a recorder that does as a graph does: a call is repeated on its first tensors."""

from __future__ import annotations

import copy
import weakref
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from animatelcm.nets import graphs
from animatelcm.nets.graphs import Graphs, OnDevice
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


class Logged:
    """``repeated``, and a line for whatever happens."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, call):
        self.log.append("record")
        replay, result = repeated(call)
        return (lambda: (self.log.append("replay"), replay())), result


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
def test_no_evaluation_is_thrown_away(unet) -> None:
    """A clip of one step records nothing; from the second step of a kind on one call is one evaluation."""
    record, given = Logged(), inputs()
    fast, forward = Graphs(record), unet.forward
    unet.forward = lambda *x, **options: (record.log.append("call"), forward(*x, **options))[1]
    for lines in (["call"], ["call", "record", "call"], ["replay", "call"], ["replay", "call"]):
        record.log.clear()
        torch.testing.assert_close(fast(unet, *given), forward(*given), atol=1e-6, rtol=0)
        assert record.log == lines  # the call of a recording launches nothing


@torch.inference_mode()
def test_weights_may_change_in_place(unet) -> None:
    record, given = Logged(), inputs()
    fast = Graphs(record)
    before = [fast(unet, *given) for _ in range(3)][-1]
    unet.conv_out.weight.data.mul_(2)
    after = fast(unet, *given)
    torch.testing.assert_close(after, unet(*given))
    assert not torch.equal(after, before)
    assert record.log == ["record", "replay", "replay"]


def _elsewhere(unet: VideoUNet) -> None:
    unet.conv_out.weight.data = unet.conv_out.weight.data.clone()


def _assigned(unet: VideoUNet) -> None:
    unet.load_state_dict({name: value.clone() for name, value in unet.state_dict().items()}, assign=True)


def _exchanged(unet: VideoUNet) -> None:
    unet.up_blocks[0].resnets[0].conv1 = copy.deepcopy(unet.up_blocks[0].resnets[0].conv1)


def _positioned(unet: VideoUNet) -> None:
    module = next(m for m in unet.modules() if "positions" in m._buffers)
    module.positions = module.positions.clone()


@pytest.mark.parametrize(
    "move",
    [
        *(_elsewhere, _assigned, _exchanged, _positioned, VideoUNet.join_projections),
        lambda unet: unet._apply(torch.clone),  # as ``to`` another device does
    ],
)
@torch.inference_mode()
def test_weights_that_have_moved_end_all_graphs(unet, move) -> None:
    record = Logged()
    fast = Graphs(record)
    for _ in range(2):
        fast(unet, *inputs())
        fast(unet, *inputs(4))
    assert len(fast) == 2
    move(unet)
    record.log.clear()
    torch.testing.assert_close(fast(unet, *inputs()), unet(*inputs()))
    assert len(fast) == 1
    assert not record.log
    fast(unet, *inputs())
    fast(unet, *inputs())
    assert record.log == ["record", "replay"]


@torch.inference_mode()
def test_what_is_forgotten_leaves_nothing_behind() -> None:
    held, network, x = [], nn.Linear(2, 2), noise(1, 2)

    class Graph:
        def replay(self) -> None: ...

    def record(call):
        graph, result = Graph(), call()
        held.extend(map(weakref.ref, (graph, result)))
        return graph.replay, result

    one, other = Graphs(record), Graphs(record)
    assert not graphs.forget_all()
    for fast in (one, one, other, other):
        fast(network, x)
    assert all(part() is not None for part in held)
    assert one.forget()
    assert not one.forget()
    assert [part() is None for part in held] == [True, True, False, False]
    assert graphs.forget_all()
    assert all(part() is None for part in held)
    assert len(one) == len(other) == 0


@torch.inference_mode()
def test_copies_begin_without_graphs() -> None:
    fast, network, x = Graphs(repeated), nn.Linear(2, 2), noise(1, 2)
    fast(network, x)
    fast(network, x)
    copied = copy.deepcopy(SimpleNamespace(graphs=fast)).graphs
    assert len(copied) == 0
    assert copied in graphs._LIVE
    assert fast.forget()


@torch.inference_mode()
def test_a_recording_is_made_on_the_device_of_its_tensors(monkeypatch) -> None:
    inside: list[int] = []

    @contextmanager
    def device_of(x):
        inside.append(x.shape[0])
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)

    def record(call):
        assert inside == [3]
        return repeated(call)

    fast, network, x = Graphs(record), nn.Linear(2, 2), noise(3, 2)
    for _ in range(3):
        torch.testing.assert_close(fast(network, x), network(x))
    assert not inside


def test_graphs_share_a_pool_and_a_stream_of_their_device(monkeypatch) -> None:
    begun, now, pools = [], [0], iter(range(9))

    class Graph:
        def replay(self) -> None: ...

        def pool(self) -> int:
            return self.shared

    @contextmanager
    def recording(graph, pool=None, stream=None):
        graph.shared = next(pools) if pool is None else pool
        begun.append((graph.shared, stream))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(graphs, "_stream", cache(graphs._stream.__wrapped__))
    record = OnDevice()
    kept = [record(lambda: noise(1)) for _ in range(2)]
    assert begun[0] == begun[1]
    assert begun[0][1].device == 0
    now[0] = 1
    kept.append(record(lambda: noise(1)))
    assert begun[2][1].device == 1
    del kept[0]
    record(lambda: noise(1))
    kept.clear()
    record(lambda: noise(1))
    assert [pool for pool, _ in begun] == [0, 0, 0, 0, 1]  # where none is left, so is no pool


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
        for _ in range(3):
            torch.testing.assert_close(fast(unet, *given, **options), unet(*given, **options))
        assert len(fast) == count + 1


@torch.inference_mode()
def test_no_more_than_a_few_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    fast, network = Graphs(repeated), nn.Linear(2, 2)
    for rows in (1, 1, 2, 2, 3, 3, 1, 1):
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
