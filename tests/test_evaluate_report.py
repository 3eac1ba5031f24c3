"""Rows of figures: what may stand in one table, and files that are whole or not there."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from animatelcm import cli
from animatelcm.evaluate.judge import Protocol
from animatelcm.evaluate.report import (
    COLUMNS,
    Row,
    command,
    facts_hash,
    read_row,
    row_path,
    summary,
    table,
    write_json,
    write_row,
)

ROW = Row(
    model="emoji",
    fingerprint="f1",
    protocol="p1",
    kind="clips",
    setting="ddim@25:4",
    n=256,
    evaluations=50,
    seconds=2.8123456,
    concept_accuracy=0.7341,
    named=180,
    motion_accuracy=0.2,
    motion_amount=1.07,
    fvd_like=123.456,
    fvd_floor=45.6,
    hardware="a machine",
    missed_concepts={"bus -> automobile": 3},
)
FACTS = {"version": 1, "seeds": {"real": 2, "prompts": 1}, "styles": ["noto"], "share": 0.5}


def test_a_row_is_read_as_it_was_written(tmp_path):
    path = row_path(tmp_path, "clips", ROW.setting)
    write_row(ROW, path)
    assert read_row(path) == ROW
    assert path == tmp_path / "rows" / "ddim@25-4.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing unfinished stays


def test_every_kind_and_setting_has_a_file_of_its_own(tmp_path):
    kinds, names = ("clips", "images", "held_out"), ("lcm@4", "lcm@44", "ddim@4:4", "real")
    assert len({row_path(tmp_path, kind, name) for kind in kinds for name in names}) == 12


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "row.json"
    write_row(ROW, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json({"fvd_like": float("nan")}, path)
    assert read_row(path) == ROW


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": "x"}', '{"no": 1}', "\x00"])
def test_what_is_no_row_is_named(text, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json holds no row"):
        read_row(path)


def test_the_table_has_every_figure_and_says_where_there_is_none():
    still = replace(ROW, kind="images", motion_accuracy=None, motion_amount=None, fvd_like=None, fvd_floor=None)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table([ROW, still]).splitlines()
        if "|" in line
    ]
    assert lines[0] == list(COLUMNS.values())
    assert {len(line) for line in lines} == {len(COLUMNS)}
    shown = dict(zip(COLUMNS, lines[2], strict=True))
    assert (shown["fvd_like"], shown["fvd_floor"]) == ("123.5", "45.6")
    assert (shown["concept_accuracy"], shown["motion_accuracy"], shown["seconds"]) == ("73.4%", "20.0%", "2.812")
    assert (shown["n"], shown["evaluations"]) == ("256", "50")
    assert lines[3].count("-") == 4


def test_a_bar_in_a_name_does_not_break_the_table():
    assert table([replace(ROW, model="a|b")]).splitlines()[2].replace("\\|", "").count("|") == len(COLUMNS) + 1


def test_rows_of_two_protocols_are_refused_unless_that_is_said():
    rows = [ROW, replace(ROW, protocol="p2")]
    with pytest.raises(ValueError, match=r"2 protocols \(p1, p2\)"):
        table(rows)
    lines = table(rows, mixed=True).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["p1", "p2"]


def test_the_hash_depends_on_every_fact_and_not_on_their_order():
    swapped = {key: FACTS[key] for key in reversed(FACTS)} | {"seeds": {"prompts": 1, "real": 2}}
    assert facts_hash(swapped) == facts_hash(FACTS)
    changes = [{"version": 2}, {"seeds": {"real": 2}}, {"styles": ["noto", "x"]}, {"share": 0.25}, {"more": 0}]
    assert len({facts_hash({**FACTS, **change}) for change in [{}, *changes]}) == 6


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), st.integers()), st.text(), st.integers())
def test_one_more_fact_is_another_hash(facts, name, value):
    if facts.get(name) != value:
        assert facts_hash({**facts, name: value}) != facts_hash(facts)


def test_the_summary_holds_what_its_hash_is_of():
    whole = json.loads(json.dumps(summary([ROW], FACTS, {"torch": "2"})))
    assert Row(**whole["rows"][0]) == ROW
    assert facts_hash({k: v for k, v in whole["protocol"].items() if k != "hash"}) == whole["protocol"]["hash"]


@pytest.mark.parametrize(
    "protocol",
    [Protocol(clips=4, real=9), Protocol(clips=5, real=8, steer="edge"), Protocol(real=7, style_truth="twemoji")],
)
@pytest.mark.parametrize("setting", ["ddim@4:2/trailing", "real"])
def test_the_line_of_a_row_asks_for_its_protocol_again(protocol, setting, monkeypatch):
    asked = []
    monkeypatch.setattr(cli.PROTOCOLS["emoji"], "run", lambda self: asked.append(self))
    label = "my-model --style 'a b.safetensors:0.8' --teacher"
    row = replace(ROW, model=label, kind="plain", setting=setting, protocol=facts_hash(protocol.facts))
    cli.main(shlex.split(command(row, protocol.facts, "out dir"))[1:])
    (verb,) = asked
    again = Protocol(clips=verb.clips, real=verb.real, style_truth=verb.style_truth, steer=verb.steer)
    assert facts_hash(again.facts) == row.protocol
    assert (shlex.join(verb.source.words()[1:]), str(verb.out), verb.kinds) == (label, "out dir", ("plain",))
    assert (verb.settings, verb.ceilings) == (((), True) if setting == "real" else ((setting,), False))


def test_a_name_that_is_no_command_line_stays_one_word():
    assert "--model 'our \"best' " in command(replace(ROW, model='our "best'), Protocol().facts, "out")
