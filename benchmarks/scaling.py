"""What a clip costs against its frames, pixels, steps and number: seconds and memory, and whether they grow linearly.

    python benchmarks/scaling.py --out docs/scaling.png

Beyond one window (16 frames) seconds should be a straight line over frames, and memory a constant over steps.
``bytes`` are those of tensors while a clip is denoised, ``file_bytes`` (over frames alone) from the prompt until its
frames have gone to a file, both beyond ``weights_bytes`` and with the graphs of evaluations made anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from animatelcm.bench import machine, workload
from animatelcm.bench.timing import interleaved
from animatelcm.bench.workload import Case, Subject
from animatelcm.memory import best_dtype
from animatelcm.model import VideoModel
from animatelcm.sampling import best_device

AXES: dict[str, str] = {"frames": "frames", "size": "side, pixels", "steps": "steps", "batch": "clips"}
SIZES: dict[Subject, tuple[int, ...]] = {"emoji": (32, 64, 96, 128), "sd15-random": (256, 512, 768)}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What is varied, one number at a time."""

    model: Subject = "emoji"
    frames: tuple[int, ...] = (8, 16, 28, 40, 64, 100)
    size: tuple[int, ...] = ()
    """Pixels. Default: 32, 64, 96 and 128, or 256, 512 and 768 for sd15-random."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    batch: tuple[int, ...] = (1, 2, 4)
    rounds: int = 3
    device: str = "auto"
    out: Path | None = None
    """A picture (.png, .svg), which needs matplotlib."""

    def cases(self) -> dict[str, list[Case]]:
        """By axis."""
        usual = Case(size=64 if self.model == "emoji" else 512, context=16)
        values = {axis: getattr(self, axis) for axis in AXES} | {"size": self.size or SIZES[self.model]}
        return {axis: [replace(usual, **{axis: value}) for value in values[axis]] for axis in AXES}


def main(options: Scaling) -> None:
    device = best_device() if options.device == "auto" else options.device
    model = workload.subject(options.model, device, best_dtype("auto", device))
    found: dict[str, list[Row]] = {}
    for axis, cases in options.cases().items():
        found[axis] = []
        for case in cases:
            row = measured(model, case, rounds=options.rounds, to_file=axis == "frames")
            if row is None:
                print(f"left out, out of memory: {case}", flush=True)
                continue
            found[axis].append(row)
            file = f", {row['file_bytes'] / 2**20:.0f} MiB to a file" if "file_bytes" in row else ""
            said = f"{row['seconds']:.3f} s, {row['bytes'] / 2**20:.0f} MiB{file}"
            print(f"{axis} {row['case'][axis]}: {said}", flush=True)
    loaded = workload.weights(model.networks.values())
    about = {"model": options.model, "weights_bytes": loaded, "machine": machine.facts()}
    print(json.dumps(about | {"measured": found}))
    if options.out is not None:
        draw(found, options.out)


def measured(model: VideoModel, case: Case, *, rounds: int, to_file: bool) -> Row | None:
    """Figures of a case; None where memory does not suffice for it."""
    denoise = partial(workload.denoised, model, case)

    def figures() -> Row:
        model.forget_graphs()  # of the case before
        timing = interleaved({"ours": denoise}, rounds=rounds, warmup=workload.warmup(model))["ours"]
        row = {
            "case": asdict(case),
            "seconds": timing.median,
            "bytes": _bytes(model, denoise),
        }
        return row | ({"file_bytes": _bytes(model, partial(workload.in_chunks, model, case))} if to_file else {})

    return workload.fitting(figures)


def _bytes(model: VideoModel, call: Callable[[], object]) -> int:
    return workload.fresh_memory(model, call).tensors


def draw(found: dict[str, list[Row]], out: Path) -> None:
    """Seconds (left) and memory (right; dotted: to a file) over each axis."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(3.4 * len(found), 2.8), layout="constrained")
    for panel, (axis, rows) in zip(panels, found.items(), strict=True):
        values = [row["case"][axis] for row in rows]
        panel.plot(values, [row["seconds"] for row in rows], "o-", color="#2563eb")
        panel.set(xlabel=AXES[axis], xlim=(0, None), ylim=(0, None))
        beside = panel.twinx()
        for key, style in (("bytes", "s--"), ("file_bytes", "^:")):
            if rows and key in rows[0]:
                beside.plot(values, [row[key] / 2**20 for row in rows], style, color="#d97706", markersize=4)
        beside.set_ylim(0, None)
        if axis == next(iter(found)):
            panel.set_ylabel("denoising, s", color="#2563eb")
        if panel is panels[-1]:
            beside.set_ylabel("memory, MiB", color="#d97706")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Scaling, description=__doc__))
