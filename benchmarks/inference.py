"""Ours beside diffusers over steps, guidance, frames, sizes and batches, on the same weights.

    python benchmarks/inference.py --model emoji                      # a CPU, minutes
    python benchmarks/inference.py --model sd15-random --compiled     # a GPU

Each case is ``animatelcm bench``'s: one process, A B A B, medians. A line of JSON a case goes to ``--out``; the table
comes at the end. Cases that memory does not suffice for are told, and left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from animatelcm.bench import inference
from animatelcm.bench.inference import Case, Subject
from animatelcm.memory import best_dtype
from animatelcm.model_source import Precision
from animatelcm.sampling import best_device


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """From one case, each of its numbers is changed by itself."""

    model: Subject = "emoji"
    """sd15-random: Stable Diffusion 1.5's size, random weights."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guidance: tuple[float, ...] = (1.0, 1.5)
    frames: tuple[int, ...] = (8, 16, 32, 64)
    sizes: tuple[int, ...] = ()
    """Pixels. Default: 64 and 128, or 256, 512 and 768 for sd15-random."""
    batches: tuple[int, ...] = (1, 4)
    rounds: int = 5
    compiled: bool = False
    """Also diffusers' network under torch.compile."""
    device: str = "auto"
    precision: Precision = "auto"
    out: Path | None = None
    """A file for a line of JSON a case."""

    def cases(self) -> list[Case]:
        """The usual case, and each neighbour of it once."""
        sizes = self.sizes or ((64, 128) if self.model == "emoji" else (256, 512, 768))
        usual = {"steps": 4, "guidance": 1.0, "frames": 16, "size": 64 if self.model == "emoji" else 512, "batch": 1}
        tried = {"steps": self.steps, "guidance": self.guidance, "frames": self.frames, "size": sizes}
        tried["batch"] = self.batches
        changed = [usual | {name: value} for name, values in tried.items() for value in values]
        return [Case(**case) for i, case in enumerate([usual, *changed]) if case not in [usual, *changed][:i]]


def main(sweep: Sweep) -> None:
    device = best_device() if sweep.device == "auto" else sweep.device
    model = inference.subject(sweep.model, device, best_dtype(sweep.precision, device))
    reports: list[dict[str, Any]] = []
    for case in sweep.cases():
        try:
            reports.append(inference.compare(model, case, rounds=sweep.rounds, compiled=sweep.compiled))
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            print(f"left out, out of memory: {case}")
            continue
        print(inference.table(reports[-1]), end="\n\n")
        if sweep.out is not None:
            with sweep.out.open("a") as file:
                file.write(json.dumps(reports[-1]) + "\n")
    print(summary(reports))


def summary(reports: list[dict[str, Any]]) -> str:
    """A markdown table, a line a case."""
    lines = [
        "| steps | guidance | frames | size | batch | ours, s | diffusers, s | denoise x | decode x | of machine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        case, seconds = report["case"], report["seconds"]["denoise"]
        lines.append(
            f"| {case['steps']} | {case['guidance']:g} | {case['frames']} | {case['size']} | {case['batch']} "
            f"| {seconds['ours']['median']:.3f} | {seconds['diffusers']['median']:.3f} "
            f"| {report['denoise_speedup_vs_diffusers']:.2f} | {report['decode_speedup_vs_diffusers']:.2f} "
            f"| {report['share_of_machine']['denoise']['ours']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Sweep, description=__doc__))
