"""Scores in tables: figures of several protocols of one metric do not stand together unsaid."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from animatelcm.evaluate.bootstrap import Interval
from animatelcm.evaluate.report import facts_hash
from animatelcm.evaluate.score import Score, score_table

FVD = Score(
    metric="FVD",
    value=925.7134,
    interval=Interval(900.1, 950.2, 12.0, 0.95, 1000, 0),
    n={"real": 2048, "generated": 300},
    rank={"real": 400, "generated": 299},
    facts={"metric": "FVD", "frames": 16},
)
SIM = Score(
    metric="CLIPSIM", value=28.89, interval=Interval(28, 29, 0, 0.9, 9, 0), n={"generated": 300}, facts={"a": 1}
)


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if "|" in line]


def test_a_line_says_value_interval_counts_and_ranks():
    head, marks, fvd, sim = cells(score_table({"lcm@4": [FVD, SIM]}))
    assert dict(zip(head, fvd, strict=True)) == {
        "of": "lcm@4",
        "metric": "FVD",
        "value": "925.7",
        "interval": "900.1 .. 950.2 (95%)",
        "n": "2048 / 300",
        "rank": "400 / 299",
    }
    assert sim[1:] == ["CLIPSIM", "28.89", "28 .. 29 (90%)", "300", "-"]
    assert len(marks) == len(head)


def test_protocols_are_named_below():
    last = score_table({"a": [FVD, SIM], "b": [FVD, SIM]}).splitlines()[-1]
    assert last == f"FVD by protocol {facts_hash(FVD.facts)}, CLIPSIM by protocol {facts_hash(SIM.facts)}."


def test_two_protocols_of_a_metric_are_refused_unless_that_is_said():
    other = replace(FVD, facts={"metric": "FVD", "frames": 24})
    with pytest.raises(ValueError, match="2 protocols"):
        score_table({"a": [FVD], "b": [other]})
    lines = cells(score_table({"a": [FVD], "b": [other]}, mixed=True))
    assert [line[-1] for line in lines[2:]] == [FVD.protocol, other.protocol]
    assert lines[0][-1] == "protocol"


def test_a_bar_in_a_name_does_not_break_the_table():
    assert score_table({"a|b": [FVD]}).splitlines()[2].replace("\\|", "").count("|") == 7


def test_a_score_is_json():
    whole = json.loads(json.dumps(FVD.to_json()))
    assert whole["interval"]["low"] == 900.1
    assert whole["protocol"] == facts_hash(whole["facts"])
