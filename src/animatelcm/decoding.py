"""From finished latents to frames and files: chunk by chunk, in as much memory as there is, the next while one is used.

Where memory does not suffice, a video is decoded in smaller chunks, then in bands, then while the other networks wait
on the CPU. Where nothing helps, its latents are kept in a file, from which decoding goes on elsewhere.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from animatelcm import __version__, memory, video
from animatelcm.colour import aligned
from animatelcm.model import VideoModel
from animatelcm.model_source import ModelSource
from animatelcm.provenance import Video, recipe
from animatelcm.request import SampleRequest
from animatelcm.weights.files import check_finite, read_metadata, read_state, write_safetensors

LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

CHUNKS = (16, 4, 1)
"""Frames that are decoded at a time: the first number, and the next ones where memory does not suffice. Devices with a
memory of their own begin with the second: 16 frames of 512x512 are 8 GiB."""
BANDS = (4, 16)
"""Bands of a frame after that (``VideoModel.draw``)."""
SUFFIX = ".latents.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Draft:
    """A video whose frames are still latents (1, C, F, h, w), with its resolved request."""

    latents: Tensor
    request: SampleRequest
    model: str
    fps: float
    evaluations: int
    seconds: dict[str, float] = field(default_factory=dict)
    precision: str = ""
    """Numbers that the network computed with: fp16, bf16 or fp32."""
    picture: np.ndarray | None = None
    """Whose colours the frames take, by ``request.colour_match``: uint8 (H, W, 3)."""


def whole(model: VideoModel, draft: Draft) -> Video:
    """The video with all of its frames."""
    began, done = time.perf_counter(), 0
    every = np.empty((*draft.request.shape, 3), np.uint8)
    for chunk in frames(model, draft):
        every[done : done + len(chunk)] = chunk
        done += len(chunk)
    return Video(
        frames=every,
        fps=draft.fps,
        request=draft.request,
        model=draft.model,
        evaluations=draft.evaluations,
        seconds={**draft.seconds, "decode": time.perf_counter() - began},
        precision=draft.precision,
    )


def write(
    model: VideoModel, draft: Draft, path: Path, *, source: ModelSource, overwrite: bool = False
) -> dict[str, float]:
    """Decode a draft into a file while it is encoded, as ``video.write``, one frame also into a picture; returns the
    seconds that each phase took.

    Raises ValueError where memory suffices in no way.
    """
    began = time.perf_counter()
    with closing(ahead(frames(model, draft))) as chunks:
        video.write(
            chunks,
            path,
            fps=draft.fps,
            num_frames=draft.request.shape[0],
            metadata=recipe(draft.request, source, __version__, draft.precision),
            overwrite=overwrite,
        )
    return {**draft.seconds, "decode": time.perf_counter() - began}


def ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, the next one made by another thread while one is used; what that raises is raised here. Closing
    it waits for that thread, and closes a generator where it ran."""
    end = object()
    with ThreadPoolExecutor(1, "decode") as thread:
        try:
            coming = thread.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = thread.submit(next, items, end)
                yield item
        finally:
            if hasattr(items, "close"):
                thread.submit(items.close).result()


