"""The page of a reproduction: every claim on one line, then what is behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from animatelcm.evaluate import emoji
from animatelcm.evaluate.report import write_json
from animatelcm.reproduce.claims import Section, claims_table, to_json
from animatelcm.reproduce.learned import ablations, adaptation, estimate, images_first
from animatelcm.reproduce.sampled import few_steps, speed, style
from animatelcm.reproduce.study import Study

LOG = logging.getLogger(__name__)
TITLE = "The papers' claims on the miniature"
QUICK = "**A quick run: everything ran, and its figures mean nothing.** Leave `--quick` out for some that do.\n"

EXPERIMENTS: tuple[Callable[[Study], Section], ...] = (
    few_steps,
    speed,
    style,
    ablations,
    adaptation,
    estimate,
    images_first,
)
"""In the order of the page."""


def reproduce(study: Study) -> Path:
    """Run every experiment that has not run yet, and write ``reproduction.md`` and ``claims.json`` after each.

    Raises ValueError where ``study.out`` holds a reproduction of other sizes.
    """
    study.begin()
    sections: list[Section] = []
    for experiment in EXPERIMENTS:
        LOG.info("%s", (experiment.__doc__ or "").splitlines()[0])
        sections.append(experiment(study))
        path = write(study, sections)
    return path


def write(study: Study, sections: list[Section]) -> Path:
    """The page of what is there so far."""
    claims = [claim for section in sections for claim in section.claims]
    write_json(
        to_json(TITLE + (" (quick: no figures)" if study.sizes.quick else ""), claims), study.out / "claims.json"
    )
    spent = study.seconds()
    versions = ", ".join(f"{name} {version}" for name, version in emoji.versions().items())
    parts = [f"# {TITLE}\n", *([QUICK] if study.sizes.quick else []), claims_table(claims)]
    for section in sections:
        parts.append(f"## {section.title}\n")
        parts += [f"![{section.title}]({name})\n" for name in section.plots]
        parts += [f"{section.text.strip()}\n"] if section.text else []
    parts.append("## What it took\n")
    lines = "".join(f"| {what} | {seconds:,.0f} |\n" for what, seconds in spent.items())
    parts.append(f"| | s |\n|---|--:|\n{lines}| all | {sum(spent.values()):,.0f} |\n")
    parts.append(f"Seeds: prompt i is sampled with seed i; training runs have seed 0. {versions}.\n")
    path = study.out / "reproduction.md"
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text("\n".join(parts), encoding="utf-8")
    unfinished.replace(path)
    return path
