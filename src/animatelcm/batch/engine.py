"""What makes rows: a model in this process, and what any engine is and says (``cluster`` has Ray's)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple

import numpy as np
import torch

from animatelcm import __version__, decoding, memory, video
from animatelcm.adapters import IMAGE, settings_of
from animatelcm.batch.rows import Row
from animatelcm.decoding import Draft
from animatelcm.model import Facts, VideoModel
from animatelcm.model_source import ModelSource, Offload
from animatelcm.provenance import recipe
from animatelcm.request import SampleRequest
from animatelcm.sampling import drafts

AHEAD = 2
"""Decoded chunks that may wait for their encoder."""


class About(NamedTuple):
    """What an engine's model is: facts that fill requests up, pixels a latent cell, a hash of all that it computes."""

    facts: Facts
    cell: int
    fingerprint: str


class Made(NamedTuple):
    """One row's file, the seconds that each phase took, network evaluations, and the host and process that made it."""

    data: bytes
    seconds: dict[str, float]
    evaluations: int
    host: str


class Left(NamedTuple):
    """What is left of a row that was denoised, then failed: why, its latents as ``decoding.save`` writes them, and the
    flags of the model that decodes them."""

    why: str
    latents: bytes
    flags: list[str]


Done = Callable[[Row, Made | Left | str], None]
"""What an engine calls with each row that it has finished: its file, or why there is none (a sentence)."""
Engine = Callable[[Sequence[Row], str, Done], None]
"""(rows with resolved requests, file suffix, done): make them. What ``done`` raises ends it, as does a full disk."""


def about(model: VideoModel) -> About:
    """What requests, manifests and other engines need to know of a model."""
    digest = hashlib.blake2b(repr((model.schedule, model.downscale)).encode(), digest_size=8)
    networks = model.networks | ({} if model.decoder is None else {"decoder": model.decoder})
    for part, network in sorted(networks.items()):
        for name, value in sorted(network.state_dict().items()):
            digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for word, vectors in sorted(model.embeddings.items()):
        digest.update(f"{word} {tuple(vectors.shape)}".encode() + vectors.numpy().tobytes())
    if IMAGE in model.adapters:  # the only one with a setting that what it draws depends on
        digest.update(json.dumps(settings_of(model.adapters[IMAGE]), sort_keys=True).encode())
    return About(model.facts, model.downscale, digest.hexdigest())


def here(model: VideoModel, source: ModelSource, offload: Offload = "auto") -> Engine:
    """An engine of this process: one clip after another; where networks work on a device of their own, another thread
    encodes a clip while the next one is denoised. ``offload``: as ``sampling.drafts``.

    (On two cores that gains nothing: 2.30 clips a second of the miniature, 2.38 in turn.)
    """
    overlaps = memory.has_own_memory(model.device)

    def work(rows: Sequence[Row], suffix: str, done: Done) -> None:
        with ThreadPoolExecutor(1, "encode") as thread:
            last: Future[None] | None = None
            for row in rows:
                assert row.request is not None
                outcome = _tried(lambda row=row: _denoised(model, row.request, offload))
                if last is not None:
                    last.result()
                    last = None
                if isinstance(outcome, str):
                    done(row, outcome)
                    continue
                chunks: Queue[np.ndarray | BaseException | None] = Queue(AHEAD)
                last = thread.submit(_finish, row, outcome, chunks, source, suffix, done)
                _feed(chunks, decoding.frames(model, outcome), last)
                if not overlaps:
                    last.result()
            if last is not None:
                last.result()

    return work


def _denoised(model: VideoModel, request: SampleRequest, offload: Offload) -> Draft:
    with closing(drafts(model, request, offload=offload)) as made:
        return next(made)


def _finish(row: Row, draft: Draft, chunks: Queue, source: ModelSource, suffix: str, done: Done) -> None:
    outcome = _tried(lambda: _encoded(draft, _taken(chunks), source, suffix))
    if isinstance(outcome, str):
        with suppress(OSError, RuntimeError):  # a device that failed may not give them back, a full disk not take them
            outcome = Left(outcome, _latents(draft), source.words())
    done(row, outcome)


def _latents(draft: Draft) -> bytes:
    with tempfile.TemporaryDirectory(prefix="animatelcm-") as folder:
        path = Path(folder) / f"clip{decoding.SUFFIX}"
        decoding.save(draft, path)
        return path.read_bytes()


def _encoded(draft: Draft, chunks: Iterator[np.ndarray], source: ModelSource, suffix: str) -> Made:
    began = time.perf_counter()
    metadata = recipe(draft.request, source, __version__, draft.precision)
    with tempfile.TemporaryDirectory(prefix="animatelcm-") as folder:
        path = Path(folder) / f"clip{suffix}"
        video.write(chunks, path, fps=draft.fps, num_frames=draft.request.shape[0], metadata=metadata)
        data = path.read_bytes()
    seconds = {**draft.seconds, "decode": time.perf_counter() - began}
    return Made(data, seconds, draft.evaluations, f"{socket.gethostname()}:{os.getpid()}")


def _feed(chunks: Queue, frames: Iterator[np.ndarray], reader: Future) -> None:
    """Hand chunks over to their reader as long as it reads, and at the end what ended them."""

    def put(item: np.ndarray | BaseException | None) -> None:
        while not reader.done():
            with suppress(Full):
                return chunks.put(item, timeout=0.1)

    try:
        for chunk in frames:
            put(chunk)
            if reader.done():
                return
        put(None)
    except BaseException as error:
        put(error)
        if not isinstance(error, Exception):
            raise


def _taken(chunks: Queue) -> Iterator[np.ndarray]:
    while (item := chunks.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def _tried(call: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the call returns
    """What a call returns, or why it failed as a sentence. A full disk is no row's fault, and raises."""
    try:
        return call()
    except Exception as error:
        if is_full(error):
            raise
        said = str(error).strip().partition("\n")[0]
        return said if isinstance(error, ValueError | OSError) and said else f"{type(error).__name__}: {said}"


def is_full(error: BaseException) -> bool:
    """Whether a disk, or somebody's share of it, is."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
