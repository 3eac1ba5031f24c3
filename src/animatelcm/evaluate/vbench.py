"""VBench (Huang et al. 2024): which videos it wants, and the tool itself in its own environment.

The tool (``pip install vbench``, read here as of 0.1.5) pins an old transformers and numpy below 2, loads pickles and
runs on CUDA alone, so it lives in an environment of its own and is called as a program.

What its results hang on, and what is done about it here:

* It reads a folder's first file to learn the suffix of all: it is shown a folder that holds nothing but the videos.
* It returns 0 also where it failed, and NaN where it found no videos: what counts is a finite number in its results.
* Temporal flickering is measured on videos without motion: ``static_filter`` picks the first 5 of 25 a prompt. It
  needs RAFT's weights and does not fetch them, dynamic degree does: so flickering comes last.
* ``VBench_full_info.json`` holds 946 prompts, two of them twice, and two that differ only in case (A/a fantasy
  landscape): on file systems that know no case the later video replaces the earlier, as it did in published rows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from animatelcm.evaluate.judge import Progress, silent
from animatelcm.evaluate.report import facts_hash, write_json
from animatelcm.evaluate.rows import link
from animatelcm.evaluate.vbench_scores import ALL, DIMENSIONS, RESULTS, read_raw

SAMPLES = 5
"""Videos a prompt, index 0 to 4."""
FLICKERING = "temporal_flickering"
SUITE = "VBench_full_info.json"
FLICKERING_SAMPLES = 25
"""Of which those without motion are kept."""
SETTINGS = {
    "num_frames": 16,
    "height": 512,
    "width": 512,
    "negative_prompt": "bad quality, worse quality, low resolution",
    "prompt_syntax": "plain",
}
"""Of the published AnimateLCM row (VBench's ``sampled_videos/README.md``); its guidance is not said there."""


# What is asked for


class Entry(NamedTuple):
    """One prompt of the suite, the dimensions that it is for, and all that the tool's file says of it."""

    prompt: str
    dimensions: tuple[str, ...]
    facts: dict[str, Any]


def suite(path: Path) -> list[Entry]:
    """The entries of a ``VBench_full_info.json``, or of the folder with it, in its order.

    Raises ValueError where the file is another one, or a prompt cannot be the name of a file.
    """
    path = path / SUITE if path.is_dir() else path
    try:
        entries = [_entry(facts) for facts in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no prompt suite of VBench ({error}); give the {SUITE} that comes with the tool"
        ) from error
    if not entries:
        raise ValueError(f"{path} holds no prompts; give the {SUITE} that comes with the tool")
    return entries


def _entry(facts: Mapping[str, Any]) -> Entry:
    prompt, dimensions = facts["prompt_en"], tuple(facts["dimension"])
    if unknown := set(dimensions) - DIMENSIONS.keys():
        raise ValueError(f"dimension {min(unknown)!r} of {prompt!r} is none of VBench's sixteen")
    if set(prompt) & set("/\0\n") or len(f"{prompt}-00.mp4".encode()) > 255:
        raise ValueError(f"{prompt!r} cannot be the name of a file")
    return Entry(prompt, dimensions, dict(facts))


def names(entry: Entry) -> list[str]:
    """The files that the tool looks for: ``{prompt}-{index}.mp4``."""
    count = FLICKERING_SAMPLES if FLICKERING in entry.dimensions else SAMPLES
    return [f"{entry.prompt}-{index}.mp4" for index in range(count)]


def plan(
    entries: Sequence[Entry],
    seed: int = 0,
    *,
    dimensions: Sequence[str] = ALL,
    settings: Mapping[str, Any] = SETTINGS,
) -> list[dict[str, Any]]:
    """Rows for ``animatelcm batch`` (see ``rows``): file, prompt, seed, settings; each file once.

    The seed is ``seed`` and the file's place among those of the whole suite, so a file has the same one whichever
    dimensions are asked for.
    """
    check_dimensions(dimensions)
    merged: dict[str, set[str]] = {}
    for entry in entries:
        merged.setdefault(entry.prompt, set()).update(entry.dimensions)
    rows, number = [], seed
    for prompt, wanted in merged.items():
        for file in names(Entry(prompt, tuple(wanted), {})):
            if wanted & set(dimensions):
                rows.append({"file": file, "prompt": prompt, "seed": number, **settings})
            number += 1
    return rows


def check_dimensions(dimensions: Sequence[str]) -> None:
    """Raises ValueError for one that VBench does not have, and for none."""
    if unknown := [name for name in dimensions if name not in DIMENSIONS]:
        raise ValueError(f"dimension {unknown[0]!r} is none of VBench's; choose {', '.join(ALL)}")
    if not dimensions:
        raise ValueError(f"no dimension is asked for; choose {', '.join(ALL)}")


def missing(entries: Sequence[Entry], videos: Path, dimensions: Sequence[str] = ALL) -> list[str]:
    """Files that the dimensions want and ``videos`` does not hold: with any, scores do not compare with others'."""
    return [row["file"] for row in plan(entries, dimensions=dimensions) if not (videos / row["file"]).is_file()]


# The tool


def run(
    tool: str | Path,
    entries: Sequence[Entry],
    videos: Path,
    out: Path,
    *,
    dimensions: Sequence[str] = ALL,
    progress: Progress = silent,
) -> Path:
    """Have an installed VBench judge ``videos``; the folder of its results comes back, for ``scores``.

    ``tool`` is the environment's ``vbench`` or ``python``. One dimension after the other, each with a log in
    ``out / "logs"``; ``out / "run.json"`` says what was judged. Raises ValueError where the tool or all videos of a
    dimension are missing, before anything runs, or where a dimension came to no number.
    """
    check_dimensions(dimensions)
    program = find_tool(tool)
    order = sorted(dimensions, key=lambda name: name == FLICKERING)
    present = {name: [file for file in _files(entries, name) if (videos / file).is_file()] for name in order}
    if empty := [name for name in order if not present[name]]:
        example = next(iter(_files(entries, empty[0])), "{prompt}-0.mp4")
        raise ValueError(f"{videos} holds no video for {empty[0]}; they are named like {example!r}")
    for folder in ("logs", "results"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    judged = {}
    for done, (name, files) in enumerate(present.items()):
        progress(f"vbench, {name}", done, len(present))
        asked = [entry.facts for entry in entries if name in entry.dimensions]
        with tempfile.TemporaryDirectory(prefix="vbench-", dir=out) as room:
            _furnish(Path(room), asked, files, videos)
            judged[name] = _judge(program, name, Path(room), out)
    progress("vbench", len(present), len(present))
    about = {"vbench": _version(program), "prompts": facts_hash({"entries": [entry.facts for entry in entries]})}
    lacking = len(missing(entries, videos, dimensions))
    write_json({**about, "judged": judged, "missing": lacking}, out / "run.json")
    return out / "results"


def _files(entries: Sequence[Entry], dimension: str) -> list[str]:
    return [file for entry in entries if dimension in entry.dimensions for file in names(entry)]


def find_tool(tool: str | Path) -> Path:
    """The program of an environment. Raises ValueError where there is none, or a python that knows no VBench."""
    found = shutil.which(tool)
    if found is None:
        raise ValueError(
            f"there is no program {tool}; install VBench in an environment of its own (python -m venv vb; "
            "vb/bin/pip install vbench) and give vb/bin/vbench"
        )
    program = Path(found).absolute()  # and not resolved: an environment's python is a link
    if program.name.startswith("python") and _version(program) == "unknown":
        raise ValueError(f"{tool} knows no VBench; install it there ({tool} -m pip install vbench)")
    return program


def _furnish(room: Path, asked: Sequence[dict[str, Any]], files: Sequence[str], videos: Path) -> None:
    """The suite, and each file once, alone in a folder: linked, or copied where that is not allowed."""
    (room / "suite.json").write_text(json.dumps(asked), encoding="utf-8")
    (room / "videos").mkdir()
    for file in dict.fromkeys(files):
        link(videos / file, room / "videos" / file)


def _judge(program: Path, dimension: str, room: Path, out: Path) -> int:
    """One dimension; how many videos it looked at. In relative names without spaces: the tool hands them to a shell."""
    results, log = out / "results" / dimension, out / "logs" / f"{dimension}.log"
    results.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    for former in results.glob(f"*{RESULTS}"):
        former.unlink()
    shown = "videos"
    if dimension == FLICKERING:
        _call(program, ["static_filter", "--videos_path", shown, "--result_path", "static"], room, log)
        shown = "static/filtered_videos"
    count = sum(1 for _ in (room / shown).glob("*.mp4"))
    if not count:
        raise ValueError(f"VBench found no video without motion for {dimension}: {_last(log)}; see {log}")
    words = ["evaluate", "--dimension", dimension, "--videos_path", shown, "--full_json_dir", "suite.json"]
    _call(program, [*words, "--output_path", f"../results/{dimension}"], room, log)
    if dimension not in read_raw(results):
        raise ValueError(f"VBench came to no result for {dimension}: {_last(log)}; see {log}")
    return count


def _call(program: Path, words: Sequence[str], room: Path, log: Path) -> None:
    """What the tool says goes to the log; its exit status says nothing."""
    through = ["-c", "from vbench.cli.vbench import main; main()"] if program.name.startswith("python") else []
    with log.open("a", encoding="utf-8") as said:
        subprocess.run([program, *through, *words], cwd=room, env=_environment(program), stdout=said, stderr=said)


def _environment(program: Path) -> dict[str, str]:
    """The tool's own ``python`` comes first, which it calls by that name; ours is not passed on."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {**kept, "PATH": f"{program.parent}{os.pathsep}{kept.get('PATH', '')}"}


def _last(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return repr(lines[-1][:200]) if lines else "it said nothing"


def _version(program: Path) -> str:
    """Of the tool, or "unknown"."""
    code = "import importlib.metadata as m; print(m.version('vbench'))"
    python = program if program.name.startswith("python") else program.with_name("python")
    try:
        asked = subprocess.run([python, "-c", code], env=_environment(program), capture_output=True, text=True)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"
