"""Ours beside diffusers over steps, guidance, frames, sizes and batches, on the same weights.

    python benchmarks/inference.py --model emoji                      # a CPU, minutes
    python benchmarks/inference.py --model sd15-random --compiled     # a GPU

Each case is ``animatelcm bench``'s: one process, A B A B, medians. A line of JSON a case goes to ``--out``, and the
same command goes on behind it; the table comes at the end. Cases that memory does not suffice for, or whose network
Dynamo compiles too often, are told and left out: their line has no figures, but says why (``left_out``).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from animatelcm.bench import comparison, machine, tables, workload
from animatelcm.bench.workload import Case, Subject
from animatelcm.memory import best_dtype
from animatelcm.model import VideoModel
from animatelcm.model_source import Precision
from animatelcm.sampling import best_device

SIZES: dict[Subject, tuple[int, ...]] = {"emoji": (64, 128), "sd15-random": (256, 512, 768)}
Row = dict[str, Any]


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
    """Also diffusers' network under torch.compile, anew for each case."""
    device: str = "auto"
    precision: Precision = "auto"
    out: Path | None = None
    """A file for a line of JSON a case. Cases that it has of this model, precision and machine are not measured
    again."""
    minutes: float | None = None
    """Begin no case after so many."""

    def cases(self) -> list[Case]:
        """The usual case, and each neighbour of it once."""
        sizes = self.sizes or SIZES[self.model]
        usual = {"steps": 4, "guidance": 1.0, "frames": 16, "size": 64 if self.model == "emoji" else 512, "batch": 1}
        tried = {"steps": self.steps, "guidance": self.guidance, "frames": self.frames, "size": sizes}
        tried["batch"] = self.batches
        changed = [usual | {name: value} for name, values in tried.items() for value in values]
        return [Case(**case) for i, case in enumerate([usual, *changed]) if case not in [usual, *changed][:i]]


def main(sweep: Sweep) -> None:
    began = time.monotonic()
    device = best_device() if sweep.device == "auto" else sweep.device
    dtype, here = best_dtype(sweep.precision, device), machine.facts()
    about = {
        "model": sweep.model,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": sweep.compiled,
        "machine": here,
    }
    cases = {_key(about | {"case": asdict(case)}): case for case in sweep.cases()}
    rows = {_key(row): row for row in _written(sweep.out)}
    rows = {key: rows[key] for key in cases if key in rows}
    waiting = [key for key in cases if key not in rows]
    if sweep.out is not None:
        sweep.out.parent.mkdir(parents=True, exist_ok=True)
    model = workload.subject(sweep.model, device, dtype) if waiting else None
    while waiting and (sweep.minutes is None or time.monotonic() - began < 60 * sweep.minutes):
        case = cases[key := waiting.pop(0)]
        report = measured(model, case, rounds=sweep.rounds, compiled=sweep.compiled)
        said = f"left out, {report}: {case}" if isinstance(report, str) else tables.table(report)
        print(said, end="\n\n", flush=True)
        found = {"case": asdict(case), "left_out": report} if isinstance(report, str) else report
        rows[key] = {**found, **about}
        if sweep.out is not None:
            with sweep.out.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
    print(summary([rows[key] for key in cases if key in rows and "left_out" not in rows[key]]))
    if waiting:
        print(f"{len(waiting)} of {len(cases)} cases are left; with --out the same line goes on")


def measured(model: VideoModel, case: Case, **options: Any) -> Row | str:  # noqa: ANN401 - those of compare
    """A case's report, or why there is none."""
    try:
        return workload.fitting(partial(comparison.compare, model, case, **options)) or "out of memory"
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        return "compiled too often"


def _written(out: Path | None) -> list[Row]:
    if out is None or not out.is_file():
        return []
    return [json.loads(line) for line in out.read_text().splitlines()]


def _key(row: Row) -> str:
    """What a row is of."""
    place = torch.device(row["device"]).type, row["machine"]["gpu"] or row["machine"]["cpu"]
    return json.dumps([row["model"], *place, row["dtype"], row.get("compiled"), row["case"]])


def summary(reports: list[Row]) -> str:
    """A markdown table, a line a case: MiB are those of weights and tensors from prompt to frames."""
    lines = [
        "| steps | guidance | frames | size | batch | ours, s | diffusers, s | denoise x | compiled x | decode x "
        "| to frames, s | ours, MiB | diffusers, MiB | of machine |",
        "|" + "---|" * 14,
    ]
    for report in reports:
        case, seconds = report["case"], report["seconds"]["denoise"]
        compiled = report.get("denoise_speedup_vs_diffusers_compiled")
        mib = {
            name: (report["weights_bytes"][name] + report["peak_bytes_prompt_to_frames"][name]) / 2**20
            for name in ("ours", "diffusers")
        }
        lines.append(
            f"| {case['steps']} | {case['guidance']:g} | {case['frames']} | {case['size']} | {case['batch']} "
            f"| {seconds['ours']['median']:.3f} | {seconds['diffusers']['median']:.3f} "
            f"| {report['denoise_speedup_vs_diffusers']:.2f} | {'-' if compiled is None else f'{compiled:.2f}'} "
            f"| {report['decode_speedup_vs_diffusers']:.2f} "
            f"| {report['seconds']['prompt_to_frames']['ours']['median']:.3f} "
            f"| {mib['ours']:.0f} | {mib['diffusers']:.0f} "
            f"| {report['share_of_machine']['denoise']['ours']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Sweep, description=__doc__))
