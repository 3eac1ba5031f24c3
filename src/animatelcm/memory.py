"""What a device's memory holds: networks that take turns on it, estimates of what is needed, what fits in its place."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from animatelcm.assembly import load_sum
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource, Offload, Precision
from animatelcm.nets import graphs
from animatelcm.nets.unet import VideoUNet
from animatelcm.request import SampleRequest

LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

ENCODED = (16, 4, 1)
"""Frames that are encoded at a time: the first number, and the next ones where memory does not suffice. Devices with a
memory of their own begin with the second."""
UNET_SHARE = 27
"""Numbers that the UNet holds at its peak, for each of its first layer's channels in each latent cell of each frame:
counted of Stable Diffusion 1.5's with AnimateDiff's temporal layers, every attention in one operation."""
DECODER_SHARE = 8
"""The same of its autoencoder's decoder, for each channel of the last level in each pixel: 7.5 were counted."""


def load_for(
    source: ModelSource,
    *,
    device: str | torch.device,
    offload: Offload = "auto",
    **options: Any,  # noqa: ANN401 - load_sum's other options
) -> VideoModel:
    """``assembly.load_sum`` onto a device; with ``offload`` "model", or where its memory does not hold the model, onto
    the CPU, from where networks come to it in turn. Raises ValueError where it does not, and none may wait."""
    if not has_own_memory(device):
        return load_sum(source, device=device, **options)
    model = None if offload == "model" else attempt(lambda: load_sum(source, device=device, **options))
    if model is None and offload == "none":
        raise ValueError(f"{device} has too little memory for the model; choose --offload model, or --device cpu")
    if model is None:
        model = load_sum(source, device="cpu", **options)
        take_turns(model, torch.device(device))
    return model


def best_dtype(precision: Precision, device: str | torch.device) -> torch.dtype:
    """What networks compute with on a device; "auto": float16 on CUDA, float32 elsewhere, where half is slower."""
    if precision == "auto":
        precision = "fp16" if torch.device(device).type == "cuda" else "fp32"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def take_turns(model: VideoModel, device: torch.device) -> Callable[[], None]:
    """From now on networks wait on the CPU, and come to the device when they are asked: text encoder, autoencoder, or
    UNet and adapters. What comes back ends it, and leaves every network where it is then."""
    decoders = [] if model.decoder is None else [model.decoder]
    groups = ([model.text_encoder], [model.vae, *decoders], [model.unet, *model.adapters.values()])
    here: list[_Guests] = []

    def bring(group: list[nn.Module]) -> None:
        if here and here[0].networks is group:
            return
        while here:
            here[-1].leave()
            here.pop()
        here.append(_Guests(group, device))

    model.forget_graphs()  # they read weights where these lie now
    for group in groups:
        _move(group, "cpu")
    # Its parts too: an autoencoder's ``decode`` and a UNet's ``remember`` ask them, not the whole.
    hooks = [
        module.register_forward_pre_hook(lambda *_, group=group: bring(group))
        for group in groups
        for network in group
        for module in network.modules()
    ]
    model.runs_on = device

    def stop() -> None:
        for hook in hooks:
            hook.remove()
        model.runs_on = None

    return stop


class _Guests:
    """Networks of the CPU with copies of their weights on a device in their place. Nothing is copied back when they
    leave, but what has changed in place meanwhile (by torch's own count, which changes of ``.data`` go past)."""

    def __init__(self, networks: list[nn.Module], device: torch.device) -> None:
        self.networks = networks
        self._homes: list[tuple[Tensor, Tensor, int | None]] = []
        weights = {id(w): w for network in networks for w in (*network.parameters(), *network.buffers())}
        try:
            with _as_weights():
                for weight in weights.values():
                    home, weight.data = weight.data, weight.data.to(device)
                    self._homes.append((weight, home, _version(weight)))
                _joined(networks, device)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Back to the CPU."""
        with _as_weights():
            while self._homes:
                weight, home, version = self._homes.pop()
                same = version is not None and _version(weight) == version
                weight.data = home if same else weight.data.to(home.device)
        torch.cuda.empty_cache()  # does nothing where CUDA was never used


def _version(weight: Tensor) -> int | None:
    """How often a weight was changed in place; None where it was made in inference mode, and nobody counts."""
    try:
        return weight._version
    except RuntimeError:
        return None


@contextmanager
def offloaded(model: VideoModel) -> Iterator[None]:
    """Networks take turns meanwhile, and are all back on their device afterwards, whatever happens. Nothing changes on
    devices that share the CPU's memory, and where they take turns already."""
    if not can_offload(model):
        yield
        return
    device = model.device
    stop = take_turns(model, device)
    try:
        yield
    finally:
        stop()
        for network in _networks(model):
            _move([network], device)


def can_offload(model: VideoModel) -> bool:
    """Whether waiting networks would leave more memory to the one that works."""
    return model.runs_on is None and has_own_memory(model.device)


def has_own_memory(device: str | torch.device) -> bool:
    """Whether a device's memory is another than the CPU's."""
    return torch.device(device).type == "cuda"


def _networks(model: VideoModel) -> list[nn.Module]:
    return [*model.networks.values(), *([] if model.decoder is None else [model.decoder])]