def frames(model: VideoModel, draft: Draft) -> Iterator[np.ndarray]:
    """uint8 chunks (n, H, W, 3) of as many frames as ``CHUNKS`` and memory let.

    On CUDA they are made and copied on a stream of their own, one ahead of that which is used. Raises ValueError that
    names a size that fits, where this one does in no way.
    """
    latents = draft.latents[0].transpose(0, 1).to(model.device)
    stream = _stream(model.device) if model.device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(model.device))
    ready: Callable[[], np.ndarray] | None = None
    for draw in _drawn(model, latents, stream):
        if ready is not None:
            yield _coloured(ready(), draft)
        ready = draw
    assert ready is not None
    yield _coloured(ready(), draft)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all videos: memory that was used on a stream is used again on that stream alone."""
    return torch.cuda.Stream(device)


def _coloured(chunk: np.ndarray, draft: Draft) -> np.ndarray:
    return chunk if draft.picture is None else aligned(chunk, draft.picture, draft.request.colour_match)


def _drawn(model: VideoModel, latents: Tensor, stream: torch.cuda.Stream | None) -> Iterator[Callable[[], np.ndarray]]:
    """Chunks of latents (F, C, h, w) as functions that wait for their frames; each rung of the ladder is tried once."""
    chunks = CHUNKS[1:] if memory.has_own_memory(model.device) else CHUNKS
    rungs, done = _rungs(latents, chunks), 0
    chunk, bands = rungs.pop(0)
    with ExitStack() as stack:
        while done < len(latents):
            part = latents[done : done + chunk]
            began = memory.attempt(partial(_begun, model, part, bands, stream))
            if began is not None:
                done += len(part)
                yield began
                continue
            if not rungs and memory.can_offload(model):
                stack.enter_context(memory.offloaded(model))
                rungs = _rungs(latents, CHUNKS[-1:])
                LOG.warning("%s is out of memory: the other networks wait on the CPU", model.device)
            if not rungs:
                raise ValueError(_too_large(model, latents, bands))
            chunk, bands = rungs.pop(0)
            LOG.warning("%s is out of memory: %d frames at a time, in %d bands", model.device, chunk, bands)


def _rungs(latents: Tensor, chunks: tuple[int, ...]) -> list[tuple[int, int]]:
    """(frames at a time, bands of each), the fastest first."""
    count, _, rows, _ = latents.shape
    whole_frames = sorted({min(chunk, count) for chunk in chunks}, reverse=True)
    return [*((chunk, 1) for chunk in whole_frames), *((1, bands) for bands in BANDS if bands <= rows)]


def _begun(
    model: VideoModel, latents: Tensor, bands: int, stream: torch.cuda.Stream | None
) -> Callable[[], np.ndarray]:
    order = torch.channels_last
    with torch.inference_mode():  # not around a yield: the mode must not leak into the caller
        if stream is None:
            made = model.draw(latents.contiguous(memory_format=order), bands).cpu().numpy()
            return lambda: made
        with torch.cuda.stream(stream):
            latents.record_stream(stream)  # another stream's memory, not to be used again while this one reads it
            pixels = model.draw(latents.contiguous(memory_format=order), bands)
            copy = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            copy.copy_(pixels, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)

    def wait() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return wait


def _too_large(model: VideoModel, latents: Tensor, bands: int) -> str:
    """One sentence, with the largest of the halved sizes that does fit: it is tried."""
    (height, width), cell = latents.shape[-2:], model.downscale
    other = ", or choose --device cpu" if memory.has_own_memory(model.device) else ""
    said = f"{model.device} has too little memory to decode even one frame of {width * cell}x{height * cell}"
    while max(height, width) > 1:
        height, width = max(1, height // 2), max(1, width // 2)
        if memory.attempt(partial(_begun, model, latents[:1, :, :height, :width], bands, None)) is not None:
            return f"{said}; any number of frames of {width * cell}x{height * cell} fits{other}"
    return f"{said}; end what else uses it{other}"


# Latents in files


@contextmanager
def rescued(draft: Draft, path: Path, source: ModelSource) -> Iterator[None]:
    """Where decoding or writing fails meanwhile, the latents are kept beside ``path``, and the error says how to go on.
    Errors of a user's come as ValueError."""
    try:
        yield
    except Exception as error:
        kept = path.with_name(path.stem + SUFFIX)
        try:
            save(draft, kept)
            how = goes_on(kept, source.words(), path)
        except (OSError, RuntimeError) as other:  # a device that failed may not give them back
            how = f"its latents could not be kept either ({other})"
        if isinstance(error, ValueError | OSError):
            raise ValueError(f"{error}; {how}") from error
        error.add_note(how)
        raise


def goes_on(kept: Path, flags: Sequence[str], out: Path) -> str:
    """Where latents are, and the line that makes ``out`` of them, with the flags of their model."""
    words = ["animatelcm", "decode", str(kept), *flags, "--out", str(out)]
    return f"its latents are in {kept}; this goes on from there: {shlex.join(words)}"


def save(draft: Draft, path: Path) -> None:
    """Write a draft as safetensors, the request in its header."""
    tensors = {"latents": draft.latents}
    if draft.picture is not None:
        tensors["picture"] = torch.from_numpy(np.array(draft.picture))
    facts = {name: getattr(draft, name) for name in ("model", "fps", "evaluations", "seconds", "precision")}
    said = json.dumps({**facts, "request": asdict(draft.request)})
    write_safetensors(tensors, path, {"draft": said, "animatelcm": __version__})


def load(path: Path, model: VideoModel) -> Draft:
    """Read a draft for a model to decode. Raises ValueError where a file is none, or of a model with other latents."""
    said, state = read_metadata(path).get("draft", ""), read_state(path)
    check_finite(state, path)
    try:
        facts = json.loads(said)
        asked = {name: tuple(value) if isinstance(value, list) else value for name, value in facts["request"].items()}
        latents, picture = state.pop("latents").float(), state.pop("picture", None)
        draft = Draft(
            **{**facts, "request": SampleRequest(**asked)},
            latents=latents,
            picture=None if picture is None else picture.numpy(),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "give NAME.latents.safetensors, as a decoding that failed leaves it"
        raise ValueError(f"{path} holds no latents of a video that can be read ({error!r}); {reason}") from error
    count, height, width = draft.request.shape
    cells = (height // model.downscale, width // model.downscale)
    wanted = (1, model.vae.config.latent_channels, count, *cells)
    if tuple(latents.shape) != wanted:
        raise ValueError(
            f"{path}: latents {tuple(latents.shape)} of {draft.model!r}, and this model decodes {wanted}; name the "
            "model that made them with --model"
        )
    return draft
