"""A network's evaluations compiled by OpenVINO, for CPUs that make many videos of one shape."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Hashable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from animatelcm.nets.graphs import outlined, tensors, weights, with_tensors

if TYPE_CHECKING:
    import openvino

MOST = 4
"""Shapes that are compiled at a time: each has a copy of the weights."""


class _Compiled(NamedTuple):
    inputs: list[Tensor]
    """Where the request reads, contiguous."""
    request: openvino.InferRequest


class Compiled:
    """Calls a float32 network as it would be called, and returns what it would return, to float32's rounding.

    Each kind of call (shapes and flags, as ``nets.graphs`` has it) is compiled at its first, which takes seconds for
    the miniature and a minute at Stable Diffusion 1.5's size. What was compiled is dropped where weights have changed.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []  # so that no other tensor gets the number or the place of one of them
        self._state: list[tuple[int, int, int]] = []
        self._known: dict[Hashable, _Compiled] = {}

    def __len__(self) -> int:
        """Kinds of calls that are compiled."""
        return len(self._known)

    def __reduce__(self) -> tuple[type[Compiled], tuple[()]]:
        """A copy of a model has other weights: it begins with nothing compiled."""
        return Compiled, ()

    def __call__(self, network: nn.Module, x: Tensor, *arguments: object, **options: object) -> Tensor:
        """Raises ValueError where OpenVINO is not installed, and for a network that is not a CPU's in float32."""
        held = weights(network)
        state = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in held]
        if state != self._state:
            check(network)
            self._known.clear()
            self._held, self._state = held, state
        given = ((x, *arguments), options)
        key = outlined(given)
        if key not in self._known:
            while len(self._known) >= MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = _compiled(network, given)
        inputs, request = self._known[key]
        for place, new in zip(inputs, tensors(given), strict=True):
            place.copy_(new)
        request.infer()
        return torch.from_numpy(np.array(request.get_output_tensor(0).data))

    def forget(self) -> None:
        """Drop all that is compiled."""
        self._known.clear()


def check(network: nn.Module) -> None:
    """Raises ValueError where OpenVINO is not installed, and for a network that is not a CPU's in float32."""
    kinds = {f"{tensor.dtype} on {tensor.device.type}" for tensor in network.parameters()}
    if kinds != {"torch.float32 on cpu"}:
        found = ", ".join(sorted(kinds)).replace("torch.", "")
        raise ValueError(f"OpenVINO compiles float32 networks of a CPU here, this one is {found}; choose compile=auto")
    _library()


def _library() -> ModuleType:
    """OpenVINO, without the package by which it tells its makers of every import and every conversion."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)
    try:
        return import_module("openvino")
    except ImportError as error:
        missing = "compile=openvino needs a package that is not installed"
        raise ValueError(f"{missing}: pip install 'animatelcm[openvino]'") from error


def _compiled(network: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> _Compiled:
    library = _library()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    def call(*held: Tensor) -> Tensor:
        arguments, options = with_tensors(given, iter(held))
        return network(*arguments, **options)

    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that branches on shapes are taken once and for all, which is what is wanted
        held = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors(given)]
        traced = torch.jit.trace(call, tuple(held), check_trace=False)
        frontend = FrontEndManager().load_by_framework("pytorch")  # a third of the time of openvino.convert_model
        decoder = TorchScriptPythonDecoder(traced, example_input=tuple(held))  # it must outlive the conversion
        model = frontend.convert(frontend.load(decoder))
    model.reshape({place: list(tensor.shape) for place, tensor in enumerate(held)})
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # left to itself it takes bfloat16 where the processor has it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = library.Core().compile_model(model, "CPU", settings).create_infer_request()
    for place, tensor in enumerate(held):
        request.set_input_tensor(place, library.Tensor(tensor.numpy(), shared_memory=True))
    return _Compiled(held, request)
