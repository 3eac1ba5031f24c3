"""What lies in folders of results, a section a folder: rows of figures, scores, claims, clips, pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from animatelcm.evaluate.report import Kind, Row, facts_hash, read_row
from animatelcm.page import gallery
from animatelcm.page.gallery import Clip, in_order

DEPTH = 3
"""Folders inside folders that are looked into."""
REPORT, SCORES, CLAIMS = "report.json", "scores.json", "claims.json"
PARTS = ("rows", "clips")
"""Folders that belong to the section around them."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One folder's results."""

    folder: Path
    title: str
    rows: list[Row] = field(default_factory=list)
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Facts by their hash, as far as they are known."""
    pairs: list[dict[str, Any]] = field(default_factory=list)
    """As ``evaluate.paired.Pair.to_json`` has them."""
    scores: list[dict[str, Any]] = field(default_factory=list)
    """As ``Score.to_json`` has them; "of" says what was scored, where a file tells several apart."""
    claims: list[dict[str, Any]] = field(default_factory=list)
    """claim, source, paper, ours, holds (None: not told), n, note."""
    clips: list[Clip] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Pictures alone may be anything."""
        return not (self.rows or self.scores or self.claims or self.clips)


def find(root: Path) -> list[Section]:
    """The sections of a folder and of those inside it. Raises ValueError where it is none, where nothing is in it that
    can be shown, and where a file of figures cannot be read."""
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give one that animatelcm eval or batch wrote")
    found = [_section(folder, _title(folder, root)) for folder in _folders(root, set(), DEPTH)]
    sections = [section for section in found if not section.is_empty]
    if not sections:
        wanted = "rows/, manifest.jsonl, scores.json, claims.json, videos"
        raise ValueError(f"{root} holds nothing to show ({wanted}); give a folder that animatelcm eval or batch wrote")
    if found[0].is_empty and found[0].pictures:
        sections.insert(0, found[0])
    return sections


def title(root: Path, found: Sequence[Section]) -> str:
    """Of all that was found in a folder: its own section's, or its name."""
    return found[0].title if found and found[0].folder == root else root.resolve().name or str(root)


def _title(folder: Path, root: Path) -> str:
    return title(root, ()) if folder == root else folder.relative_to(root).as_posix()


def _folders(folder: Path, seen: set[Path], depth: int) -> list[Path]:
    """A folder and those inside, each once, wherever links lead."""
    if folder.resolve() in seen:
        return []
    seen.add(folder.resolve())
    found = [folder]
    for path in in_order(folder.iterdir()) if depth else ():
        if path.is_dir() and path.name not in PARTS and not path.name.startswith(".") and not _is_sequence(path):
            found += _folders(path, seen, depth - 1)
    return found


def _is_sequence(folder: Path) -> bool:
    """Whether a folder is a video itself: numbered pictures."""
    return (folder / "00000.png").is_file()


def _section(folder: Path, title: str) -> Section:
    report = _json(folder / REPORT) if (folder / REPORT).is_file() else {}
    claims = _json(folder / CLAIMS) if (folder / CLAIMS).is_file() else {}
    clips, faults = gallery.read(folder)
    scores, remarks = _scores(folder / SCORES)
    pictures = [path for path in in_order(folder.iterdir()) if path.suffix.lower() == ".png"]
    return Section(
        folder=folder,
        title=str(claims.get("title") or title),
        rows=sorted(_rows(folder, report), key=_place),
        protocols=_protocols(report),
        pairs=_pairs(report, folder / REPORT),
        scores=scores,
        claims=_objects(claims.get("rows", []), folder / CLAIMS, "claim"),
        clips=clips,
        pictures=[path for path in pictures if path.is_file() and not path.name.startswith(".")],
        remarks=faults + remarks,
    )


def _rows(folder: Path, report: dict[str, Any]) -> list[Row]:
    """Those in rows/, or where that is not there, those of the report."""
    if (folder / "rows").is_dir():
        return [read_row(path) for path in in_order((folder / "rows").glob("*.json"))]
    try:
        return [Row(**row) for row in report.get("rows", [])]
    except TypeError as error:
        raise ValueError(f"{folder / REPORT} holds other rows than figures ({error}); have it written again") from error


def _place(row: Row) -> tuple[int, bool, str, int]:
    """By kind; what no network made comes last."""
    kinds = get_args(Kind)
    return kinds.index(row.kind) if row.kind in kinds else len(kinds), not row.evaluations, row.model, row.evaluations


def _protocols(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The facts of a report's protocol by their hash; none where they do not have it."""
    said = report.get("protocol")
    facts = {name: value for name, value in said.items() if name != "hash"} if isinstance(said, dict) else {}
    return {said["hash"]: facts} if facts and facts_hash(facts) == said.get("hash") else {}


def _pairs(report: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The differences of rows that a report has."""
    found = _objects(report.get("paired", []), path, "figures")
    for pair in found:
        objects = [pair["figures"], pair.get("first"), pair.get("second")]
        figures = objects[0].values() if isinstance(objects[0], dict) else ()
        numbers = [each.get(name) for each in figures if isinstance(each, dict) for name in ("value", "deviation")]
        known = all(isinstance(number, int | float) for number in numbers) and len(numbers) == 2 * len(figures)
        if not known or not all(isinstance(each, dict) for each in objects):
            raise ValueError(f"{path} holds pairs of rows without values and deviations; have it written again")
    return found


def _scores(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """A list of scores, or an object that has one, and its remarks."""
    if not path.is_file():
        return [], []
    whole = _json(path, list)
    found, remarks = (whole.get("scores", []), whole.get("remarks", [])) if isinstance(whole, dict) else (whole, [])
    if isinstance(found, dict):
        found = [
            {"of": name, **score} for name, several in found.items() for score in _objects(several, path, "metric")
        ]
    return _objects(found, path, "metric"), [str(remark) for remark in remarks]


def _objects(values: Any, path: Path, needed: str) -> list[dict[str, Any]]:  # noqa: ANN401 - what JSON holds
    if not isinstance(values, list) or not all(isinstance(value, dict) and needed in value for value in values):
        raise ValueError(f"{path} holds no list of objects that each have a {needed!r}; have it written again")
    return values


def _json(path: Path, other: type = dict) -> Any:  # noqa: ANN401 - what JSON holds
    """An object, or ``other``. Raises ValueError naming a file that holds neither."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} ({error}); remove it, or have it written again") from error
    if not isinstance(value, dict | other):
        raise ValueError(f"{path} holds {type(value).__name__} where an object is needed; have it written again")
    return value
