"""Text embeddings that are computed once and kept beside latents: one file for each of theirs.

A file holds ``text`` (n, L, D) in fp16, of its clips' distinct captions and of the empty one, and as metadata the
captions in that order. It appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from animatelcm.data.batches import Batches, ClipBatch
from animatelcm.data.latents import captions, wait_for
from animatelcm.images import replacing
from animatelcm.weights.files import write_safetensors

AT_A_TIME = 64


def embed_pieces(
    pieces: Sequence[Path],
    embed: Callable[[Sequence[str]], Tensor],
    folder: Path,
    *,
    rank: int = 0,
    processes: int = 1,
) -> list[Path]:
    """Embed what ``folder`` lacks of the captions in files of latents, and return its files, one for each of theirs.

    ``embed`` maps texts (B strings) to (B, L, D). Process r of n makes files r, r + n, ..., and waits for the others'.
    Raises ValueError where no file has appeared for an hour.
    """
    paths = [folder / piece.name for piece in pieces]
    for number in range(rank, len(pieces), processes):
        if paths[number].is_file():
            continue
        said = sorted({"", *captions(pieces[number])})
        parts = [embed(said[start : start + AT_A_TIME]) for start in range(0, len(said), AT_A_TIME)]
        with replacing(paths[number]) as partial:
            text = torch.cat([part.half().cpu() for part in parts])
            write_safetensors({"text": text}, partial, {"captions": json.dumps(said)})
    wait_for(paths)
    return paths


def with_text(batches: Batches, paths: Sequence[Path]) -> Batches:
    """The same batches with the text embeddings in files, which are mapped into memory, not read."""
    held, places = [], {}
    for path in paths:
        with safe_open(str(path), framework="pt") as file:
            for row, caption in enumerate(json.loads(file.metadata()["captions"])):
                places.setdefault(caption, (len(held), row))
            held.append(file.get_tensor("text"))

    def text(said: Sequence[str]) -> Tensor:
        return torch.stack([held[file][row] for file, row in map(places.__getitem__, said)]).float()

    def batch(indices: Sequence[int]) -> ClipBatch:
        found = batches(indices)
        return replace(found, text=text(found.captions), no_text=text([""]))

    return batch
