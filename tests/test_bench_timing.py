"""Timing on a clock that is wound by hand, and memory of calls whose tensors are known."""

from __future__ import annotations

import pytest
import torch

from animatelcm.bench.timing import Memory, Timing, interleaved, memory_of, peak_memory

MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Clock:
    """Advances by what each call is said to take; work that nobody waited for is not on it yet."""

    def __init__(self) -> None:
        self.now = self.pending = 0.0
        self.order: list[str] = []

    def call(self, name, *seconds):
        left = iter(seconds)

        def run():
            self.order.append(name)
            self.pending += next(left)

        return run

    def wait(self):
        self.now, self.pending = self.now + self.pending, 0.0


def _timed(calls, **options):
    clock = _Clock()
    timings = interleaved(
        {name: clock.call(name, *seconds) for name, seconds in calls.items()},
        synchronize=clock.wait,
        clock=lambda: clock.now,
        **options,
    )
    return timings, clock.order


def test_calls_take_turns_and_each_pays_for_itself():
    timings, order = _timed({"a": (9, 3, 1, 2), "b": (5, 40, 20, 30)}, rounds=3)
    assert order == ["a", "b"] * 4
    assert timings == {"a": Timing(9, 2, 3, 1, 3), "b": Timing(5, 30, 40, 20, 3)}


def test_more_warm_up_calls_do_not_count():
    timings, _ = _timed({"a": (7, 100, 1, 3)}, rounds=2, warmup=2)
    assert timings["a"] == Timing(7, 2, 3, 1, 2)


@pytest.mark.parametrize(("rounds", "p95"), [(1, 1), (19, 19), (20, 19), (100, 95)])
def test_ninety_five_of_a_hundred_rounds_do_not_exceed_p95(rounds, p95):
    timings, _ = _timed({"a": range(rounds, -1, -1)}, rounds=rounds, warmup=1)  # rounds - 1, ..., 0 are measured
    assert timings["a"].p95 == p95 - 1


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": 1, "warmup": 0}])
def test_a_first_call_and_a_round_are_needed(options):
    with pytest.raises(ValueError, match="one of each"):
        interleaved({"a": int}, **options)
    with pytest.raises(ValueError, match="0 calls"):
        interleaved({}, rounds=1)


def _allocate(*sizes, keep):
    """One tensor of each size in MiB, after the other; with ``keep`` all of them live to the end."""
    held = []
    for size in sizes:
        held.append(torch.empty(size * MIB, dtype=torch.uint8, device=DEVICE))
        if not keep:
            held.clear()


@pytest.mark.parametrize(("keep", "peak"), [(True, 24), (False, 16)])
def test_the_peak_is_of_what_lives_at_once(keep, peak):
    assert peak_memory(lambda: _allocate(16, 8, keep=keep)) == peak * MIB


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA's count goes down with what was there before")
def test_the_peak_is_the_same_each_time_whatever_was_there_before():
    older = [torch.empty(64 * MIB, dtype=torch.uint8, device=DEVICE)]
    first = peak_memory(lambda: (_allocate(8, keep=True), older.clear(), _allocate(16, keep=True)))
    assert first == peak_memory(lambda: _allocate(16, keep=True)) == 16 * MIB


def test_the_peak_of_a_backward_pass_is_the_chain_rule_s():
    """Of y = relu(x), z = relu(y): both results and, while the last gradient is made, two gradients."""
    x = torch.randn(4 * MIB, requires_grad=True, device=DEVICE)
    size = 4 * x.numel()

    def call():
        torch.relu(torch.relu(x)).backward(torch.ones(1, device=DEVICE).expand_as(x))
        x.grad = None

    assert peak_memory(call) == pytest.approx(4 * size, rel=0.05)


class _Allocator:
    """torch.cuda's counters, in bytes: of tensors, and of blocks that are kept from others."""

    def __init__(self, monkeypatch) -> None:
        self.alive = self.kept = self.most_alive = self.most_kept = 0
        said = {
            "is_available": lambda: True,
            "synchronize": lambda *_: None,
            "empty_cache": self.empty_cache,
            "reset_peak_memory_stats": self.reset,
            "memory_allocated": lambda *_: self.alive,
            "max_memory_allocated": lambda *_: self.most_alive,
            "max_memory_reserved": lambda *_: self.most_kept,
        }
        for name, value in said.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def take(self, count):
        self.alive += count
        self.kept = max(self.kept, self.alive)
        self.most_alive, self.most_kept = max(self.most_alive, self.alive), max(self.most_kept, self.kept)

    def empty_cache(self):
        self.kept = self.alive

    def reset(self):
        self.most_alive, self.most_kept = self.alive, self.kept


def test_on_a_gpu_weights_and_what_earlier_calls_left_do_not_count(monkeypatch):
    cuda = _Allocator(monkeypatch)
    cuda.take(100)  # weights
    cuda.take(70)
    cuda.take(-70)  # an earlier call, whose blocks are kept

    def call():
        cuda.take(30)
        cuda.take(-30)
        cuda.kept += 20  # a graph's own

    def twice():
        call()
        cuda.take(10)
        cuda.most_kept = max(cuda.most_kept, cuda.kept)

    assert memory_of(twice) == Memory(tensors=30, held=50)
    assert memory_of(twice, "cuda") == Memory(tensors=40 - 10, held=50)


def test_memory_of_a_model_on_the_cpu_is_the_cpus_where_there_is_a_gpu(monkeypatch):
    _Allocator(monkeypatch)
    taken = memory_of(lambda: torch.empty(16 * MIB, dtype=torch.uint8), "cpu")
    assert taken == Memory(16 * MIB, 16 * MIB)
