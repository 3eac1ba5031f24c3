"""Latents that are computed once and kept: pieces of some hundred clips in a folder, made by all processes together.

Each piece, ``00000.safetensors`` and so on, holds latents (n, C, F, h, w) in fp16 and, as metadata, captions and
sources of its clips. It appears whole or not at all, so that whoever is killed loses what it had in hand, no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from animatelcm.data.batches import Batches, ClipBatch, ClipDataset, pixel_batches, prefetched
from animatelcm.images import replacing
from animatelcm.weights.files import write_safetensors

PIECE = 256  # clips: 134 MB of Stable Diffusion's latents, 16 frames of 512x512 each
PATIENCE = 3600.0  # seconds without a new piece after which other processes are given up
_POLL = 0.5  # seconds


def place(folder: Path, kind: str, facts: str) -> Path:
    """Where latents lie that depend on ``facts`` (data set, autoencoder): a change makes another name."""
    return folder / f"{kind}-{hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()}"


def encode_pieces(
    dataset: ClipDataset,
    encode: Callable[[Tensor], Tensor],
    folder: Path,
    *,
    at_a_time: int = 32,
    workers: int = 0,
    piece: int = PIECE,
    rank: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Encode what ``folder`` lacks of a data set's clips and return all pieces in order, once they are there.

    ``encode`` maps pixels (B, 3, F, H, W) to latents (B, C, F, h, w), ``at_a_time`` clips a call, of which ``workers``
    threads draw the next ones. Process r of n makes pieces r, r + n, ..., and waits for the others'. ``progress`` is
    told how many clips of how many are encoded, by whomever. Raises ValueError where no piece has appeared for
    ``PATIENCE`` seconds.
    """
    length = len(dataset)
    draw = pixel_batches(dataset)
    count = math.ceil(length / piece)
    paths = [folder / f"{number:05}.safetensors" for number in range(count)]

    def tell(done: int) -> None:
        progress(min(done, length), length)

    for number in range(rank, count, processes):
        if not paths[number].is_file():
            done = piece * sum(path.is_file() for path in paths)
            mine = range(number * piece, min((number + 1) * piece, length))
            calls = [mine[start : start + at_a_time] for start in range(0, len(mine), at_a_time)]
            with prefetched(lambda i, calls=calls: draw(calls[i]), 0, len(calls), workers) as batches:
                _write(map(batches, range(len(calls))), encode, paths[number], lambda n, done=done: tell(done + n))
    wait_for(paths, lambda: tell(piece * sum(path.is_file() for path in paths)))
    return paths


def _write(
    batches: Iterable[ClipBatch], encode: Callable[[Tensor], Tensor], path: Path, tell: Callable[[int], None]
) -> None:
    captions: list[str] = []
    sources: list[str] = []
    latents: list[Tensor] = []
    for batch in batches:
        assert batch.pixels is not None
        latents.append(encode(batch.pixels).half().cpu())
        captions += batch.captions
        sources += batch.sources
        tell(len(captions))
    said = {"captions": json.dumps(captions), "sources": json.dumps(sources)}
    with replacing(path) as partial:
        write_safetensors({"latents": torch.cat(latents)}, partial, said)


def wait_for(paths: Sequence[Path], tell: Callable[[], None] = lambda: None) -> None:
    """Until all files are there; ``tell`` is called where more of them are than before. Raises ValueError where none
    has appeared for ``PATIENCE`` seconds."""
    lacking, since = len(paths) + 1, time.monotonic()
    while left := [path for path in paths if not path.is_file()]:
        if len(left) < lacking:
            lacking, since = len(left), time.monotonic()
            tell()
        if time.monotonic() - since > PATIENCE:
            raise ValueError(
                f"{left[0]}, which another process encodes, has not appeared for {PATIENCE / 60:.0f} minutes; see what "
                "that process says, and start again: what is there is kept"
            )
        time.sleep(_POLL)
    tell()


def captions(path: Path) -> list[str]:
    """Of the clips in a file."""
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["captions"])


def sources(paths: Sequence[Path]) -> list[str]:
    """Where the clip of each index came from."""
    found: list[str] = []
    for path in paths:
        with safe_open(str(path), framework="pt") as file:
            found += json.loads(file.metadata()["sources"])
    return found


def kept_batches(paths: Sequence[Path]) -> Batches:
    """Batches of the latents in files, which are mapped into memory, not read: what a batch needs is fetched then."""
    captions: list[str] = []
    sources: list[str] = []
    latents: list[Tensor] = []
    for path in paths:
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata()
            captions += json.loads(said["captions"])
            sources += json.loads(said["sources"])
            latents.append(file.get_tensor("latents"))
    piece = len(latents[0])

    def batch(indices: Sequence[int]) -> ClipBatch:
        chosen = torch.stack([latents[i // piece][i % piece] for i in indices]).float()
        said = {"captions": tuple(captions[i] for i in indices), "sources": tuple(sources[i] for i in indices)}
        return ClipBatch(latents=chosen, **said)

    return batch
