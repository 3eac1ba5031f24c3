"""Many videos from a file of prompts: its rows, the manifest of what is made, and one row made into one file.

An engine makes rows in any order and on any machine; what a row becomes depends on its settings and its seed alone.
Only ``run`` writes: a file whole and synchronised, then its line in ``manifest.jsonl``, so that a run which is killed
loses what was in flight and nothing else.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import logging
import os
import re
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from queue import Full, Queue
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch

from animatelcm import __version__, decoding, memory, video
from animatelcm.decoding import Draft
from animatelcm.images import replacing
from animatelcm.model import Facts, VideoModel
from animatelcm.request import ModelSource, SampleRequest, recipe
from animatelcm.sampling import drafts

LOG = logging.getLogger(__name__)
MANIFEST = "manifest.jsonl"
AHEAD = 2
"""Decoded chunks that may wait for their encoder."""


class Row(NamedTuple):
    """One row of a file of prompts; without a request where ``error`` says what is wrong with it."""

    number: int
    prompt: str
    request: SampleRequest | None = None
    error: str = ""


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


class Counts(NamedTuple):
    """How many rows were made, failed, or were done before; all of it took ``seconds``."""

    made: int
    failed: int
    done_before: int
    seconds: float


Done = Callable[[Row, Made | str], None]
"""What an engine calls with each row that it has finished: its file, or a sentence that says why there is none."""
Engine = Callable[[Sequence[Row], str, Done], None]
"""(rows with resolved requests, file suffix, done): make them. What ``done`` raises ends it, as does a full disk."""


# Rows


def read_rows(path: Path, *, seed: int = 0, settings: Sequence[str] = ()) -> list[Row]:
    """The rows of a .txt (a prompt a line), .csv (with a header) or .jsonl file, numbered from 0; empty lines are none.

    Columns are the fields of ``SampleRequest`` or the command line's short names; ``settings``, NAME=VALUE each, hold
    for rows that say nothing. A row without a seed gets ``seed`` and its number. What is wrong with one row is its
    ``error``. Raises ValueError for what is wrong with all: a file that cannot be read, a column or setting unknown.
    """
    shared = _settings(settings)
    SampleRequest(
        prompt="", seed=seed, **{key: value for key, value in shared.items() if key not in ("prompt", "seed")}
    )
    reader = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is no file of prompts; give .txt (one a line), .csv or .jsonl")
    try:
        found = reader(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path} ({error}); save it again as UTF-8 {path.suffix[1:]}") from error
    if not found:
        raise ValueError(f"{path} holds no prompts; write at least one row")
    if strange := [key for cells in found if isinstance(cells, dict) for key in cells if key not in _names()]:
        raise ValueError(f"{path}: column {strange[0]!r} is no setting; choose of {', '.join(sorted(_names()))}")
    return [_row(number, cells, {"seed": seed + number} | shared) for number, cells in enumerate(found)]


def _read_txt(text: str) -> list[dict[str, Any] | str]:
    return [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]


def _read_csv(text: str) -> list[dict[str, Any] | str]:
    """Empty cells say nothing."""
    rows: list[dict[str, Any] | str] = []
    for cells in csv.DictReader(text.splitlines(keepends=True), restkey="", restval=""):
        if cells.pop("", None):
            rows.append("the row has more cells than the header; quote a prompt that has commas")
        else:
            rows.append({name.strip(): value for name, value in cells.items() if value.strip()})
    return rows


def _read_jsonl(text: str) -> list[dict[str, Any] | str]:
    """null says nothing."""
    rows: list[dict[str, Any] | str] = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            cells = error
        if isinstance(cells, dict):
            rows.append({name: value for name, value in cells.items() if value is not None})
        else:
            said = f" ({cells})" if isinstance(cells, Exception) else ""
            rows.append(f'{line.strip()[:40]!r} is no JSON object{said}; write one a line, as {{"prompt": "a fox"}}')
    return rows


def _row(number: int, cells: dict[str, Any] | str, otherwise: dict[str, Any]) -> Row:
    if isinstance(cells, str):
        return Row(number, "", error=cells)
    prompt = str(cells.get("prompt", otherwise.get("prompt", "")))
    try:
        given = otherwise | _values(cells)
        if not given.get("prompt"):
            raise ValueError("the row has no prompt; write one")
        request = SampleRequest(**given)
        if request.num_videos_per_prompt != 1:
            raise ValueError(
                f"num_videos_per_prompt={request.num_videos_per_prompt}, but a row is one video; repeat it"
            )
    except ValueError as error:
        return Row(number, prompt, error=str(error))
    return Row(number, prompt, request)


def _settings(words: Sequence[str]) -> dict[str, Any]:
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not equals or name not in _names():
            said = f"setting {name + equals!r} is not NAME=VALUE of a known name"
            raise ValueError(f"{said}; choose of {', '.join(sorted(_names()))}")
    return _values({name: value for name, _, value in pairs})


def _names() -> dict[str, str]:
    """Column -> field: the fields of a request, and their short names on the command line."""
    names = {}
    for field, hint in get_type_hints(SampleRequest, include_extras=True).items():
        aliases = [name for mark in get_args(hint)[1:] for name in getattr(mark, "aliases", None) or ()]
        names |= {name.lstrip("-").replace("-", "_"): field for name in (field, *aliases)}
    return names


def _values(cells: dict[str, Any]) -> dict[str, Any]:
    """Cells by column -> values by field. Raises ValueError where a value is of another kind than its field."""
    names, hints = _names(), get_type_hints(SampleRequest)
    values: dict[str, Any] = {}
    for name, given in cells.items():
        if names[name] in values:
            raise ValueError(f"{name} and {names[name]} are one setting; give it once")
        values[names[name]] = _value(name, given, _kind(hints[names[name]]))
    return values


def _kind(hint: Any) -> type:  # noqa: ANN401 - whatever stands for a type
    """int, float, str or tuple."""
    if type(None) in get_args(hint):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return str if get_origin(hint) is Literal else get_origin(hint) or hint


def _value(name: str, given: Any, kind: type) -> Any:  # noqa: ANN401 - what JSON or a cell holds
    words = {int: "a whole number", float: "a number", str: "text", tuple: "a list of texts"}
    if isinstance(given, kind) and not isinstance(given, bool):
        return given
    with suppress(ValueError):
        if isinstance(given, str) and kind is not str:
            return tuple(shlex.split(given)) if kind is tuple else kind(given)
        if isinstance(given, int) and not isinstance(given, bool) and kind is float:
            return float(given)
        if isinstance(given, list) and kind is tuple and all(isinstance(item, str) for item in given):
            return tuple(given)
    raise ValueError(f"{name}={given!r} is not {words[kind]}; correct it, or leave it out")


# A model that makes rows in this process


def about(model: VideoModel) -> About:
    """What requests, manifests and other engines need to know of a model."""
    digest = hashlib.blake2b(repr((model.schedule, model.downscale)).encode(), digest_size=8)
    networks = model.networks | ({} if model.decoder is None else {"decoder": model.decoder})
    for part, network in sorted(networks.items()):
        for name, value in sorted(network.state_dict().items()):
            digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return About(model.facts, model.downscale, digest.hexdigest())


def here(model: VideoModel, source: ModelSource) -> Engine:
    """An engine of this process: one clip after another; where networks work on a device of their own, another thread
    encodes a clip while the next one is denoised.

    (On two cores that gains nothing: 2.30 clips a second of the miniature, 2.38 in turn.)
    """
    overlaps = memory.has_own_memory(model.device)

    def work(rows: Sequence[Row], suffix: str, done: Done) -> None:
        with ThreadPoolExecutor(1, "encode") as thread:
            last: Future[None] | None = None
            for row in rows:
                assert row.request is not None
                outcome = _tried(lambda row=row: _denoised(model, row.request))
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


def _denoised(model: VideoModel, request: SampleRequest) -> Draft:
    with closing(drafts(model, request)) as made:
        return next(made)


def _finish(row: Row, draft: Draft, chunks: Queue, source: ModelSource, suffix: str, done: Done) -> None:
    done(row, _tried(lambda: _encoded(draft, _taken(chunks), source, suffix)))


def _encoded(draft: Draft, chunks: Iterator[np.ndarray], source: ModelSource, suffix: str) -> Made:
    began = time.perf_counter()
    metadata = recipe(draft.request, source, __version__)
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


# A run


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

    A row is done where the manifest has its settings' hash, and its file the recorded one. Raises ValueError where
    videos are there that no manifest tells of (unless ``force``), where another run works on the folder, and where the
    disk is full: what is there then is whole, and the same call goes on.
    """
    began, made, failed, contents = time.perf_counter(), 0, 0, {}
    _check_folder(out, suffix, force)
    with _manifest(out / MANIFEST) as (records, append):
        plans = {row.number: _plan(row, about, suffix, contents) for row in rows}
        todo = [row for row, plan in plans.values() if not _is_done(records.get(row.number), plan, out)]
        before = len(rows) - len(todo)

        def done(row: Row, outcome: Made | str) -> None:
            nonlocal made, failed
            if isinstance(outcome, str):
                LOG.warning("row %d: %s", row.number, outcome)
                record = {"row": row.number, "prompt": row.prompt, "error": outcome}
            else:
                record = {**plans[row.number][1], **facts, **_facts(outcome)}
                _save(outcome.data, out / record["file"])
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


