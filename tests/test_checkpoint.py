from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from animatelcm import checkpoint
from animatelcm.checkpoint import TrainState
from animatelcm.ema import Ema
from animatelcm.recipes import image_lcm_sd15


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


def _saved(folder, config, processes):
    state, _ = _state(0)
    state.processes = processes
    return checkpoint.save(state, folder, config.to_json())


@pytest.mark.parametrize(("accumulation", "now"), [(4, 4), (16, 1)])
def test_a_step_may_be_shared_anew_if_it_keeps_its_batches(accumulation, now, tmp_path):
    """8 processes x 2 batches = 16."""
    config = replace(image_lcm_sd15(), gradient_accumulation_steps=2, out=tmp_path)
    path = _saved(tmp_path, config, 8)
    with pytest.raises(ValueError, match=rf"8 processes .* 2, here are {now} .* 2; keep .*, 16 in all"):
        checkpoint.continues(config, now, path)
    said = checkpoint.continues(replace(config, gradient_accumulation_steps=accumulation), now, path)
    assert f"{now} processes x gradient_accumulation_steps {accumulation}, before 8 processes" in said
    with pytest.raises(ValueError, match="another batch_size"):
        checkpoint.continues(replace(config, batch_size=1), 8, path)


def test_a_run_goes_on_as_it_was_or_is_refused_by_name(tmp_path):
    config = replace(image_lcm_sd15(), out=tmp_path)
    path = _saved(tmp_path, config, 2)
    assert checkpoint.continues(replace(config, gradient_checkpointing=False, steps=7, log_every=1), 2, path) == ""
    with pytest.raises(ValueError, match="another seed"):
        checkpoint.continues(replace(config, seed=1), 2, path)
    with pytest.raises(ValueError, match="here are 1 processes"):
        checkpoint.continues(config, 1, path)
    manifest = path / "manifest.json"
    facts = json.loads(manifest.read_text())
    assert facts.pop("processes") == 2
    manifest.write_text(json.dumps(facts))  # as runs before this was written down
    assert checkpoint.continues(config, 1, path) == checkpoint.continues(config, 2, path) == ""
