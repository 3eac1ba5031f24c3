"""A run: rows that are not there yet are made, written and recorded, one whole file after another."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from animatelcm import decoding
from animatelcm.batch import manifest
from animatelcm.batch.engine import About, Engine, Left, Made, is_full
from animatelcm.batch.rows import Row
from animatelcm.images import replacing
from animatelcm.request import unused

LOG = logging.getLogger(__name__)


class Counts(NamedTuple):
    """How many rows were made, failed, or were done before; all of it took ``seconds``."""

    made: int
    failed: int
    done_before: int
    seconds: float


def run(
    rows: Sequence[Row],
    out: Path,
    about: About,
    engine: Engine,
    *,
    suffix: str = ".mp4",
    facts: Mapping[str, str] = MappingProxyType({}),
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> Counts:
    """Make each row that is not there yet into ``out``/NNNNNN.mp4, and record it in its manifest, with ``facts``.

    A row is done where the manifest has its settings' hash, and its file the recorded one. One that was denoised, but
    not decoded or written, leaves its latents, NNNNNN.latents.safetensors, until it is made. Raises ValueError where
    videos are there that no manifest tells of (unless ``force``), where another run works on the folder, and where the
    disk is full: what is there then is whole, and the same call goes on.
    """
    began, made, failed, contents = time.perf_counter(), 0, 0, {}
    manifest.check_folder(out, suffix, force)
    with manifest.opened(out / manifest.MANIFEST) as (records, append):
        plans = {row.number: manifest.plan(row, about, suffix, contents) for row in rows}
        todo = [row for row, plan in plans.values() if not manifest.is_done(records.get(row.number), plan, out)]
        before = len(rows) - len(todo)
        for said, times in Counter(said for row in todo if row.request for said in unused(row.request)).items():
            LOG.warning("%s (%d of %d rows)", said, times, len(rows))

        def done(row: Row, outcome: Made | Left | str) -> None:
            nonlocal made, failed
            latents = out / f"{row.number:06}{decoding.SUFFIX}"
            if isinstance(outcome, Left):
                _save(outcome.latents, latents)
                file = out / plans[row.number][1]["file"]
                outcome = f"{outcome.why}; {decoding.goes_on(latents, outcome.flags, file)}"
            if isinstance(outcome, str):
                LOG.warning("row %d: %s", row.number, outcome)
                record = {"row": row.number, "prompt": row.prompt, "error": outcome}
            else:
                record = {**plans[row.number][1], **facts, **manifest.facts(outcome)}
                _save(outcome.data, out / record["file"])
                latents.unlink(missing_ok=True)
            if records.get(row.number) != record:
                append(record)
            made, failed = made + ("file" in record), failed + ("error" in record)
            progress("rows", before + made + failed, len(rows))

        try:
            for row in todo:
                if row.request is None:
                    done(row, row.error)
            engine([row for row in todo if row.request is not None], suffix, done)
        except Exception as error:
            if not is_full(error):
                raise
            said = f"the disk is full ({error}) after {before + made} of {len(rows)} rows"
            raise ValueError(f"{said}; make room, and the same line goes on") from error
    return Counts(made, failed, before, time.perf_counter() - began)


def _save(data: bytes, path: Path) -> None:
    """Whole and on the disk, or not at all."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