def _plan(row: Row, about: About, suffix: str, contents: dict[str, str]) -> tuple[Row, dict[str, Any]]:
    """A row as the model will make it, and the beginning of its record; ``contents`` remembers hashes of files."""
    if row.request is None:
        return row, {}
    try:
        request = row.request.resolved(about.facts, about.cell)
    except ValueError as error:
        return row._replace(request=None, error=str(error)), {}
    paths = {request.image, request.video, *(control.file for control in request.controls())} - {""}
    for path in paths - contents.keys():
        contents[path] = _hash_of(Path(path))
    settings, files = asdict(request), {path: contents[path] for path in paths}
    said = json.dumps([settings, files, about.fingerprint], sort_keys=True)
    return row._replace(request=request), {
        "row": row.number,
        "file": f"{row.number:06}{suffix}",
        "prompt": row.prompt,
        "seed": request.seed,
        "settings": json.loads(json.dumps(settings)),
        "model": about.facts.name,
        "fingerprint": about.fingerprint,
        "hash": hashlib.blake2b(said.encode(), digest_size=8).hexdigest(),
    }


def _facts(made: Made) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(made.data).hexdigest(),
        "seconds": {phase: round(value, 3) for phase, value in made.seconds.items()},
        "evaluations": made.evaluations,
        "host": made.host,
        "animatelcm": __version__,
    }


