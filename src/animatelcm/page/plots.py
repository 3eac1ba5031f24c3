"""Figures as pictures: SVG that takes its ink from the page around it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from itertools import cycle

from animatelcm.evaluate.report import CEILINGS, Row

INK = "#010203"  # stands for the page's own colour of text
COLOURS = ("#3f7fca", "#d07c2e", "#3d9a6d", "#b5578f", "#8377d1", "#8d8a3c")
MARKERS = "osD^vP"
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "animatelcm",
}
LABEL = "FVD-like above its floor (lower is better)"


def excess(rows: Sequence[Row]) -> str:
    """FVD-like distance minus its floor against evaluations of the network, of rows of one protocol: a line for each
    model and way of sampling, dashed what the autoencoder costs. Empty where there are fewer than two points.

    Raises ImportError where matplotlib is not installed.
    """
    rows = [row for row in rows if row.fvd_like is not None and row.fvd_floor is not None]
    points = [row for row in rows if row.setting not in CEILINGS and row.evaluations > 0]
    if len(points) < 2:
        return ""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    series: dict[str, list[Row]] = {}
    for row in sorted(points, key=lambda row: row.evaluations):
        series.setdefault(f"{row.model}, {re.sub('@[0-9]+', '', row.setting)}", []).append(row)
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that matplotlib's font lacks, and the page's has
        figure = Figure(figsize=(7.2, 3.6 + 0.11 * len(series)), layout="constrained")
        axes = figure.add_subplot()
        for some, colour, marker in zip(series.values(), cycle(COLOURS), cycle(MARKERS), strict=False):
            x, y = [row.evaluations for row in some], [_above(row) for row in some]
            axes.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=1.6, label="a line")
        for row in [row for row in rows if row.setting == "autoencoded"][:1]:
            axes.axhline(_above(row), color=INK, linewidth=1, linestyle=(0, (4, 4)), alpha=0.5)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (-2, 4)}
            said = f"the autoencoder of {row.model} alone"
            axes.annotate(said, (1, _above(row)), ha="right", fontsize=8.5, parse_math=False, **place)
        ticks = sorted({row.evaluations for row in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.08, y=0.15)
        low, high = axes.get_ylim()
        axes.set_ylim(low if min(map(_above, points)) < 0 else 0.0, max(high, 0.0))
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
        axes.set_xlabel("evaluations of the network, a clip")
        axes.set_ylabel(LABEL)
        legend = figure.legend(loc="outside lower left", ncols=1 if max(map(len, series)) > 40 else 2, fontsize=9)
        for text, name in zip(legend.get_texts(), series, strict=True):
            text.set_parse_math(False)
            text.set_text(name)  # as it is, even with an underscore first
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(drawn.getvalue())


def _above(row: Row) -> float:
    assert row.fvd_like is not None
    assert row.fvd_floor is not None
    return row.fvd_like - row.fvd_floor


def _inline(svg: str) -> str:
    """A file's SVG as part of a page: no names and rules that would be the whole page's, its ink and letters."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    return svg.replace(INK, "currentColor")
