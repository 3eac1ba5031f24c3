from __future__ import annotations

import pytest
import torch
from torch import nn

from animatelcm import checkpoint
from animatelcm.checkpoint import TrainState
from animatelcm.ema import Ema


def _state(seed: int) -> TrainState:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)
    parameters = dict(network.named_parameters())
    return TrainState(
        0, parameters, Ema(0.9, parameters), torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    ), network


def _advance(state: TrainState, network: nn.Module, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(state.step))
        network(x).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.parameters)
        state.step += 1


def test_a_restored_state_goes_on_as_if_nothing_had_happened(tmp_path):
    one, net = _state(0)
    _advance(one, net, 3)
    path = checkpoint.save(one, tmp_path, "{}")
    _advance(one, net, 3)
    two, other = _state(1)
    checkpoint.restore(two, path)
    assert two.step == 3
    _advance(two, other, 3)
    for name in one.parameters:
        assert torch.equal(one.parameters[name], two.parameters[name])
        assert torch.equal(one.ema.shadows[name], two.ema.shadows[name])


def test_the_newest_two_are_kept(tmp_path):
    state, _ = _state(0)
    for state.step in (10, 20, 30):
        checkpoint.save(state, tmp_path, "{}")
    assert [path.name for path in checkpoint.finished(tmp_path)] == ["step-00000020", "step-00000030"]


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    state, _ = _state(0)
    checkpoint.save(state, tmp_path, "{}")
    state.step = 5
    monkeypatch.setattr(checkpoint, "_optimizer_tensors", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(state, tmp_path, "{}")
    assert [path.name for path in checkpoint.finished(tmp_path)] == ["step-00000000"]


def test_another_runs_checkpoint_is_refused(tmp_path):
    state, _ = _state(0)
    path = checkpoint.save(state, tmp_path, "{}")
    linear = nn.Linear(2, 2)
    parameters = dict(linear.named_parameters())
    other = TrainState(0, parameters, Ema(0.9, parameters), torch.optim.AdamW(parameters.values()))
    with pytest.raises(ValueError, match="another run"):
        checkpoint.restore(other, path)
