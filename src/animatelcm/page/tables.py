"""Tables of a page: figures by their protocol, scores, claims; and the lines that make things again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from animatelcm.evaluate.report import COLUMNS, SHARES, STEERED, Row, command, shown
from animatelcm.page.markup import Markup, tag

NAMES = ("model", "kind", "setting")
BETTER = {
    **dict.fromkeys(("fvd_like", "seconds", "colour_error", "control_error", "control_flicker"), "lower is better"),
    **dict.fromkeys(("concept_accuracy", "motion_accuracy", "identity", "first_frame_psnr"), "higher is better"),
    "fvd_floor": "what other real clips get: a perfect model's FVD-like",
    **dict.fromkeys(("motion_amount", "warped_difference"), "1 is as in the real clips"),
    "n": "clips that were judged",
}
ARROWS = {"lower is better": " \N{DOWNWARDS ARROW}", "higher is better": " \N{UPWARDS ARROW}"}
SHORT = 24
"""Letters that are not broken into lines."""
VERDICTS = {True: ("holds", "\N{CHECK MARK} holds"), False: ("fails", "\N{BALLOT X} does not hold")}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row of figures and where it is from."""

    row: Row
    folder: str
    """As the command line has it."""
    section: str = ""
    """The section's title, with the address of its heading; empty where the table stands in it."""
    anchor: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of its protocol; empty where they are not known."""


def rows_by_protocol(rows: Iterable[Measured]) -> dict[str, list[Measured]]:
    """Rows that compare: those of one protocol."""
    found: dict[str, list[Measured]] = {}
    for one in rows:
        found.setdefault(one.row.protocol, []).append(one)
    return found


def rows_table(rows: Sequence[Measured]) -> Markup:
    """Rows of one protocol. Raises ValueError for several."""
    (protocol,) = {one.row.protocol for one in rows} if rows else {""}
    steered = {
        name: title for name, title in STEERED.items() if any(getattr(one.row, name) is not None for one in rows)
    }
    columns = {**COLUMNS, **steered}
    apart = any(one.section for one in rows)
    heads = [_head("in")] if apart else []
    heads += [
        _head(title + ARROWS.get(BETTER.get(name, ""), ""), name not in NAMES, BETTER.get(name))
        for name, title in columns.items()
    ]
    bodies = []
    for one in rows:
        cells = [_cell(one.section, one.section and tag("a", one.section, href="#" + one.anchor))] if apart else []
        for name in columns:
            value = getattr(one.row, name)
            cells.append(_cell(value, shown(name, value), number=name not in NAMES))
        bodies.append(_body([*cells, _opener()], _more_of(one), len(cells) + 1))
    facts = next((one.facts for one in rows if one.facts), {})
    return Markup(_figures([*heads, _head("", plain="more")], bodies) + _under(protocol, facts))


def _more_of(one: Measured) -> Markup:
    row = one.row
    listed = {
        "measured by": code(command(row, one.facts, one.folder)) if one.facts else None,
        "on": row.hardware,
        "subjects missed": _counts(row.missed_concepts),
        "motions missed": _counts(row.missed_motions),
        "model's hash": tag("code", row.fingerprint),
    }
    return tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in listed.items() if value])


def _counts(missed: Mapping[str, int]) -> str:
    return ", ".join(f"{pair.replace('->', chr(0x2192))} {count}" for pair, count in missed.items())


def pairs_table(pairs: Sequence[Mapping[str, Any]]) -> Markup:
    """How far rows lie above others, paired by prompt: a figure's difference with its standard deviation."""
    names = [name for name in COLUMNS | STEERED if any(name in pair["figures"] for pair in pairs)]
    titles = [(COLUMNS | STEERED)[name] + ", points" * (name in SHARES) for name in names]
    heads = [_head("kind"), _head("difference"), *(_head(title, True) for title in titles)]
    bodies = []
    for pair in pairs:
        rows = (pair["second"], pair["first"])
        both = " less ".join(f"{row.get('model', '')} {row.get('setting', '')}".strip() for row in rows)
        cells = [_cell(str(pair.get("kind", "")), str(pair.get("kind", ""))), _cell(both, both, head=True)]
        for name in names:
            found, scale = pair["figures"].get(name), 100 if name in SHARES else 1
            value, deviation = (scale * found[which] for which in ("value", "deviation")) if found else (None, None)
            said = f"{value:+.3g} \N{PLUS-MINUS SIGN} {deviation:.2g}" if found else "-"
            cells.append(_cell(value, said, number=True))
        bodies.append(_body(cells, None, len(cells)))
    said = "Paired by prompt: differences with their standard deviations, were the prompts others."
    return tag("div", _figures(heads, bodies), tag("p", said, class_="soft"))