def _is_done(record: dict[str, Any] | None, plan: dict[str, Any], out: Path) -> bool:
    """Whether a record is of the same settings, and its file what was recorded."""
    if not plan or record is None or any(record.get(key) != plan[key] for key in ("hash", "file")):
        return False
    return "sha256" in record and _hash_of(out / record["file"]) == record["sha256"]


def _hash_of(path: Path) -> str:
    """Of a file, or of the files in a folder with their names; empty where nothing is there."""
    if path.is_dir():
        names = sorted(file for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(f"{file} {_hash_of(file)}\n" for file in names).encode()).hexdigest()
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(data: bytes, path: Path) -> None:
    """Whole and on the disk, or not at all."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _check_folder(out: Path, suffix: str, force: bool) -> None:
    """Make the folder. Raises ValueError where it has videos that no manifest tells of: they are somebody else's."""
    out.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in out.iterdir()]
    foreign = [name for name in names if re.fullmatch(r"\d{6,}" + re.escape(suffix), name)]
    if foreign and MANIFEST not in names and not force:
        raise ValueError(f"{out} holds {foreign[0]} and no {MANIFEST}; choose another folder, or --force to replace it")


@contextmanager
def _manifest(path: Path) -> Iterator[tuple[dict[int, dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """The newest record of each row, and what adds one: it is on the disk when that returns. A torn last line, as a
    kill in the middle of one leaves it, is cut off, and files that it left unfinished are removed. Raises ValueError
    where another process has it open."""
    with path.open("a+b", buffering=0) as file:
        _lock(file, path)
        for unfinished in path.parent.glob(".[0-9]*.new"):
            if re.fullmatch(r"\.\d{6,}\.\w+\.[0-9a-f]{8}\.new", unfinished.name):
                unfinished.unlink()
        file.seek(0)
        data = file.readall()
        whole = data[: data.rfind(b"\n") + 1]
        file.truncate(len(whole))
        records: dict[int, dict[str, Any]] = {}
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                records[int(record["row"])] = record

        def append(record: dict[str, Any]) -> None:
            line, end = json.dumps(record).encode() + b"\n", file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):  # so ends a disk's last page
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
            records[record["row"]] = record

        yield records, append


def _lock(file: FileIO, path: Path) -> None:
    """Until it is closed; two runs would overwrite each other's. (Where there is no fcntl, nobody checks.)"""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run works on {path.parent}; wait for it, or choose another folder") from error