def _move(networks: list[nn.Module], device: str | torch.device) -> None:
    """In place."""
    with _as_weights():
        for network in networks:
            network.to(device)
        _joined(networks, device)
    torch.cuda.empty_cache()


@contextmanager
def _as_weights() -> Iterator[None]:
    """What is made in inference mode could never be trained again."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _joined(networks: list[nn.Module], device: str | torch.device) -> None:
    """Weights that lay beside each other on a GPU have come apart on their way."""
    for network in networks:
        if torch.device(device).type == "cuda" and isinstance(network, VideoUNet):
            network.join_projections()


def attempt(call: Callable[[], _T]) -> _T | None:
    """What a call returns; None where memory did not suffice for it, and what it had begun is freed. Where CUDA graphs
    held some, they are dropped, and it is called again."""
    for _ in range(2):
        try:
            return call()
        except (RuntimeError, MemoryError) as error:
            if not _of_memory(error):
                raise
        held = graphs.forget_all()  # out here, since the error held on to all that its call had made
        torch.cuda.empty_cache()
        if not held:
            break
    return None


def _of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; of its libraries and of other devices only the words tell."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "allocation_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error).lower() for w in words)


def encoded(model: VideoModel, pixels: Tensor) -> Tensor:
    """``model.encode``, in smaller chunks where memory does not suffice, then while the other networks wait on the CPU.

    Raises ValueError where it suffices in no way.
    """
    for chunk in ENCODED[has_own_memory(model.device) :]:
        made = attempt(partial(model.encode, pixels, chunk))
        if made is not None:
            return made
        LOG.warning("%s is out of memory while it encodes %d frames at a time", model.device, chunk)
    made = None
    if can_offload(model):
        with offloaded(model):
            made = attempt(partial(model.encode, pixels, ENCODED[-1]))
    if made is None:
        height, width = pixels.shape[-2:]
        said = f"{model.device} has too little memory to encode even one frame of {width}x{height}"
        raise ValueError(f"{said}; choose a smaller size, or end what else uses it")
    return made


# What is needed


def is_short(model: VideoModel, request: SampleRequest) -> bool:
    """Whether a device's free memory is less than what is ``needed`` for one video of a resolved request; CUDA graphs
    are dropped before it is."""
    return can_offload(model) and _room(model, request, 1) < 1


def at_a_time(model: VideoModel, request: SampleRequest) -> int:
    """How many of a resolved request's videos a device's free memory holds at a time, by estimate; one at least. CUDA
    graphs are dropped before that is fewer than asked for."""
    asked = request.num_videos_per_prompt
    if asked == 1 or not can_offload(model):
        return asked
    return max(1, min(asked, _room(model, request, asked)))


def _room(model: VideoModel, request: SampleRequest, wanted: int) -> int:
    """How many of a resolved request's videos free memory holds, where fewer than wanted: without what was recorded for
    others, so that a request is made the same way whatever came before it."""
    each, free = needed(model, request), free_memory(model.device)
    if free < wanted * each and graphs.forget_all():
        free = free_memory(model.device)
    return free // each


def free_memory(device: torch.device) -> int:
    """Bytes of CUDA's that no one uses, those kept for reuse by this process included, but not those of CUDA graphs."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept - _kept_by_graphs(device)


def _kept_by_graphs(device: torch.device) -> int:
    """Bytes that are kept for reuse by replays alone: those of private pools."""
    if torch.cuda.get_allocator_backend() != "native":  # the other one does not tell
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    private = [part for part in torch.cuda.memory_snapshot() if part["segment_pool_id"] != (0, 0)]
    return sum(part["total_size"] - part["allocated_size"] for part in private if part["device"] == index)


def needed(model: VideoModel, request: SampleRequest) -> int:
    """Bytes beside the weights for one video, by estimate: the UNet's for the frames that it sees at a time, guided
    ones twice, or the decoder's for one frame, whichever is more. Both peak in their widest layers, as channels times
    places."""
    _, height, width = request.shape
    copies = 1 if request.guidance_scale == 1 else 2
    cells = _frames_seen(request) * (height // model.downscale) * (width // model.downscale)
    unet = UNET_SHARE * copies * cells * model.unet.config.block_out_channels[0] * model.unet.dtype.itemsize
    decoder = DECODER_SHARE * height * width * model.vae.config.block_out_channels[0] * model.vae.dtype.itemsize
    return max(unet, decoder)


def _frames_seen(request: SampleRequest) -> int:
    """By the UNet at a time: a video's, or a window's. (Small windows may be seen together, where that is little.)"""
    return min(request.shape[0], request.context_length or request.shape[0])


def smaller(model: VideoModel, request: SampleRequest) -> str:
    """What to ask for in place of a resolved request that did not fit while it was denoised, in words with numbers:
    what would, by estimate, or half of it where free memory is not known."""
    frames, height, width = request.shape
    seen, cell = _frames_seen(request), model.downscale
    known = has_own_memory(model.device)
    share = min(0.8, free_memory(model.device) / needed(model, request)) if known else 0.5
    sides = [max(cell, int(side * math.sqrt(share)) // cell * cell) for side in (width, height)]
    size = f"a size of {sides[0]}x{sides[1]}"
    if seen == 1:
        return size
    fewer = max(1, int(seen * share))
    return f"{f'context_length={fewer}' if seen < frames else f'num_frames={fewer}'}, or {size},"