def score_tables(scores: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Scores in as few tables as can be in none of which a metric is by two protocols."""
    tables: list[dict[str, list[Mapping[str, Any]]]] = []
    for score in scores:
        metric, protocol = str(score["metric"]), score.get("protocol")
        fitting = (t for t in tables if metric not in t or t[metric][0].get("protocol") == protocol)
        table = next(fitting, None)
        if table is None:
            tables.append(table := {})
        table.setdefault(metric, []).append(score)
    return [
        [score for score in scores if any(score is s for s in table.get(str(score["metric"]), ()))] for table in tables
    ]


def scores_table(scores: Sequence[Mapping[str, Any]]) -> Markup:
    """Scores, each with its interval and the hash of its protocol."""
    named = any(score.get("of") for score in scores)
    heads = [_head("of")] if named else []
    heads += [
        _head("metric"),
        _head("value", True),
        _head("interval"),
        _head("n", True),
        _head("rank", True),
        _head("protocol"),
    ]
    bodies = []
    for score in scores:
        value, counts, ranks = score.get("value"), _numbers(score.get("n")), _numbers(score.get("rank"))
        cells = [_cell(str(score.get("of", "")), str(score.get("of", "")))] if named else []
        cells += [_cell(str(score["metric"]), str(score["metric"]))]
        cells += [_cell(value, _number(value), number=True), _cell("", _interval(score.get("interval")))]
        cells += [
            _cell(next(iter(numbers), None), " / ".join(map(_number, numbers)) or "-", number=True)
            for numbers in (counts, ranks)
        ]
        cells.append(_cell(str(score.get("protocol", "")), tag("code", str(score.get("protocol", "-")))))
        facts = score.get("facts")
        more = tag("pre", tag("code", _json(facts))) if facts else None
        bodies.append(_body([*cells, _opener() if more else tag("td")], more, len(cells) + 1))
    return _figures([*heads, _head("", plain="more")], bodies)


def _numbers(counts: object) -> list[Any]:
    return list(counts.values()) if isinstance(counts, dict) else [] if counts is None else [counts]


def _interval(said: object) -> str:
    """Its ends, and in how many cases it holds what is sought."""
    if isinstance(said, dict) and "low" in said and "high" in said:
        level = f" ({said['level']:.0%})" if isinstance(said.get("level"), float) else ""
        return f"{_number(said['low'])} .. {_number(said['high'])}{level}"
    return "-"


def claims_table(claims: Sequence[Mapping[str, Any]]) -> Markup:
    """What a paper says beside what was found here."""
    columns = ("claim", "source", "paper", "ours", "holds", "n", "note")
    bodies = []
    for claim in claims:
        cells = []
        for name in columns:
            value = claim.get(name)
            if name == "holds":
                kind, said = (
                    VERDICTS.get(value, ("open-claim", "not told apart"))
                    if value is None or isinstance(value, bool)
                    else ("", "")
                )
                cells.append(
                    _cell({True: "0", False: "1"}.get(value, "2"), tag("span", said or str(value), class_=kind or None))
                )
            else:
                cells.append(
                    _cell(
                        value if isinstance(value, int | float) else _number(value),
                        _number(value),
                        head=name == "claim",
                    )
                )
        bodies.append(_body(cells, None, len(cells)))
    return _figures([_head(name) for name in columns], bodies)


def code(line: str) -> Markup:
    """A command line that can be copied."""
    button = tag("button", "copy", type="button", class_="copy", hidden=True)
    return tag("div", tag("pre", tag("code", line)), button, class_="code")


def _number(value: object) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _head(title: str, number: bool = False, hint: str | None = None, plain: str = "") -> Markup:
    if plain:
        return tag("th", tag("span", plain, hidden=True), scope="col")
    return tag("th", tag("button", title, type="button", title=hint), scope="col", class_="number" if number else None)


def _cell(value: object, text: str | Markup | None, number: bool = False, head: bool = False) -> Markup:
    """``value`` is what the table is sorted by."""
    sorted_by = "" if value is None else f"{value:.17g}" if isinstance(value, float) else str(value)
    how = {"data_value": sorted_by, "class_": "number" if number else "word" if len(sorted_by) <= SHORT else None}
    return tag("th", text or "-", scope="row", **how) if head else tag("td", text or "-", **how)


def _opener() -> Markup:
    return tag("td", tag("button", "more", type="button", class_="open", aria_expanded="false", hidden=True))


def _body(cells: list[Markup], more: Markup | None, width: int) -> Markup:
    """A row, and under it what is shown when it is asked for."""
    under = tag("tr", tag("td", more, colspan=width), class_="more") if more else None
    return tag("tbody", tag("tr", cells), under)


def _figures(heads: list[Markup], bodies: list[Markup]) -> Markup:
    table = tag("table", tag("thead", tag("tr", heads)), bodies)
    return tag("div", table, class_="figures", tabindex=0, role="region", aria_label="figures")


def _under(protocol: str, facts: Mapping[str, Any]) -> Markup:
    known = tag("details", tag("summary", "what it is"), tag("pre", tag("code", _json(facts)))) if facts else None
    return tag("div", tag("span", "Protocol ", tag("code", protocol)), known, class_="under")


def _json(facts: object) -> str:
    return json.dumps(facts, indent=1, ensure_ascii=False)
