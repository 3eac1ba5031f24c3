"""Folders as evaluations and batches leave them, made without a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from animatelcm import video
from animatelcm.evaluate.report import Row, facts_hash, row_path, summary, write_json, write_row
from animatelcm.model_source import ModelSource
from animatelcm.provenance import recipe
from animatelcm.request import SampleRequest

FACTS = {"metric": "emoji", "counts": {"clips": 4, "real": 16}, "styles": ["a", "b", "c"], "sheet": ""}
ROW = Row(
    model="emoji",
    fingerprint="f1",
    protocol=facts_hash(FACTS),
    kind="clips",
    setting="lcm@4",
    n=4,
    evaluations=4,
    seconds=0.25,
    concept_accuracy=0.75,
    named=2,
    motion_accuracy=0.5,
    motion_amount=1.1,
    fvd_like=150.0,
    fvd_floor=50.0,
    hardware="a machine",
    missed_concepts={"bus -> automobile": 3},
)
STUDIED = replace(
    ROW,
    n=64,
    motion_accuracy=0.9,
    fvd_like=600.0,
    fvd_floor=450.0,
    control_error=0.2,
    intervals={"fvd_like": (580.0, 640.0)},
)
"""One of a study's, with an interval."""


def request(prompt: str, *, seed: int = 0, steps: int = 4) -> SampleRequest:
    """A resolved one."""
    size = {"num_frames": 16, "height": 64, "width": 64}
    return SampleRequest(prompt=prompt, seed=seed, num_inference_steps=steps, guidance_scale=1.0, sampler="lcm", **size)


def clip(path: Path, asked: SampleRequest | None = None) -> Path:
    """Two seconds of a square that goes round on a grey ground; with the recipe of what was asked."""
    frames = np.full((16, 64, 64, 3), 200, np.uint8)
    for i, frame in enumerate(frames):
        angle = 2 * np.pi * i / 16
        y, x = (round(28 + 20 * part) for part in (np.sin(angle), np.cos(angle)))
        frame[y : y + 8, x : x + 8] = (20, 90, 160)
    told = recipe(asked, ModelSource(), "0") if asked else {}
    return video.write(frames, path, fps=8, metadata=told)


def batch(folder: Path, prompts: Sequence[str], steps: Sequence[int] = (1, 4)) -> Path:
    """A prompt a line with a seed of its own, in as many settings; all show the same square."""
    folder.mkdir(parents=True)
    lines, made = [], {}
    for seed, prompt in enumerate(prompts):
        for each in steps:
            asked = request(prompt, seed=seed, steps=each)
            path = folder / f"{len(lines):06}.mp4"
            if len(prompts) > 20 and each in made:
                shutil.copyfile(made[each], path)  # of other words, which many clips need not have
            else:
                made[each] = clip(path, asked)
            record = {"row": len(lines), "file": path.name, "prompt": prompt, "seed": seed, "settings": asdict(asked)}
            lines.append(json.dumps({**record, "seconds": {"denoise": 0.5, "decode": 0.25}}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def evaluation(folder: Path, rows: Sequence[Row], facts: Mapping = FACTS, kept: Sequence[str] = ()) -> Path:
    """Rows and their report; of kept prompts a clip in each row's setting."""
    for row in rows:
        write_row(row, row_path(folder, row.kind, row.setting))
    write_json(summary(rows, facts, {"torch": "2"}), folder / "report.json")
    records = []
    for row in rows if kept else ():
        for seed, prompt in enumerate(kept):
            name = f"{row.setting.replace(':', '-')}/{row.kind}-{seed:03}.mp4"
            clip(folder / "clips" / name, request(prompt, seed=seed))
            about = {"setting": row.setting, "kind": row.kind, "seconds": 0.5, "command": "animatelcm generate"}
            records.append(json.dumps({"file": name, "prompt": prompt, "seed": seed, **about}))
    if records:
        (folder / "clips" / "clips.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    return folder


def rows(*settings: str, protocol: str = ROW.protocol, model: str = "emoji") -> list[Row]:
    """A row of each setting, with figures of its own."""
    return [
        replace(ROW, setting=text, protocol=protocol, model=model, evaluations=2**i, fvd_like=300.0 / 2**i)
        for i, text in enumerate(settings)
    ]
