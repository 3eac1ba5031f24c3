"""The rows of a file of prompts: a request each, or what is wrong with it."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from animatelcm.request import SampleRequest, parse_size

DRAWN = "seed=-1 draws another one each time, and a batch that goes on must know its own; give 0..2**63 - 1"


class Row(NamedTuple):
    """One row of a file of prompts; without a request where ``error`` says what is wrong with it."""

    number: int
    prompt: str
    request: SampleRequest | None = None
    error: str = ""


def read_rows(path: Path, *, seed: int = 0, settings: Sequence[str] = ()) -> list[Row]:
    """The rows of a .txt (a prompt a line), .csv (with a header) or .jsonl file, numbered from 0; empty lines are none.

    Columns are the fields of ``SampleRequest``, the command line's short names, or size, as 64x64; ``settings``,
    NAME=VALUE each, hold for rows that say nothing. A row without a seed gets ``seed`` and its number. What is wrong
    with one row is its ``error``. Raises ValueError for what is wrong with all: a file that cannot be read, a column or
    setting unknown.
    """
    shared = _settings(settings)
    if -1 in (seed, shared.get("seed")):
        raise ValueError(DRAWN)
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
        if request.seed == -1:
            raise ValueError(DRAWN)
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
    return names | {"size": "size"}


def _values(cells: dict[str, Any]) -> dict[str, Any]:
    """Cells by column -> values by field. Raises ValueError where a value is of another kind than its field."""
    names, hints = _names(), get_type_hints(SampleRequest)
    values: dict[str, Any] = {}
    if "size" in cells:
        if {"width", "height"} & cells.keys():
            raise ValueError("size is width and height; give it, or both of these")
        width, height = parse_size(_value("size", cells["size"], str))
        cells = {name: given for name, given in cells.items() if name != "size"} | {"width": width, "height": height}
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
