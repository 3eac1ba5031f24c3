"""Two processes on CPUs (gloo) train as one that takes both batches; they leave together; one goes on from them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from animatelcm import processes, recipes, training
from animatelcm.training import train
from networks import same_state

RANKS = (0, 1)


def _config(out: Path, name: str = "two", **changes):
    config = replace(
        recipes.image_lcm_emoji(), model=str(out / "start"), name=name, out=out, steps=3, batch_size=1, warmup_steps=1
    )
    config = replace(config, log_every=3, save_every=1000, sample_prompts=(), gradient_checkpointing=True, **changes)
    return replace(config, data=replace(config.data, length=16, cache=False))


def _child(out: Path) -> None:
    """One of the two: trains, then trains on until the other one is interrupted."""
    torch.set_num_threads(1)
    rank, states = int(os.environ["RANK"]), []
    fresh, moved = training._fresh_state, training.update
    training._fresh_state = lambda *given: states.append(fresh(*given)) or states[-1]
    train(_config(out))
    state = states[0]
    parts = {"weights": state.parameters, "ema": state.ema.shadows, "target": state.target.shadows}
    tensors = {f"{part} {name}": value for part, named in parts.items() for name, value in named.items()}
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, out / f"{rank}.safetensors")

    def interrupted(config, accelerator, optimizer, state):
        norm = moved(config, accelerator, optimizer, state)
        if rank == 1 and state.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return norm

    training.update, processes.AGREE_EVERY = interrupted, 2
    left = train(_config(out, "left", steps=30)) is None
    group = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    told = {"left": left, "step": states[1].step, "seconds": group.options._timeout.total_seconds()}
    (out / f"{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def out(narrow_folder, tmp_path_factory):
    """The folder of both runs, and of the model that they begin with."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(narrow_folder, folder / "start")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment = os.environ | place | {"ACCELERATE_USE_CPU": "true"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in RANKS
    ]
    try:
        assert [process.wait(300) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def alone(out):
    """One process that takes in a step, one after the other, what the two took at once."""
    config = _config(out, "one", gradient_accumulation_steps=2)
    train(config)
    return config.folder


def _last(folder: Path) -> Path:
    return sorted((folder / "checkpoints").iterdir())[-1]


def test_both_hold_the_same_weights_and_averages(out):
    one, other = (load_file(out / f"{rank}.safetensors") for rank in RANKS)
    assert same_state(one, other)
    assert any(".lora_B." in name and value.abs().max() > 0 for name, value in one.items())


def test_two_are_one_that_takes_both_batches(out, alone):
    """But for rare entries whose first gradient is next to nothing: there Adam divides rounding by rounding."""
    for part in ("weights", "ema", "target"):
        two, one = (load_file(_last(folder) / f"{part}.safetensors") for folder in (out / "two", alone))
        names = [name for name in one if ".lora_B." in name]  # of A the first gradient is 0, and B is what moved
        assert two.keys() == one.keys()
        wanted, found = (torch.cat([run[name].flatten().double() for name in names]) for run in (one, two))
        size = wanted.square().mean().sqrt()
        assert size > 0
        assert ((found - wanted).abs() > 0.01 * size).double().mean() < 1e-2, part


def test_figures_are_means_over_steps_and_processes(out, alone):
    (line,), (wanted,) = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out / "two", alone)
    )
    for name in ("loss", "mse", "grad_norm"):
        assert line[name] == pytest.approx(wanted[name], rel=1e-4)
        assert line[name] > 0


def test_clips_of_every_process_count(out, alone):
    for folder in (out / "two", alone):
        done = json.loads((folder / "model" / "animatelcm.json").read_text())["trained"][folder.name]
        assert (done["steps"], done["clips"]) == (3, 6)


def test_an_interrupt_of_one_ends_both_after_the_same_step(out):
    """Asked after step 1; they agree after each second one."""
    told = [json.loads((out / f"{rank}.json").read_text()) for rank in RANKS]
    assert all((each["left"], each["step"]) == (True, 2) for each in told)
    assert [path.name for path in (out / "left" / "checkpoints").iterdir()] == ["step-00000002"]
    assert all(each["seconds"] == processes.PATIENCE.total_seconds() for each in told)


def test_one_process_goes_on_from_two_if_a_step_keeps_its_batches(out, capsys):
    """It may keep less of them in memory then, too."""
    config = _config(out, "left", steps=4)
    with pytest.raises(
        ValueError, match=r"2 processes .*; keep the batches of a step by --gradient-accumulation-steps"
    ):
        train(config, resume=True)
    split = replace(config, gradient_accumulation_steps=2, gradient_checkpointing=False)
    with pytest.raises(ValueError, match="another learning_rate"):
        train(replace(split, learning_rate=1.0), resume=True)
    assert train(split, resume=True, stop_after=3) is None
    assert "shared anew" in " ".join(capsys.readouterr().err.split())
    manifest = _last(config.folder) / "manifest.json"
    facts = json.loads(manifest.read_text())
    assert (facts["step"], facts["processes"]) == (3, 1)
    older = {name: value for name, value in facts.items() if name not in ("processes", "skipped", "scaler")}
    manifest.write_text(json.dumps(older))
    assert train(split, resume=True) == config.folder / "model"
    assert "shared anew" not in capsys.readouterr().err


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
