"""Rows of the same prompts and seeds, told apart clip by clip.

Beside a row, ``rows/lcm@4.json``, lies ``rows/lcm@4.safetensors``: by figure what each clip brings to it
(``Judge.figures``), and as text of which model and protocol it is, what was asked for, and which file of the
evaluation's folder has the features of the real clips.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from animatelcm.data.emoji import Shot
from animatelcm.evaluate.bootstrap import Difference, average, paired
from animatelcm.evaluate.frechet import Gaussian, distances, gaussian
from animatelcm.evaluate.judge import DRAWS
from animatelcm.evaluate.report import COLUMNS, SHARES, STEERED, Row, facts_hash, read_row, row_path
from animatelcm.weights.files import read_metadata, read_safetensors, write_safetensors

LOG = logging.getLogger(__name__)


class Pair(NamedTuple):
    """How far the figures of one row lie above those of another."""

    first: Row
    second: Row
    figures: dict[str, Difference]
    """Second less first, by the name of the figure."""

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        rows = {"first": self.first, "second": self.second}
        named = {name: {"model": row.model, "setting": row.setting} for name, row in rows.items()}
        about = {"kind": self.first.kind, "n": self.first.n, "protocol": self.first.protocol}
        return {**named, **about, "figures": {name: found._asdict() for name, found in self.figures.items()}}


class _Kept(NamedTuple):
    row: Row
    samples: dict[str, Tensor]
    about: dict[str, str]


def keep_samples(samples: Mapping[str, Tensor], path: Path, row: Row, shots: Sequence[Shot], real: str) -> None:
    """Write what each clip brings to the figures of a row beside it; ``real`` names the file of the real features."""
    asked = facts_hash({"prompts": [shot.caption for shot in shots]})  # the seed of each is its number
    about = {"fingerprint": row.fingerprint, "protocol": row.protocol, "prompts": asked, "real": real}
    write_safetensors(samples, samples_path(path), about)


def samples_path(row: Path) -> Path:
    """Where that lies."""
    return row.with_suffix(".safetensors")


def compare(first: Path, second: Path) -> Pair:
    """The differences of two rows, second less first, paired by prompt: the clips of both are drawn anew together.

    The real clips stay as they are, in the distance. Raises ValueError for rows of other protocols, kinds or prompts,
    and where what was kept of a row is not there, or is that of another.
    """
    ours, theirs = _read(first), _read(second)
    for what in ("protocol", "kind", "prompts"):
        (a, b) = ({"kind": kept.row.kind, **kept.about}[what] for kept in (ours, theirs))
        if a != b:
            raise ValueError(
                f"{second} is of {what} {b}, but {first} of {what} {a}: pairs need the same prompts and seeds; measure "
                "both rows by the same flags of eval emoji, --settings and the model apart"
            )
    real = _real(first, second, ours.about["real"]) if "fvd_like" in ours.samples else None
    figures = {}
    for name, sample in ours.samples.items():
        if name in theirs.samples and len(sample) > 1:  # of fewer there is no spread
            of = [_figure(name, kept.samples[name], real) for kept in (ours, theirs)]
            figures[name] = paired(*of, len(sample), resamples=DRAWS if name == "fvd_like" else 1000)
    return Pair(ours.row, theirs.row, figures)


def to_first(out: Path, rows: Sequence[Row]) -> list[Pair]:
    """Each row of an evaluation's folder less the first of its kind; rows without what their clips bring, as earlier
    versions left them, are passed over, and those that cannot be compared are told of."""
    pairs, firsts = [], {}
    for row in rows:
        path = row_path(out, row.kind, row.setting)
        if not samples_path(path).is_file() or (first := firsts.setdefault(row.kind, path)) == path:
            continue
        try:
            pairs.append(compare(first, path))
        except ValueError as error:
            LOG.warning("%s", error)
    return pairs


def pair_table(pairs: Sequence[Pair]) -> str:
    """Markdown, a line a pair: difference, its standard deviation, its interval. Shares are in points of 100."""
    titles = COLUMNS | STEERED
    names = [name for name in titles if any(name in pair.figures for pair in pairs)]
    head = ["kind", "difference", *(titles[name] + ", points" * (name in SHARES) for name in names)]
    lines = [head, ["---", "---", *("---:" for _ in names)]]
    for first, second, figures in pairs:
        both = " less ".join(f"{row.model} {row.setting}" for row in (second, first)).replace("|", "\\|")
        lines.append([first.kind, both, *(_shown(name, figures.get(name)) for name in names)])
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{drawn}\n\nPaired by prompt: prompts drawn anew for both at once, +- standard deviation (95 % interval)."


def _shown(name: str, found: Difference | None) -> str:
    if found is None:
        return "-"
    value, deviation, low, high = (round(number * (100 if name in SHARES else 1), 9) for number in found[:4])
    return f"{value:+.3g} +- {deviation:.2g} ({low:.3g} .. {high:.3g})"


def _figure(name: str, sample: Tensor, real: Gaussian | None) -> Callable[[Tensor], float]:
    """A figure of some of the clips, by their numbers."""
    return (lambda rows: average(sample[rows])) if name != "fvd_like" or real is None else distances(sample, real)


def _read(path: Path) -> _Kept:
    if not path.is_file():
        raise ValueError(f"there is no row {path}; give files that eval emoji wrote: OUT/rows/SETTING.json")
    row, beside = read_row(path), samples_path(path)
    if not beside.is_file():
        raise ValueError(f"{path} lacks {beside.name}, what its clips bring; measure it again (eval emoji --force)")
    about = read_metadata(beside)
    if any(about.get(name) != getattr(row, name) for name in ("fingerprint", "protocol")):
        raise ValueError(f"{beside} is of another row than {path.name}; remove both to have them measured again")
    return _Kept(row, read_safetensors(beside), about)


def _real(first: Path, second: Path, name: str) -> Gaussian:
    """The real clips of either row's folder."""
    for path in (first, second):
        if (found := path.absolute().parent.parent / name).is_file():
            return gaussian(read_safetensors(found)["features"])
    raise ValueError(f"{name}, real clips, is in neither row's folder; measure there again, or compare the rows there")
