"""A network's evaluations as CUDA graphs: recorded once a shape, then replayed without a launch from Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A call -> what repeats it, and the tensor that its result is in then."""
MOST = 8
"""Graphs that are kept; each holds the memory of one evaluation."""


class _Recorded(NamedTuple):
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


def on_device(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a call of the current CUDA device, after the runs on another stream that torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


class Graphs:
    """Calls a network as it would be called, and returns what it would return.

    Tensors among the arguments, also within lists, tuples and dictionaries, may hold other values at each call: they
    are copied to where the graph reads them. Everything else chooses the graph: shapes, flags, where the weights lie.
    """

    def __init__(self, record: Recorder = on_device) -> None:
        self._record = record
        self._recorded: dict[Hashable, _Recorded] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def __call__(self, network: nn.Module, *arguments: object, **options: object) -> Tensor:
        given = (arguments, options)
        tensors = list(_tensors(given))
        key = (_places(network), _outline(given))
        if key not in self._recorded:
            self._recorded[key] = self._made(network, given)
            if len(self._recorded) > MOST:
                del self._recorded[next(iter(self._recorded))]
        made = self._recorded[key]
        torch._foreach_copy_(made.inputs, tensors)
        made.replay()
        return made.result.clone()

    def _made(self, network: nn.Module, given: tuple[tuple[object, ...], dict[str, object]]) -> _Recorded:
        held = [tensor.clone() for tensor in _tensors(given)]
        arguments, options = _with(given, iter(held))
        replay, result = self._record(lambda: network(*arguments, **options))
        return _Recorded(held, replay, result)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _with(value: Any, tensors: Iterator[Tensor]) -> Any:  # noqa: ANN401 - the same structure
    """The same structure with other tensors, in the order of ``_tensors``."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _with(part, tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_with(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _outline(value: object) -> Hashable:
    """All of a structure but the numbers in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((key, _outline(part)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return tuple(_outline(part) for part in value)
    return value


def _places(network: nn.Module) -> int:
    return hash(tuple(value.data_ptr() for value in (*network.parameters(), *network.buffers())))
