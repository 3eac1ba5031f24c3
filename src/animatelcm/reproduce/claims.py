"""What a paper claims, what came out here, and whether that bears it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from animatelcm.evaluate.report import Row

WORDS = {True: "yes", False: "**no**", None: "not told apart"}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the reproduction."""

    claim: str
    source: str
    """Where it is said: the paper, its table, figure or section."""
    paper: str
    """Its figure there."""
    ours: str
    """The miniature's."""
    holds: bool | None
    """None: what was measured does not tell."""
    n: int
    """Clips, or runs, that each figure is of."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One experiment: its claims, and the tables and plots behind them."""

    title: str
    claims: list[Claim]
    text: str = ""
    """Markdown: tables, and what they say."""
    plots: list[str] = field(default_factory=list)
    """Files beside the page."""


def excess(row: Row) -> float:
    """FVD-like over what real clips would get."""
    assert row.fvd_like is not None
    assert row.fvd_floor is not None
    return row.fvd_like - row.fvd_floor


def verdict(gain: float, deviation: float) -> bool | None:
    """Whether a gain is one: None within two of its standard deviations."""
    return None if abs(gain) <= 2 * deviation else gain > 0


def nearer(row: Row, other: Row, real: float) -> bool | None:
    """Whether ``row`` is nearer to real clips than ``other``; ``real``: by how much sets of real ones spread."""
    return verdict(excess(other) - excess(row), math.hypot(*(_deviation(each, real) for each in (row, other))))


def _deviation(row: Row, real: float) -> float:
    """The standard deviation of a row's distance over clips, by its 95 % interval, where it has one and that is wider
    than sets of real clips are spread."""
    low, high = row.intervals.get("fvd_like", (0.0, 0.0))
    return max(real, (high - low) / (2 * 1.96))


def share_deviation(*shares_and_counts: tuple[float, int]) -> float:
    """The standard deviation of a difference of shares, each of so many independent clips (binomial)."""
    return math.sqrt(sum(share * (1 - share) / n for share, n in shares_and_counts))


def all_of(verdicts: Sequence[bool | None]) -> bool | None:
    """True where all hold, False where one fails."""
    if False in verdicts:
        return False
    return None if None in verdicts else True


def by_steps(rows: Sequence[Row], figure: str = "excess") -> str:
    """ "333 / 209 / 192 / 195": a figure of rows in their order, shares in percent."""
    if figure == "excess":
        return " / ".join(f"{excess(row):.0f}" for row in rows)
    return " / ".join(f"{100 * getattr(row, figure):.0f}" for row in rows)


def claims_table(claims: Sequence[Claim]) -> str:
    """Markdown, a line a claim."""
    head = "| claim | where | paper | the miniature | holds | n |\n|---|---|---|---|---|--:|\n"
    lines = []
    for claim in claims:
        ours = f"{claim.ours}; {claim.note}" if claim.note else claim.ours
        cells = (claim.claim, claim.source, claim.paper, ours, WORDS[claim.holds], str(claim.n))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return head + "".join(lines)


def to_json(title: str, claims: Sequence[Claim]) -> dict[str, Any]:
    """``claims.json``, which ``animatelcm report`` shows."""
    return {"title": title, "rows": [asdict(claim) for claim in claims]}
