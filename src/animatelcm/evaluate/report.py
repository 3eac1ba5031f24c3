"""What an evaluation found: rows of figures, the protocol they were made by, tables and files. Knows no model."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["clips", "images", "plain", "motions", "held_out"]
"""What is asked for. clips: captions as in training, held against other real clips; images: one frame of each subject;
plain: a clip of each subject; motions: subjects under each motion; held_out: pairs of them that no training clip shows.
"""


Steer = Literal["", "i2v", "edge", "canny", "tile", "pose", "depth"]
"""What steers: nothing, the real clip's first frame, or maps of a kind: the name of the adapter that it takes."""

Split = Literal["test", "validation"]
"""Whose prompts: those that figures are reported of, or others, to choose by."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one setting of one model; None where a figure has no meaning."""

    model: str
    fingerprint: str
    """Of every weight, the noise schedule and the size: the same model."""
    protocol: str
    """Hash of all that figures depend on beside model and setting."""
    kind: Kind
    setting: str
    """SAMPLER@STEPS[:GUIDANCE]; or "real", the clips that the prompts were taken from; or those "autoencoded"."""
    n: int
    evaluations: int
    """Of the network, for one clip."""
    seconds: float | None
    """To denoise and decode one clip: the median."""
    concept_accuracy: float
    """Share of the judged frames that show the subject of the prompt."""
    named: int
    """Clips whose prompt names a motion."""
    motion_accuracy: float | None
    """Share of those that show it."""
    motion_amount: float | None
    """Mean change from frame to frame, over that of the real clips of the same prompts."""
    fvd_like: float | None = None
    """Frechet distance to the real reference."""
    fvd_floor: float | None = None
    """The same of other real clips, as many: what a perfect model would get."""
    identity: float | None = None
    """Cosine of the features of a frame and of the picture that was set in motion."""
    first_frame_psnr: float | None = None
    """Of the first frame, against that picture through the autoencoder, in dB."""
    colour_error: float | None = None
    """Delta E (1976) of mean colours, frame and picture."""
    control_error: float | None = None
    """1 - F1 of edges, or the distance of keypoints in pixels."""
    control_flicker: float | None = None
    """The variance of that from frame to frame."""
    warped_difference: float | None = None
    """What a frame changes beside its motion, over what it does in the real clips."""
    hardware: str
    missed_concepts: dict[str, int] = field(default_factory=dict)
    """The commonest mistakes, "asked -> seen", in frames."""
    missed_motions: dict[str, int] = field(default_factory=dict)
    """The same in clips."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Figure -> the ends of its 95 % interval over clips (``bootstrap``); the real ones stay as they are."""


COLUMNS = {
    "model": "model",
    "kind": "kind",
    "setting": "setting",
    "evaluations": "evaluations",
    "fvd_like": "FVD-like",
    "fvd_floor": "floor",
    "concept_accuracy": "concept",
    "motion_accuracy": "motion",
    "motion_amount": "motion amount",
    "seconds": "s/clip",
    "n": "n",
}
CEILINGS = ("real", "autoencoded")
"""Settings of rows that no network made."""
STEERED = {
    "identity": "identity",
    "first_frame_psnr": "first frame, dB",
    "colour_error": "colour error",
    "control_error": "control error",
    "control_flicker": "control flicker",
    "warped_difference": "warped difference",
}
"""Columns of rows that have them."""
SHARES = ("concept_accuracy", "motion_accuracy")
"""Of frames and of clips: what differences have points of, a hundred to one."""


def table(rows: Sequence[Row], *, mixed: bool = False) -> str:
    """Markdown, a line a row. ``mixed`` admits rows of several protocols, and says of each row which one it is.

    Raises ValueError for several protocols where that was not said: their figures do not compare.
    """
    protocols = comparable([row.protocol for row in rows], mixed)
    steered = {name: title for name, title in STEERED.items() if any(getattr(row, name) is not None for row in rows)}
    columns = {**COLUMNS, **steered, **({"protocol": "protocol"} if mixed else {})}
    lines = [[_with_interval(row, name).replace("|", "\\|") for name in columns] for row in rows]
    marks = ["---" if name in ("model", "kind", "setting", "protocol") else "---:" for name in columns]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in [list(columns.values()), marks, *lines])
    return drawn if mixed else f"{drawn}\n\nProtocol {', '.join(protocols)}."


def comparable(protocols: Sequence[str], mixed: bool = False) -> list[str]:
    """The different ones among hashes of protocols, in the order they first appear.

    Raises ValueError for several unless ``mixed`` is said: figures of one do not compare with those of another.
    """
    found = list(dict.fromkeys(protocols))
    if len(found) > 1 and not mixed:
        raise ValueError(
            f"rows of {len(found)} protocols ({', '.join(found)}) do not compare; measure them alike, or say mixed=True"
        )
    return found


def shown(name: str, value: str | float | None) -> str:
    """A figure of a row as tables have it."""
    if value is None:
        return "-"
    if name in ("concept_accuracy", "motion_accuracy"):
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _with_interval(row: Row, name: str) -> str:
    ends = " .. ".join(shown(name, end) for end in row.intervals.get(name, ()))
    return shown(name, getattr(row, name)) + (f" ({ends})" if ends else "")


def command(row: Row, protocol: Mapping[str, Any], out: str) -> str:
    """The command line that measures a row of this protocol's facts again, into a folder. Of a personal style's sheet
    only the name is known, not its path."""
    counts, styles = protocol["counts"], protocol["styles"]
    words = ["animatelcm", "eval", "emoji", "--model", *_words(row.model), "--kinds", row.kind]
    words += ["--ceilings"] if row.setting in CEILINGS else ["--settings", row.setting]
    words += ["--clips", str(counts["clips"]), "--real", str(counts["real"])]
    words += ["--steer", protocol["steer"]] if protocol.get("steer") else []
    if len(styles) == 1:
        words += ["--style-truth", styles[0] + (".webp" if protocol["sheet"] else "")]
    return shlex.join([*words, "--out", out])


def _words(label: str) -> list[str]:
    """A model's name in rows is what the command line has after --model."""
    try:
        return shlex.split(label)
    except ValueError:
        return [label]


def facts_hash(facts: Mapping[str, Any]) -> str:
    """A short name for facts of JSON's types, whatever their order: blake2b."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def row_path(out: Path, kind: Kind, setting: str) -> Path:
    """Where a row lies in ``out``: ``rows/lcm@4.json``, or ``rows/images-lcm@4.json`` for other kinds than clips."""
    return out / "rows" / f"{'' if kind == 'clips' else kind + '-'}{file_stem(setting)}.json"


def file_stem(setting: str) -> str:
    """A setting as part of a file's name: a colon has a meaning of its own on some systems."""
    return setting.replace(":", "-").replace("/", "-")


def read_row(path: Path) -> Row:
    """What ``write_json`` wrote of a row. Raises ValueError naming a file that holds none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        ends = {name: (low, high) for name, (low, high) in said.pop("intervals", {}).items()}
        return Row(**said, intervals=ends)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no row of figures ({error}); remove it to have it measured again") from error


def write_row(row: Row, path: Path) -> None:
    """One row, whole or not at all."""
    write_json(asdict(row), path)


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """JSON under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def summary(rows: Sequence[Row], protocol: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """An evaluation as one object: the facts that its hash is of, the versions that ran, the rows."""
    facts = {**protocol, "hash": facts_hash(protocol)}
    return {"protocol": facts, "versions": dict(versions), "rows": [asdict(row) for row in rows]}
