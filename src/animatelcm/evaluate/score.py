"""A figure with all that it needs to be compared: its interval, how many clips it is of, and its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from animatelcm.evaluate.bootstrap import Interval
from animatelcm.evaluate.report import comparable, facts_hash


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure of one set of videos."""

    metric: str
    value: float
    interval: Interval
    n: dict[str, int]
    """Videos of each set: {"real": 2048, "generated": 2048}."""
    rank: dict[str, int] | None = None
    """Of the covariance of each set, where there is one: below the number of features it is not known in all
    directions, and the figure leans on how many clips there were."""
    facts: dict[str, Any]
    """What the hash of the protocol is of; JSON's types."""

    @property
    def protocol(self) -> str:
        """Figures of one metric compare where this is equal."""
        return facts_hash(self.facts)

    def to_json(self) -> dict[str, Any]:
        """As JSON's types, with the protocol's hash."""
        return {**asdict(self), "interval": self.interval._asdict(), "protocol": self.protocol}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Score:
        """What ``to_json`` gave; keys beside it say nothing. Raises KeyError or TypeError where one is missing."""
        fields = {name: said[name] for name in ("metric", "value", "n", "rank", "facts")}
        return cls(**fields, interval=Interval(**said["interval"]))


class Scored(NamedTuple):
    """All that one command measured."""

    scores: dict[str, list[Score]]
    """By what was scored."""
    remarks: list[str]
    """Sentences that a figure is not to be read without."""
    about: dict[str, Any]
    """What else is to be written down, as JSON's types."""

    def to_json(self) -> dict[str, Any]:
        """``scores``, each with what it is ``of``, and ``remarks``."""
        listed = [{"of": name, **score.to_json()} for name, several in self.scores.items() for score in several]
        return {"scores": listed, "remarks": self.remarks, **self.about}


def score_table(scores: Mapping[str, list[Score]], *, mixed: bool = False) -> str:
    """Markdown, a line a score, of scores by what was scored. ``mixed`` admits several protocols of one metric, and
    says of each line which one it is.

    Raises ValueError for those where that was not said: their figures do not compare.
    """
    lines = [(name, score) for name, several in scores.items() for score in several]
    metrics = dict.fromkeys(score.metric for _, score in lines)
    protocols = {metric: comparable([s.protocol for _, s in lines if s.metric == metric], mixed) for metric in metrics}
    head, marks = ["of", "metric", "value", "interval", "n", "rank"], ["---", "---", "---:", "---:", "---:", "---:"]
    rows = [[*head, "protocol"] if mixed else head, [*marks, "---"] if mixed else marks]
    rows += [[*_cells(name, score), *([score.protocol] if mixed else [])] for name, score in lines]
    drawn = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = [f"{metric} by protocol {found[0]}" for metric, found in protocols.items()]
    return drawn if mixed else f"{drawn}\n\n{', '.join(notes)}."


def _cells(name: str, score: Score) -> list[str]:
    low, high, _, level, *_ = score.interval
    counts = " / ".join(str(count) for count in score.n.values())
    ranks = " / ".join(str(rank) for rank in score.rank.values()) if score.rank else "-"
    spread = f"{low:.4g} .. {high:.4g} ({level:.0%})"
    return [name.replace("|", "\\|"), score.metric, f"{score.value:.4g}", spread, counts, ranks]


def check_counts(counts: Mapping[str, int], mixed: bool = False) -> None:
    """Raises ValueError for sets of several sizes, unless ``mixed`` is said: the same as ``score_table``, yet before
    anything is measured. And where there are none."""
    if not counts:
        raise ValueError("there is nothing to measure; give a folder of videos")
    if len(set(counts.values())) > 1 and not mixed:
        named = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"figures of different counts of videos ({named}) do not compare; take as many, or say mixed")
