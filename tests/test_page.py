"""The page of a folder: read by a parser, it holds what the folder holds, and nothing else acts in it."""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from animatelcm import cli
from animatelcm.evaluate.report import row_path, write_row
from animatelcm.page import document
from animatelcm.page.markup import VOID, tag
from animatelcm.page.tables import score_tables
from results import ROW, batch, clip, evaluation, request, rows

NASTY = [
    '<script>alert("1")</script>',
    "a \"quoted\" & 'single' <b>fox</b> &amp; &lt;",
    "\N{FOX FACE} \N{RAINBOW} emoji",
    "two\nlines\r\nthree",
    "\N{ARABIC LETTER SEEN}\N{ARABIC LETTER LAM} \N{RIGHT-TO-LEFT OVERRIDE}abc",
    "</video></td></table><img src=x onerror=alert(1)>",
    "a lone \ud83e half",
    "` ${x} </style>",
]


class Page(HTMLParser):
    """Elements, in order: name, attributes, the text inside, and the tables that they are in."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.elements: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        element = (name, {**dict(attributes), "text": "", "above": [about for _, about in self.open]})
        assert len(attributes) == len(dict(attributes)), name
        self.elements.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name

    def handle_data(self, data):
        for _, about in self.open:
            about["text"] += data

    def all(self, name: str, class_: str = "", within: dict | None = None) -> list[dict]:
        return [
            about
            for element, about in self.elements
            if element == name
            and (not class_ or class_ in (about.get("class") or "").split())
            and (within is None or any(one is within for one in about["above"]))
        ]

    def links(self) -> list[str]:
        return [about[key] for _, about in self.elements for key in ("src", "href") if key in about]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def shown(folder: Path, **options) -> Page:
    return read(document.write(folder, **options))


def there(link: str, folder: Path) -> bool:
    return link.startswith(("#", "data:,")) or (folder / unquote(link)).is_file()


def test_every_link_leads_to_a_file_and_every_clip_is_linked_once(tmp_path):
    evaluation(tmp_path / "e v#1?é%20", rows("lcm@1", "ddim@25:4"), kept=["a fox", "a cat"])
    batch(tmp_path / "b", ["a parrot"])
    clip(tmp_path / "b" / "loose.mp4", request("a crab"))
    found = shown(tmp_path)
    links = [link for link in found.links() if not link.startswith(("#", "data:"))]
    assert all(there(link, tmp_path) for link in found.links())
    assert all(not re.match(r"[a-z]+:|/", link) for link in links)
    videos = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4")}
    assert Counter(map(unquote, links)) == Counter(videos)
    ids = [about["id"] for _, about in found.elements if "id" in about]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in found.links() if link.startswith("#")} <= set(ids)
    assert all(about.get("alt") or about.get("aria-label") for name in ("img", "video") for about in found.all(name))


def test_a_page_elsewhere_finds_the_same_files(tmp_path):
    folder = batch(tmp_path / "made" / "b", ["a fox"])
    out = document.write(folder, tmp_path / "pages" / "deep" / "fox.html")
    links = [link for link in read(out).links() if link.endswith(".mp4")]
    assert sorted(os.path.normpath(out.parent / link) for link in links) == sorted(map(str, folder.glob("*.mp4")))


def test_whatever_a_prompt_says_is_text(tmp_path):
    found = shown(batch(tmp_path / "b", NASTY, steps=(4,)), title=NASTY[0])
    asked = [about["text"] for about in found.all("span", "prompt")]
    assert asked == [prompt.encode("utf-8", "replace").decode() for prompt in NASTY]
    assert found.all("h1")[0]["text"] == found.all("title")[0]["text"] == NASTY[0]
    assert len(found.all("script")) == len(found.all("style")) == 1
    assert len(found.all("video")) == len(NASTY)
    assert not found.all("b")
    assert not found.all("img")
    assert not [name for _, about in found.elements for name in about if name.startswith("on")]
    assert all(about["dir"] == "auto" for about in found.all("span", "prompt"))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.text())
def test_markup_reads_back_as_it_was_meant(text, value):
    (element,) = Page(tag("p", text, title=value)).elements
    assert element[1]["text"] == text
    assert element[1]["title"] == value


def test_a_line_is_a_prompt_with_its_seed_and_a_column_a_setting(tmp_path):
    found = shown(batch(tmp_path / "b", ["a fox", "a fox", "a cat"], steps=(8, 1)))
    (grid,) = found.all("table", "grid")
    heads = [about["text"] for about in found.all("th", within=grid) if "data-column" in about]
    assert heads == ["lcm@8", "lcm@1"]
    lines = found.all("tr", "line")
    asked = [found.all("th", within=line)[0]["text"] for line in lines]
    assert asked == ["a foxseed 0", "a foxseed 1", "a catseed 2"]
    for number, line in enumerate(lines):
        videos = [about["src"] for about in found.all("video", within=line)]
        assert videos == [f"{2 * number:06}.mp4", f"{2 * number + 1:06}.mp4"]
        assert [about["data-setting"] for about in found.all("figure", within=line)] == heads
        commands = [about["text"] for about in found.all("code", within=line)]
        assert [re.search(r"--steps (\d+)", said)[1] for said in commands] == ["8", "1"]
        assert "0.75 s" in line["text"]


def test_rows_of_two_protocols_are_never_in_one_table(tmp_path):
    evaluation(tmp_path / "a", rows("lcm@1", "lcm@4"))
    evaluation(tmp_path / "b", rows("lcm@2", protocol="other"), facts={})
    evaluation(tmp_path / "c", rows("lcm@8"))
    write_row(replace(ROW, setting="ddim@9", protocol="third"), row_path(tmp_path / "c", "clips", "ddim@9"))
    found = shown(tmp_path)
    held = []
    for region, under in zip(found.all("div", "figures"), found.all("div", "under"), strict=True):
        cells = [about["text"] for about in found.all("td", within=region)]
        settings = {text for text in cells if re.fullmatch(r"(lcm|ddim)@\d", text)}
        held.append((found.all("code", within=under)[0]["text"], settings))
    main = ROW.protocol
    assert held[:3] == [(main, {"lcm@1", "lcm@4", "lcm@8"}), ("other", {"lcm@2"}), ("third", {"ddim@9"})]
    assert sorted(held[3:], key=str) == sorted(
        [(main, {"lcm@1", "lcm@4"}), ("other", {"lcm@2"}), (main, {"lcm@8"}), ("third", {"ddim@9"})], key=str
    )


SCORES = st.lists(st.fixed_dictionaries({"metric": st.sampled_from("abc"), "protocol": st.sampled_from("pqr")}))


@given(SCORES)
def test_no_table_has_a_metric_by_two_protocols_and_none_is_lost(scores):
    tables = score_tables(scores)
    for table in tables:
        assert len({(s["metric"], s["protocol"]) for s in table}) == len({s["metric"] for s in table})
    assert sorted(map(id, scores)) == sorted(id(score) for table in tables for score in table)
    most = max((len({s["protocol"] for s in scores if s["metric"] == m}) for m in "abc"), default=0)
    assert len(tables) == most


def test_scores_come_with_their_interval_and_remarks(tmp_path):
    interval = {"low": 101.25, "high": 120.5, "bias": 1.0, "level": 0.95, "resamples": 1000, "seed": 0}
    score = {"metric": "FVD", "value": 110.0, "interval": interval, "n": {"real": 2048, "generated": 3}, "rank": None}
    whole = {"scores": [{"of": "ours", **score, "protocol": "p1", "facts": {"a": "<i>"}}], "remarks": ["n = 3 <b>"]}
    (tmp_path / "scores.json").write_text(json.dumps(whole))
    found = shown(tmp_path)
    cells = [about["text"] for about in found.all("td", within=found.all("tbody")[0])]
    assert cells[:7] == ["ours", "FVD", "110", "101.2 .. 120.5 (95%)", "2048 / 3", "-", "p1"]
    assert found.all("p", "remark")[0]["text"] == "n = 3 <b>"


def test_pairs_of_rows_say_how_far_they_are_apart(tmp_path):
    evaluation(tmp_path, rows("lcm@1", "lcm@4"))
    report = json.loads((tmp_path / "report.json").read_text()) if (tmp_path / "report.json").is_file() else {}
    figures = {
        "fvd_like": {"value": -35.04, "deviation": 16.2},
        "concept_accuracy": {"value": 0.18, "deviation": 0.031},
    }
    named = {"first": {"model": "<m>", "setting": "lcm@1"}, "second": {"model": "<m>", "setting": "lcm@4"}}
    report["paired"] = [{**named, "kind": "clips", "n": 64, "figures": figures}]
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = shown(tmp_path)
    (body,) = [about for about in found.all("tbody") if " less " in about["text"]]
    assert [about["text"] for about in found.all("th", within=body)] == ["<m> lcm@4 less <m> lcm@1"]
    said = [about["text"].replace(" \N{PLUS-MINUS SIGN} ", "/") for about in found.all("td", within=body)]
    assert said == ["clips", "-35/16", "+18/3.1"]


def test_claims_come_first_and_say_what_holds(tmp_path):
    evaluation(tmp_path / "runs" / "a", rows("lcm@1"))
    claim = {"claim": "few steps suffice", "source": "table 1", "paper": 184.2, "ours": "12", "n": 64, "note": "<i>"}
    several = [{**claim, "holds": holds} for holds in (True, False, None)]
    (tmp_path / "claims.json").write_text(json.dumps({"title": "The paper", "rows": several}))
    batch(tmp_path / "b", ["a fox"])
    (tmp_path / "b" / "curve.png").write_bytes(b"")
    found = shown(tmp_path)
    assert found.all("h1")[0]["text"] == "The paper"
    first = found.all("table")[0]
    assert [about["text"][2:] for about in found.all("span", within=first)] == [
        "holds",
        "does not hold",
        "t told apart",
    ]
    assert [about["text"] for about in found.all("th", within=first)[7:]] == ["few steps suffice"] * 3
    assert [about["src"] for about in found.all("img")] == ["b/curve.png"]


def test_broken_things_are_shown_as_such(tmp_path):
    folder = batch(tmp_path / "b", ["a fox", "a cat"], steps=(1, 4))
    (folder / "000001.mp4").unlink()
    whole = (folder / "000002.mp4").read_bytes()
    (folder / "000002.mp4").write_bytes(whole[: len(whole) // 2])
    with (folder / "manifest.jsonl").open("a") as file:
        file.write(json.dumps({"row": 4, "prompt": "an owl", "error": "steps=0 <is> out of range"}) + "\n")
        file.write('[1]\n{"row": 5, "file": "0000')
    found = shown(folder)
    gaps = [about["text"] for about in found.all("p", "gap")]
    assert gaps == ["000001.mp4 is not there", "000002.mp4 cannot be read", "row 4: steps=0 <is> out of range"]
    assert [about["text"].rpartition(" ")[2] for about in found.all("p", "remark")] == ["2"]
    assert [about["src"] for about in found.all("video")] == ["000000.mp4", "000003.mp4"]
    assert "3 missing" in found.all("header", "top")[0]["text"]


def test_folders_are_found_three_deep_each_once(tmp_path):
    for deep in ("a2", "a10", "x/y/z", "x/y/z/deeper"):
        batch(tmp_path / deep, ["a fox"], steps=(4,))
    (tmp_path / "x" / "again").symlink_to(tmp_path)
    found = shown(tmp_path)
    assert found.all("h1")[0]["text"] == tmp_path.name
    assert [about["text"] for about in found.all("h2")[:-1]] == ["a2", "a10", "x/y/z"]


def test_a_list_brings_no_file_from_elsewhere(tmp_path):
    folder = batch(tmp_path / "b", ["a fox"], steps=(4,))
    other = clip(tmp_path / "secret.mp4")
    names = [str(other), "../secret.mp4", "000000.mp4"]
    lines = [json.dumps({"row": row, "file": name, "prompt": "x"}) for row, name in enumerate(names)]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    found = shown(folder, embed=True)
    gaps = [about["text"] for about in found.all("p", "gap")]
    assert [text for text in gaps if text != "-"] == ["secret.mp4 is not in the folder"] * 2
    assert len(found.all("video")) == 1


def test_an_embedded_page_holds_the_files_themselves(tmp_path, monkeypatch):
    folder = batch(tmp_path / "b", ["a fox", "a cat"], steps=(4,))
    found = shown(folder, out=tmp_path / "one.html", embed=True)
    held = [base64.b64decode(about["src"].removeprefix("data:video/mp4;base64,")) for about in found.all("video")]
    assert held == [path.read_bytes() for path in sorted(folder.glob("*.mp4"))]
    assert all(link.startswith("data:") for link in found.links())
    monkeypatch.setattr(document, "LIMIT", sum(map(len, held)) - 1)
    with pytest.raises(ValueError, match="leave --embed out"):
        document.write(folder, embed=True)


def test_a_page_is_whole_or_as_it_was(tmp_path, monkeypatch):
    folder = batch(tmp_path / "b", ["a fox"])
    before = set(folder.iterdir())
    out = document.write(folder)
    assert set(folder.iterdir()) - before == {out}
    text = out.read_bytes()
    assert document.write(folder).read_bytes() == text  # and the page itself is not shown
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        document.write(folder, title="other")
    assert out.read_bytes() == text
    assert set(folder.iterdir()) - before == {out}


def test_the_command_says_where_the_page_is(tmp_path, capsys, monkeypatch):
    folder, seen = batch(tmp_path / "b", ["a fox"]), []
    monkeypatch.setattr("webbrowser.open", seen.append)
    cli.main(["report", str(folder), "--title", "Foxes", "--open"])
    out = folder / "index.html"
    assert capsys.readouterr().out == f"page in {out}\n"
    assert seen == [out.as_uri()]
    assert read(out).all("h1")[0]["text"] == "Foxes"
    cli.main(["report", str(folder), "--out", str(tmp_path / "x.html"), "--embed", "--json"])
    size = (tmp_path / "x.html").stat().st_size
    assert json.loads(capsys.readouterr().out) == {"page": str(tmp_path / "x.html"), "bytes": size}
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "none")])
    assert capsys.readouterr().err.startswith("animatelcm: ")


def test_no_folder_and_no_page_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        document.write(tmp_path / "none")
    with pytest.raises(ValueError, match=r"ends in \.html"):
        document.write(batch(tmp_path / "b", ["a fox"]), tmp_path / "page.pdf")
