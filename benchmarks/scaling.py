"""What a clip costs against its frames, pixels, steps and number: seconds and memory, and whether they grow linearly.

    python benchmarks/scaling.py --out docs/scaling.png

Beyond one window (16 frames) seconds should be a straight line over frames, and memory a constant over steps.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from animatelcm.bench import inference, machine
from animatelcm.bench.inference import Case, Subject
from animatelcm.bench.timing import interleaved, peak_memory
from animatelcm.memory import best_dtype
from animatelcm.sampling import best_device

AXES: dict[str, str] = {"frames": "frames", "size": "side, pixels", "steps": "steps", "batch": "clips"}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What is varied, one number at a time."""

    model: Subject = "emoji"
    frames: tuple[int, ...] = (8, 16, 28, 40, 64, 100)
    size: tuple[int, ...] = (32, 64, 96, 128)
    steps: tuple[int, ...] = (1, 2, 4, 8)
    batch: tuple[int, ...] = (1, 2, 4)
    rounds: int = 3
    device: str = "auto"
    out: Path | None = None
    """A picture (.png, .svg), which needs matplotlib."""


def main(options: Scaling) -> None:
    device = best_device() if options.device == "auto" else options.device
    model = inference.subject(options.model, device, best_dtype("auto", device))
    usual = Case(size=64 if options.model == "emoji" else 512, context=16)
    measured: dict[str, list[dict[str, Any]]] = {}
    for axis in AXES:
        measured[axis] = []
        for value in getattr(options, axis):
            case = replace(usual, **{axis: value})
            call = {"ours": lambda case=case: inference.denoised(model, case)}
            row = {
                "case": asdict(case),
                "seconds": interleaved(call, rounds=options.rounds)["ours"].median,
                "bytes": peak_memory(call["ours"]),
            }
            measured[axis].append(row)
            print(f"{axis} {value}: {row['seconds']:.3f} s, {row['bytes'] / 2**20:.0f} MiB")
    print(json.dumps({"model": options.model, "measured": measured, "machine": machine.facts()}))
    if options.out is not None:
        draw(measured, options.out)


def draw(measured: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Seconds (left) and memory (right) over each axis."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(measured), figsize=(3.4 * len(measured), 2.8), layout="constrained")
    for panel, (axis, rows) in zip(panels, measured.items(), strict=True):
        values = [row["case"][axis] for row in rows]
        panel.plot(values, [row["seconds"] for row in rows], "o-", color="#2563eb")
        panel.set(xlabel=AXES[axis], xlim=(0, None), ylim=(0, None))
        memory = panel.twinx()
        memory.plot(values, [row["bytes"] / 2**20 for row in rows], "s--", color="#d97706", markersize=4)
        memory.set_ylim(0, None)
        if axis == next(iter(measured)):
            panel.set_ylabel("denoising, s", color="#2563eb")
        if panel is panels[-1]:
            memory.set_ylabel("memory, MiB", color="#d97706")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Scaling, description=__doc__))
