"""The plot of what clips lack: where its points are, and what it does not do."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from animatelcm.page import document, plots
from results import ROW, evaluation, rows

SVG = "{http://www.w3.org/2000/svg}"


def points(svg: str, colour: str) -> list[tuple[float, float]]:
    uses = [use for use in ElementTree.fromstring(svg).iter(SVG + "use") if colour in use.get("style", "")]
    return [(float(use.get("x")), float(use.get("y"))) for use in uses]


def test_points_lie_where_the_figures_say():
    """Down is lower, linearly; to the right are twice the evaluations, evenly."""
    some = [replace(row, fvd_floor=50.0 + 3 * i) for i, row in enumerate(rows("lcm@1", "lcm@2", "lcm@4", "lcm@8"))]
    drawn = points(plots.excess(some), plots.COLOURS[0])[:4]
    above = [row.fvd_like - row.fvd_floor for row in some]
    slope = (drawn[1][1] - drawn[0][1]) / (above[1] - above[0])
    assert slope < 0  # SVG counts downwards
    for (_, y), value in zip(drawn, above, strict=True):
        assert y == pytest.approx(drawn[0][1] + slope * (value - above[0]), abs=0.01)
    steps = [b[0] - a[0] for a, b in pairwise(drawn)]
    assert steps == pytest.approx(steps[:1] * 3, abs=0.01)
    assert steps[0] > 0


def test_models_and_samplers_are_lines_of_their_own_and_odd_names_stay_text():
    odd = "$x_1 <b>&\N{FOX FACE}"
    some = [*rows("lcm@1", "lcm@4"), *rows("ddim@2:4", "ddim@25:4"), *rows("lcm@1", "lcm@4", model=odd)]
    svg = plots.excess(some)
    texts = [text.text for text in ElementTree.fromstring(svg).iter(SVG + "text")]
    assert {"emoji, lcm", "emoji, ddim:4", f"{odd}, lcm", "1", "2", plots.LABEL} <= set(texts)
    assert [len(points(svg, colour)) for colour in plots.COLOURS[:4]] == [3, 3, 3, 0]  # two points, one in the legend
    assert not re.search(r"<style|font-family|#010203| id=\"(figure|axes|patch)", svg)


def test_what_has_no_distance_or_no_network_is_no_point():
    assert plots.excess(rows("lcm@4")) == ""
    assert plots.excess([ROW, replace(ROW, kind="images", fvd_like=None, fvd_floor=None)]) == ""
    real = [replace(ROW, setting=name, evaluations=0) for name in ("real", "autoencoded")]
    assert plots.excess([ROW, *real]) == ""
    assert "the autoencoder of emoji alone" in plots.excess([*rows("lcm@1", "lcm@4"), *real])


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    folder = evaluation(tmp_path, rows("lcm@1", "lcm@4"))
    assert "<svg" in document.write(folder).read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = document.write(folder).read_text(encoding="utf-8")
    assert "<svg" not in text
    assert "pip install animatelcm[eval]" in text
