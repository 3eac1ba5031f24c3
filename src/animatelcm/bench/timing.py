"""How long calls take, side by side, and how much memory one needs."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]


class Timing(NamedTuple):
    """Seconds of one call."""

    first: float
    """The very first call: with whatever is compiled, loaded or tuned once."""
    median: float
    p95: float
    """What 95 of 100 rounds do not exceed: one of the rounds' own, the longest where there are fewer than 20."""
    least: float
    rounds: int
    """How many the figures but the first are taken from."""


def synchronize() -> None:
    """Wait until the accelerator, where there is one, has done all it was asked for."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def interleaved(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 1,
    synchronize: Call = synchronize,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time calls in turn, A B A B ..., so that what slows the machine for a while slows them alike.

    Each is called ``warmup`` times first, of which the very first is reported. ``synchronize`` runs before every
    reading of the clock. Raises ValueError without a call, a round or a warm-up.
    """
    if not calls or rounds < 1 or warmup < 1:
        raise ValueError(f"{len(calls)} calls, rounds={rounds}, warmup={warmup}: give one of each at least")

    def seconds(call: Call) -> float:
        synchronize()
        began = clock()
        call()
        synchronize()
        return clock() - began

    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: _timing(all_[0], sorted(all_[warmup:])) for name, all_ in taken.items()}


def _timing(first: float, ordered: list[float]) -> Timing:
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Timing(first, statistics.median(ordered), p95, ordered[0], len(ordered))


class Memory(NamedTuple):
    """Bytes at once at most while a call ran, beyond the tensors that were alive before."""

    tensors: int
    """Of tensors alive."""
    held: int
    """Of torch's allocator, with blocks that it keeps for reuse and CUDA graphs' own; on the CPU those of tensors."""


def memory_of(call: Call, device: torch.device | str | None = None) -> Memory:
    """What ``call`` takes of a device's memory; None: the GPU's where there is one, else the CPU's.

    Counted by torch's allocators. What was loaded before the call does not count, nor what the driver and libraries
    take by themselves. On the CPU the count is exact and the same each time; the call runs under torch's profiler for
    it, slowly, and what it does in other threads is not seen.
    """
    import torch

    gc.collect()
    if not (torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"):
        peak = _cpu_peak(call)
        return Memory(peak, peak)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # or what is kept from earlier calls would be held by this one
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - before)


def peak_memory(call: Call) -> int:
    """Of tensors alone, where they would be by themselves (``memory_of``)."""
    return memory_of(call).tensors


def _cpu_peak(call: Call) -> int:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of its start and end
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    alive: dict[int, int] = {}
    total = peak = 0
    for address, size in _allocations(profiler.profiler.kineto_results.experimental_event_tree()):
        if size > 0:
            alive[address] = size
            total += size
            peak = max(peak, total)
        else:  # of a tensor that is older than the call, the profiler may know the end
            total -= alive.pop(address, 0)
    return peak


def _allocations(roots: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of all that a profiler saw come, and of what went with a minus, in the order of time."""
    from torch._C._profiler import _EventType

    found, left = [], list(roots)
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.id, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return ((address, size) for _, _, address, size in sorted(found))
