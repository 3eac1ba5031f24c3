"""Networks that take turns make the same videos; what is asked for in place of what does not fit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from animatelcm import memory
from animatelcm.condition import Condition, Control
from animatelcm.model_source import ModelSource
from animatelcm.nets.blocks import TransformerBlock
from animatelcm.nets.graphs import Graphs
from animatelcm.nets.motion import MotionConfig, TemporalAttention
from animatelcm.nets.unet import VideoUNet
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample
from networks import SMALL
from test_condition import beside, clip

REQUEST = SampleRequest(prompt="a parrot", num_frames=2, num_inference_steps=2, guidance_scale=1.0)


@pytest.fixture
def model(fresh_model):
    return replace(fresh_model)


@pytest.fixture
def moves(model, monkeypatch):
    """The CPU stands in for a device of its own, "cpu:0"; moves of whole networks as (name, whether to the device)."""
    there, made = torch.device("cpu", 0), []
    names = {network: name for name, network in model.networks.items()}
    to, arrive, leave = nn.Module.to, memory._Guests.__init__, memory._Guests.leave

    def arrived(self: memory._Guests, networks: list[nn.Module], device: torch.device) -> None:
        made.extend((names[network], True) for network in networks)
        arrive(self, networks, device)

    def left(self: memory._Guests) -> None:
        made.extend((names[network], False) for network in self.networks)
        leave(self)

    def recorded(self: nn.Module, *args, **options) -> nn.Module:
        if self in names:
            made.append((names[self], args[0] == there))
        return to(self, *args, **options)

    monkeypatch.setattr(nn.Module, "to", recorded)
    monkeypatch.setattr(memory._Guests, "__init__", arrived)
    monkeypatch.setattr(memory._Guests, "leave", left)
    monkeypatch.setattr(memory, "has_own_memory", lambda _: True)
    monkeypatch.setattr(type(model), "device", property(lambda self: self.runs_on or there))
    return made


def test_networks_take_turns_and_are_back_at_the_end(model, moves):
    plain = sample(model, REQUEST, offload="none")[0]
    assert not moves
    made = sample(model, REQUEST, offload="model")[0]
    away, turns, back = moves[:3], moves[3:-3], moves[-3:]
    assert sorted(away) == [("text_encoder", False), ("unet", False), ("vae", False)]
    assert turns == [
        *[("text_encoder", True), ("text_encoder", False)],
        *[("unet", True), ("unet", False)],
        ("vae", True),
    ]
    assert sorted(back) == [("text_encoder", True), ("unet", True), ("vae", True)]
    assert (made.frames == plain.frames).all()
    assert model.runs_on is None
    moves.clear()
    assert (sample(model, REQUEST, offload="none")[0].frames == plain.frames).all()
    assert not moves  # no hook is left


def test_everything_is_back_after_a_failure_too(model, moves):
    def stop(_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, REQUEST, offload="model", progress=stop)
    assert sorted(moves[-3:]) == [("text_encoder", True), ("unet", True), ("vae", True)]
    assert model.runs_on is None
    moves.clear()
    sample(model, REQUEST, offload="none")
    assert not moves


def test_at_no_time_are_two_on_the_device(model, moves):
    list(sample(model, replace(REQUEST, num_videos_per_prompt=2), offload="model"))
    here: set[str] = set()
    for name, arrives in moves[3:-3]:
        (here.add if arrives else here.discard)(name)
        assert len(here) <= 1


def test_adapters_and_pictures_take_their_turn(fresh_model, monkeypatch):
    monkeypatch.setattr(memory, "has_own_memory", lambda _: True)
    model = beside(fresh_model)
    condition = Condition(image=clip(2)[0], controls=(Control("pose", clip(2)), Control("edge", clip(2))))
    plain = sample(model, REQUEST, condition=condition, offload="none")[0]
    assert (sample(model, REQUEST, condition=condition, offload="model")[0].frames == plain.frames).all()


def test_weights_that_were_moved_can_still_be_trained(model, moves):
    sample(model, REQUEST, offload="model")
    assert not any(p.is_inference() for network in model.networks.values() for p in network.parameters())


@torch.inference_mode()
def test_guests_leave_where_they_lay_and_take_what_changed_with_them(model):
    unet = model.unet
    lay = {name: (p.data_ptr(), p.detach().clone()) for name, p in unet.named_parameters()}
    copied = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:  # as a device of its own memory does it
        patch.setattr(torch.Tensor, "to", lambda self, *a, **k: copied(self, *a, **k, copy=True))
        guests = memory._Guests([unet], torch.device("cpu"))
    assert not any(p.data_ptr() == lay[name][0] for name, p in unet.named_parameters())
    unet.conv_out.bias.add_(1)
    guests.leave()
    lay["conv_out.bias"][1].add_(1)
    for name, p in unet.named_parameters():
        assert (p.data_ptr() == lay[name][0]) == (name != "conv_out.bias")
        assert torch.equal(p, lay[name][1]), name
        assert not p.is_inference()
    unet.conv_out.bias.sub_(1)


def test_guests_may_share_weights_or_be_loaded_in_inference_mode():
    one = nn.Linear(2, 2)
    with torch.inference_mode():
        other = nn.Linear(2, 2)
    other.weight = one.weight
    home, copied = one.weight.data_ptr(), torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, *a, **k: copied(self, *a, **k, copy=True))
        guests = memory._Guests([one, other], torch.device("cpu"))
    assert one.weight.data_ptr() != home
    with torch.inference_mode():
        other.bias.fill_(3)
    guests.leave()
    assert one.weight.data_ptr() == other.weight.data_ptr() == home
    assert (other.bias == 3).all()


def test_guests_that_do_not_fit_are_at_home_again(model, monkeypatch):
    lay, copied, arrived = [p.data_ptr() for p in model.unet.parameters()], torch.Tensor.to, []

    def full(self: torch.Tensor, *arguments, **options) -> torch.Tensor:
        arrived.append(self)
        return copied(self, *arguments, **options, copy=True) if len(arrived) < 9 else _full()

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        memory._Guests([model.unet], torch.device("cpu"))
    assert len(arrived) == 9
    assert [p.data_ptr() for p in model.unet.parameters()] == lay


@pytest.mark.parametrize(("free", "away"), [(10**15, False), (0, True)])
def test_auto_offloads_where_memory_is_short(model, moves, monkeypatch, free, away):
    monkeypatch.setattr(memory, "free_memory", lambda _: free)
    sample(model, REQUEST)
    assert bool(moves) == away


def test_a_device_that_shares_the_cpus_memory_is_left_alone(model):
    with memory.offloaded(model):
        assert model.runs_on is None
    assert not memory.is_short(model, REQUEST)


def _full(*_, **__) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_an_unet_without_memory_is_tried_again_alone_then_refused_with_numbers(model, moves, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**15)
    plain = sample(model, REQUEST)[0]
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda *a, **k: forward(*a, **k) if model.runs_on else _full())
    assert (sample(model, REQUEST)[0].frames == plain.frames).all()
    with pytest.raises(ValueError, match=r"too little memory to denoise this video; num_frames=1, or a size of"):
        sample(model, REQUEST, offload="none")
    monkeypatch.setattr(model.unet, "forward", _full)
    with pytest.raises(ValueError, match=r"or a size of 56x56, may fit$"):
        sample(model, REQUEST)
    assert model.runs_on is None


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        memory.attempt(fail)
    assert memory.attempt(_full) is None
    assert memory.attempt(lambda: 3) == 3


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_a_lack_of_memory_is_known_by_its_words(said):
    def fail() -> None:
        raise RuntimeError(said)

    assert memory.attempt(fail) is None


# Graphs


def _recorded(graphs: Graphs) -> None:
    """A graph of the simplest network."""
    graphs._record = lambda call: (lambda: None, call())
    for _ in range(2):
        graphs(nn.Identity(), torch.ones(1))


def test_graphs_are_dropped_where_memory_does_not_suffice(model):
    held, calls = [True], []

    def full_beside_graphs() -> int:
        calls.append(bool(model._graphs))
        return _full() if calls[-1] else 3

    _recorded(model._graphs)
    assert memory.attempt(full_beside_graphs) == 3
    assert calls == [True, False]

    def full() -> None:
        held.append(bool(model._graphs))
        _recorded(model._graphs)
        _full()

    _recorded(model._graphs)
    assert memory.attempt(full) is None
    assert held[1:] == [True, False]  # once more, not for ever
    assert not model._graphs


def test_graphs_are_dropped_where_weights_go_away(model, moves):
    _recorded(model._graphs)
    with memory.offloaded(model):
        assert not model._graphs


def test_memory_of_graphs_is_free_where_it_is_wanted(model, moves, monkeypatch):
    request = replace(REQUEST, width=64, height=64)
    one = memory.needed(model, request)
    monkeypatch.setattr(memory, "free_memory", lambda _: one * (2 if model._graphs else 4))
    for count, kept in ((1, True), (2, True), (3, False)):
        _recorded(model._graphs)
        assert memory.at_a_time(model, replace(request, num_videos_per_prompt=count)) == count
        assert bool(model._graphs) == kept
    monkeypatch.setattr(memory, "free_memory", lambda _: one - 1 if model._graphs else one)
    _recorded(model._graphs)
    assert not memory.is_short(model, request)
    assert not model._graphs
    monkeypatch.setattr(memory, "free_memory", lambda _: one - 1)
    assert memory.is_short(model, request)


@pytest.mark.parametrize(("backend", "free"), [("native", 100 + 30 - 4), ("cudaMallocAsync", 100 + 30)])
def test_free_memory_leaves_pools_of_graphs_out(monkeypatch, backend, free):
    def segment(device: int, pool: tuple[int, int], total: int, used: int) -> dict[str, object]:
        return {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": used}

    segments = [segment(0, (0, 1), 5, 1), segment(0, (0, 0), 36, 10), segment(1, (0, 1), 8, 1)]
    fakes = {"memory_reserved": 41, "memory_allocated": 11, "mem_get_info": (100, 200)}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    assert memory.free_memory(torch.device("cuda", 0)) == memory.free_memory(torch.device("cuda")) == free


def test_projections_that_come_to_a_gpu_lie_beside_each_other_again(monkeypatch):
    unet = VideoUNet(SMALL, MotionConfig(num_attention_heads=2, norm_num_groups=4))
    monkeypatch.setattr(VideoUNet, "to", lambda self, _: self._apply(torch.clone))
    layers = [m.attn1 for m in unet.modules() if isinstance(m, TransformerBlock)]
    layers += [m for m in unet.modules() if isinstance(m, TemporalAttention)]
    for device, joined in (("cuda:1", True), ("cpu", False), (torch.device("cuda"), True)):
        with torch.inference_mode():
            memory._move([unet, nn.Identity()], device)
        with torch.no_grad():
            assert [layer._joined() is not None for layer in layers] == [joined] * len(layers)
    assert layers
    assert not any(p.is_inference() for p in unet.parameters())


def test_a_model_that_does_not_fit_waits_on_the_cpu(moves, model, monkeypatch):
    there, asked = torch.device("cpu", 0), []

    def load_sum(source, *, device, **options):
        asked.append(str(device))
        return _full() if device == there else copy.deepcopy(model)  # hooks stay on its networks

    monkeypatch.setattr(memory, "load_sum", load_sum)
    assert memory.load_for(ModelSource(), device=there, offload="auto").runs_on == there
    assert asked == ["cpu:0", "cpu"]
    assert memory.load_for(ModelSource(), device=there, offload="model").runs_on == there
    assert asked[2:] == ["cpu"]
    with pytest.raises(ValueError, match="cpu:0 has too little memory for the model; choose --offload model"):
        memory.load_for(ModelSource(), device=there, offload="none")


def test_what_is_needed_grows_with_frames_places_and_guidance(model):
    def need(**fields) -> int:
        known = {"width": 512, "height": 512, "num_frames": 16}
        return memory.needed(model, replace(REQUEST, **known | fields))

    assert need(num_frames=32) == 2 * need()
    assert need(guidance_scale=7.5) == 2 * need()
    assert need(width=256) == need() // 2
    assert need(num_frames=1000, context_length=16) == need()
    assert memory.smaller(model, replace(REQUEST, width=64, height=64)) == "num_frames=1, or a size of 40x40,"
    long = replace(REQUEST, width=64, height=64, num_frames=100, context_length=16)
    assert memory.smaller(model, long) == "context_length=8, or a size of 40x40,"
