"""What a paper claims, what came out here, and whether that bears it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from animatelcm.evaluate.paired import Pair
from animatelcm.evaluate.report import Row

WORDS = {True: "yes", False: "**no**", None: "not told apart"}
_SAID = {
    "fvd_like": (1, 1, "nearer", "farther"),
    "control_error": (1, 3, "less error", "more error"),
    "concept_accuracy": (100, 1, "points of subjects less", "points of subjects more"),
}
"""Figure -> what it is multiplied by, digits behind the point, and what less and more of it are called."""


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


def nearer(pair: Pair) -> bool | None:
    """Whether the second row of a pair is nearer to real clips than the first."""
    found = pair.figures["fvd_like"]
    return verdict(-found.value, found.deviation)


def shows_more(pair: Pair, margin: float = 0.0) -> bool | None:
    """Whether the second row shows its subjects in more frames than the first less a margin, a share."""
    found = pair.figures["concept_accuracy"]
    return verdict(found.value + margin, found.deviation)


def paired_text(pair: Pair, *figures: str) -> str:
    """ "paired by prompt 15.8 +- 2.7 nearer": the second row beside the first, with standard deviations."""
    parts = []
    for name in figures:
        found, (scale, digits, less, more) = pair.figures[name], _SAID[name]
        sizes = (f"{scale * size:.{digits}f}" for size in (abs(found.value), found.deviation))
        parts.append(f"{' +- '.join(sizes)} {less if found.value < 0 else more}")
    return f"paired by prompt {', '.join(parts)}"


def all_of(verdicts: Sequence[bool | None]) -> bool | None:
    """True where all hold, False where one fails."""
    if False in verdicts:
        return False
    return None if None in verdicts else True


def some_of(verdicts: Sequence[bool | None]) -> bool | None:
    """True where one holds and none fails, False where one fails."""
    return False if False in verdicts else True in verdicts or None


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
