"""A network's evaluations as CUDA graphs: recorded where a shape comes again, then replayed without a launch from
Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from animatelcm.nets.fused import Kept

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A call, which was made before -> what repeats it, and the tensor that its result is in then."""
MOST = 8
"""Kinds of calls that are known at a time."""
_LIVE: WeakSet[Graphs] = WeakSet()


class _Recorded(NamedTuple):
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


class OnDevice:
    """Records calls of the current CUDA device. Its graphs share their memory: no two of them run at a time, and what
    one leaves there is taken away before the next."""

    def __init__(self) -> None:
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self._graphs), None)  # one whose graphs are all gone is gone too
        with torch.cuda.graph(graph, pool=pool, stream=_stream(torch.cuda.current_device())):
            result = call()
        self._graphs.add(graph)
        return graph.replay, result


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """What graphs of a device are recorded on: memory of a pool is used again on the same stream alone."""
    return torch.cuda.Stream(device)


class Graphs:
    """Calls a network as it would be called, and returns what it would return.

    Tensors among the arguments, also within lists, tuples and dictionaries, may hold other values at each call: they
    are copied to where the graph reads them. Everything else chooses the graph: shapes and flags. The first call of a
    kind is the network's own, the second too, and is recorded after it; from the third on it is replayed. Weights may
    change in place; where they have moved, all graphs are dropped.
    """

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = OnDevice() if record is None else record
        self._places: list[int] = []
        self._known: dict[Hashable, _Recorded | None] = {}
        _LIVE.add(self)

    def __len__(self) -> int:
        """Kinds of calls that are known, recorded or not yet."""
        return len(self._known)

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        """A copy of a model has other weights: it begins without graphs."""
        return Graphs, ()

    def __call__(self, network: nn.Module, x: Tensor, *arguments: object, **options: object) -> Tensor:
        places, given = [tensor.data_ptr() for tensor in weights(network)], ((x, *arguments), options)
        if places != self._places:
            self.forget()
            self._places = places
        key = outlined(given)
        if key not in self._known:
            self._known[key] = None
            if len(self._known) > MOST:
                del self._known[next(iter(self._known))]
            return network(x, *arguments, **options)
        made = self._known[key]
        if made is None:
            self._known[key], result = self._made(network, given)
            return result
        torch._foreach_copy_(made.inputs, list(tensors(given)))
        made.replay()
        return made.result.clone()

    def forget(self) -> bool:
        """Drop all graphs and free their memory; whether there was one."""
        held = any(made is not None for made in self._known.values())
        self._known.clear()
        if held:
            torch.cuda.empty_cache()
        return held

    def _made(self, network: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[_Recorded, Tensor]:
        """A graph of a call, and what the call returned. It is made on the tensors that the graph will read, so that
        nothing is used in a recording for the first time."""
        held = [tensor.clone() for tensor in tensors(given)]
        arguments, options = with_tensors(given, iter(held))

        def call() -> Tensor:
            return network(*arguments, **options)

        with torch.cuda.device_of(held[0]):
            result = call()
            return _Recorded(held, *self._record(call)), result


def forget_all() -> bool:
    """Drop the graphs of every model and free their memory; whether there was one."""
    held = [graphs.forget() for graphs in _LIVE]
    return any(held)


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors of a structure of lists, tuples and dictionaries, but what layers keep of weights for oneDNN."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and not isinstance(value, Kept):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:  # noqa: ANN401 - the same structure
    """The same structure with other tensors, in the order of ``tensors``."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict) and not isinstance(value, Kept):
        return {key: with_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [with_tensors(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def outlined(value: object) -> Hashable:
    """All of a structure but the numbers in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, Kept):
        return Kept
    if isinstance(value, dict):
        return tuple((key, outlined(part)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return tuple(outlined(part) for part in value)
    return value


def weights(network: nn.Module) -> list[Tensor]:
    """A network's parameters and buffers. They are asked for at each call: ``parameters()`` takes six times as long."""
    modules, held = [network], []
    for module in modules:  # it grows meanwhile
        held += module._parameters.values()
        held += module._buffers.values()
        modules += [part for part in module._modules.values() if part is not None]
    return [tensor for tensor in held if tensor is not None]
