"""Clips as an evaluation makes them, and those of them that it keeps, to be looked at.

Kept are ``clips/SETTING/KIND-NUMBER.mp4`` (images: .png), and ``clips/clips.jsonl``: an object a line, with file (from
``clips``), prompt, seed, setting, kind, seconds (None where no network was sampled) and command (empty where none
makes it again).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from animatelcm import __version__, video
from animatelcm.condition import Condition
from animatelcm.data.emoji import Shot, drawn
from animatelcm.evaluate import steered
from animatelcm.evaluate.judge import Protocol
from animatelcm.evaluate.report import Kind, file_stem
from animatelcm.images import replacing
from animatelcm.model_source import ModelSource
from animatelcm.provenance import recipe
from animatelcm.request import SampleRequest

FOLDER = "clips"
LIST = "clips.jsonl"
LOSSLESS = 100


class Take(NamedTuple):
    """One clip as it was made: frames uint8 (F, H, W, 3); ``seconds`` None where no network was sampled."""

    frames: np.ndarray
    seconds: float | None = None
    evaluations: int = 0
    first: np.ndarray | None = None
    """The picture that was set in motion, through the autoencoder: uint8 (H, W, 3)."""
    request: SampleRequest | None = None
    """Resolved; without the files that steered it, as these were pixels."""
    precision: str = ""


def keep_clips(
    out: Path,
    kind: Kind,
    setting: str,
    shots: Sequence[Shot],
    takes: Sequence[Take],
    *,
    protocol: Protocol,
    source: ModelSource | None,
    fps: float,
) -> None:
    """Write the clips of one setting and kind in place of those kept before: each file whole, then the list; also the
    real clips, where they steered. With a ``source`` files carry the recipe that makes them again.

    What steered is written beside the real clips, without loss: pictures as ``clips/real/KIND-NUMBER-i2v.png``, maps
    as ``clips/real/KIND-NUMBER-STEER.webp``.
    """
    if takes and protocol.steer and setting != "real":
        real = [Take(drawn(shot, protocol.pack)) for shot in shots]
        keep_clips(out, kind, "real", shots, real, protocol=protocol, source=source, fps=fps)
    folder, stem, records = out / FOLDER, file_stem(setting), []
    for number, (shot, take) in enumerate(zip(shots, takes, strict=True)):
        name = f"{kind}-{number:03}"
        said = {"prompt": shot.caption, "seed": str(number), "setting": setting, "kind": kind}
        if take.request is not None and source is not None:
            given = steered.condition(shot, protocol.pack, protocol.steer)
            beside = folder / "real" / f"{name}-{protocol.steer}"
            said |= recipe(_steered(take.request, given, beside, fps), source, __version__, take.precision)
        path = folder / stem / (name + (".png" if kind == "images" else ".mp4"))
        if kind == "images":
            video.write_image(take.frames[0], path, metadata=said, overwrite=True)
        else:
            video.write(take.frames, path, fps=fps, metadata=said, overwrite=True)
        record = {"file": f"{stem}/{path.name}", "prompt": shot.caption, "seed": number, "setting": setting}
        records.append({**record, "kind": kind, "seconds": take.seconds, "command": said.get("command", "")})
    known = kept_clips(out)
    if known or records:
        _write_list(folder, [r for r in known if (r["setting"], r["kind"]) != (setting, kind)] + records)
    new = {Path(record["file"]).name for record in records}
    for path in (folder / stem).glob(f"{kind}-*"):
        if re.fullmatch(rf"{kind}-\d+\.(mp4|png)", path.name) and path.name not in new:
            path.unlink()  # of a run that kept more


def _steered(request: SampleRequest, given: Condition, beside: Path, fps: float) -> SampleRequest:
    """The request with files in place of what it was given as pixels."""
    if given.image is not None:
        path = video.write_image(given.image, beside.with_name(beside.name + ".png"), overwrite=True)
        return replace(request, image=str(path))
    texts = []
    for control in given.controls:
        path = beside.with_name(beside.name + ".webp")
        video.write(control.maps, path, fps=fps, quality=LOSSLESS, overwrite=True)
        texts.append(f"{control.name}=map:{path}")
    return replace(request, control=tuple(texts))


def kept_clips(out: Path) -> list[dict[str, Any]]:
    """The records of the clips that an evaluation in ``out`` kept; lines that are none are left out."""
    records, path = [], out / FOLDER / LIST
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            _ = record["setting"], record["kind"]
            records.append(record)
    return records


def _write_list(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    with replacing(folder / LIST) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
