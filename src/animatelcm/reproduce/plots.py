"""The plots of a reproduction, by matplotlib ([eval])."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animatelcm.evaluate.report import Row
from animatelcm.reproduce.claims import excess

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INKS = ("#a63603", "#08306b", "#6a51a3", "#31a354")


def few_steps(path: Path, curves: Mapping[str, Sequence[Row]], teacher: Row | None) -> None:
    """Distance, with each row's own interval, and subjects over evaluations: a curve a model.

    Rows have the same prompts, so that they may be told apart where their intervals overlap.
    """
    figure, (left, right) = _figure(2)
    for ink, (name, rows) in zip(INKS, curves.items(), strict=False):
        evaluations = [row.evaluations for row in rows]
        left.plot(evaluations, [excess(row) for row in rows], color=ink, marker="o", label=name)
        left.vlines(evaluations, *zip(*map(_interval, rows), strict=True), color=ink)
        right.plot(evaluations, [100 * row.concept_accuracy for row in rows], color=ink, marker="o", label=name)
    counts = sorted({row.evaluations for rows in curves.values() for row in rows})
    if teacher is not None:
        for axes, value in ((left, excess(teacher)), (right, 100 * teacher.concept_accuracy)):
            axes.axhline(value, color="grey", linestyle=":", label=f"teacher, {teacher.evaluations} evaluations")
    for axes, title in (
        (left, "FVD-like over the floor, 95 % (lower is better)"),
        (right, "frames that show the subject, %"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("evaluations of the network")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    _save(figure, path)


def _interval(row: Row) -> tuple[float, float]:
    """The ends of the interval of a row's excess."""
    assert row.fvd_floor is not None
    low, high = row.intervals["fvd_like"]
    return low - row.fvd_floor, high - row.fvd_floor


def losses(path: Path, runs: Mapping[str, Path]) -> None:
    """The loss of runs over their steps, each averaged over 50 of them."""
    figure, (axes,) = _figure(1)
    for ink, (name, file) in zip(INKS, runs.items(), strict=False):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        entries = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        near = [[loss for step, loss in entries if abs(step - at) <= 25] for at, _ in entries]
        axes.plot([at for at, _ in entries], [sum(some) / len(some) for some in near], color=ink, label=name)
    axes.set_xlabel("step")
    axes.set_title("loss", fontsize=10)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    _save(figure, path)


def bias(path: Path, found: Mapping[str, Any]) -> None:
    """Slopes of the sample over the teacher, and the distance of the earlier points, over timesteps."""
    figure, (left, right) = _figure(2)
    left.plot(found["t"], found["slope_unguided"], color=INKS[0], marker="o", label="over the unguided teacher")
    left.plot(found["t"], found["slope_guided"], color=INKS[1], marker="o", label=f"guidance {found['guidance']:g}")
    left.axhline(1, color="grey", linestyle=":")
    left.set_title("slope of the sample over the prediction (1: unbiased)", fontsize=10)
    left.legend(fontsize=8)
    right.plot(found["t"], found["noise_error"], color=INKS[0], marker="o", label="eps - eps_phi")
    right.plot(found["t"], found["step_apart"], color=INKS[1], marker="o", label="the earlier points")
    right.set_title("root mean square distance", fontsize=10)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("t")
    _save(figure, path)


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.5), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Figure, path: Path) -> None:
    unfinished = path.with_name(path.name + ".partial")
    figure.savefig(unfinished, format="png", dpi=110)
    unfinished.replace(path)
