"""Claims about models that are there: few steps, time, and a style whose videos nobody has seen.

FVD-like is ``evaluate.judge``'s; what counts is its excess over other real clips. Concept accuracy stands in for
CLIPSIM: whether a frame shows what the prompt names. Both are of the miniature's own world and of nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from animatelcm.assembly import load_sum
from animatelcm.evaluate.judge import Progress
from animatelcm.evaluate.paired import Pair, pair_table
from animatelcm.evaluate.report import Row, table
from animatelcm.model_source import ModelSource
from animatelcm.reproduce import plots
from animatelcm.reproduce.claims import Claim, Section, all_of, by_steps, excess, nearer, shows_more, some_of
from animatelcm.reproduce.study import Sizes, Study
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample

TEACHER = ModelSource(teacher=True)
SAMPLERS = ("ddim", "dpm++")
"""The baselines."""
OURS, TAUGHT = "few_steps_ours", "few_steps_teacher"


class FewSteps(NamedTuple):
    """Rows of table 1, a list in the order of ``Sizes.steps``; a baseline is at its best guidance for each figure."""

    ours: list[Row]
    near: dict[str, list[Row]]
    """Sampler -> its rows that are nearest to real videos."""
    naming: dict[str, list[Row]]
    """Sampler -> its rows that show most often what the prompt names."""
    equal: list[list[Row]]
    """Rows of both samplers with as many evaluations as ours."""
    teacher: Row
    """Many guided steps."""
    nearest: list[Pair]
    """Ours less the better of ``near`` at as many steps."""
    most: list[Pair]
    """Ours less the better of ``naming``."""
    later: list[Pair]
    """Each of ours but the first less the one before it."""


def few_steps(study: Study) -> Section:
    """Table 1: DDIM, DPM++ and the distilled model at a few steps each, and the teacher at many."""
    found = _measured(study)
    near = {"DDIM": found.near["ddim"], "DPM++": found.near["dpm++"]}
    file = "few-steps.png"
    plots.few_steps(study.out / file, {"distilled": found.ours, **near}, found.teacher)
    many = f"{study.sizes.teacher_steps} guided steps"
    shown = {f"{n} evaluation{'s' * (n > 1)}": (ModelSource(), f"lcm@{n}") for n in study.sizes.steps}
    sheet = study.sheet("few-steps-clips", {**shown, many: (TEACHER, found.teacher.setting)})
    claims, text = _claims(found, study.sizes), _text(found, study.sizes)
    return Section(title="Few steps", claims=claims, text=text, plots=[file, sheet])


def _measured(study: Study) -> FewSteps:
    sizes = study.sizes
    ours = study.rows(OURS, ModelSource(), [f"lcm@{n}" for n in sizes.steps])
    grid = [
        f"{sampler}@{steps}{f':{guidance:g}' if guidance != 1 else ''}/trailing"
        for sampler in SAMPLERS
        for steps in sizes.steps
        for guidance in sizes.guidances
    ]
    *few, teacher = study.rows(TAUGHT, TEACHER, [*grid, f"ddim@{sizes.teacher_steps}:4"])
    tried = {sampler: [[row for row in few if _is_of(row, sampler, n)] for n in sizes.steps] for sampler in SAMPLERS}
    near = {sampler: [max(rows, key=_nearness) for rows in each] for sampler, each in tried.items()}
    naming = {sampler: [max(rows, key=_subjects) for rows in each] for sampler, each in tried.items()}

    def less(best: Sequence[Row]) -> list[Pair]:
        return [study.less((OURS, row), (TAUGHT, other)) for row, other in zip(ours, best, strict=True)]

    return FewSteps(
        ours=ours,
        near=near,
        naming=naming,
        equal=[[other for other in few if other.evaluations == row.evaluations] for row in ours],
        teacher=teacher,
        nearest=less([max(rows, key=_nearness) for rows in zip(*near.values(), strict=True)]),
        most=less([max(rows, key=_subjects) for rows in zip(*naming.values(), strict=True)]),
        later=[study.less((OURS, row), (OURS, before)) for before, row in pairwise(ours)],
    )


def _claims(found: FewSteps, sizes: Sizes) -> list[Claim]:
    ours, teacher = found.ours, found.teacher
    (ddim, dpm), named = found.near.values(), [by_steps(rows, "concept_accuracy") for rows in found.naming.values()]
    four, steps = ours[sizes.steps.index(4)], " / ".join(map(str, sizes.steps))
    equal = [_bests(found.equal, figure, scale) for figure, scale in ((_nearness, -1), (_subjects, 100))]
    better = some_of([nearer(pair) for pair in found.later])
    return [
        Claim(
            claim=f"nearer to real videos than DDIM and DPM++ at {steps} steps",
            source="both papers, table 1 (FVD)",
            paper="1257 / 1081 / 926 / 910 against DDIM 4941 / 3219 / 1945 / 1210, DPM++ 2731 / 2093 / 1044 / 932",
            ours=f"{by_steps(ours)} against DDIM {by_steps(ddim)}, DPM++ {by_steps(dpm)}",
            holds=all_of([nearer(pair) for pair in found.nearest]),
            n=four.n,
            note="FVD-like over the floor; each baseline at its best guidance, where the papers take 7.5. "
            f"Guidance doubles evaluations: with as many as ours, the better one has {equal[0]}",
        ),
        Claim(
            claim=f"shows what the prompt names more often than both, at {steps} steps",
            source="both papers, table 1 (CLIPSIM)",
            paper="22.2 / 26.0 / 28.9 / 30.0 against DDIM 4.4 / 5.3 / 14.9 / 24.4, DPM++ 10.5 / 18.0 / 26.8 / 29.5",
            ours=f"{by_steps(ours, 'concept_accuracy')} % of frames against {named[0]} and {named[1]}, each "
            "at the guidance that suits this best",
            holds=all_of([shows_more(pair) for pair in found.most]),
            n=four.n,
            note=f"with as many evaluations as ours, the better one has {equal[1]}",
        ),
        Claim(
            claim="more steps are better",
            source="both papers, table 1",
            paper="1257 > 1081 > 926 > 910",
            ours=by_steps(ours),
            holds=better,
            n=four.n,
            note="no step is worse, one at least is better, beyond chance" if better else "",
        ),
        Claim(
            claim="four evaluations without guidance keep the quality of many with it",
            source="first paper, abstract and section 5",
            paper="shown in pictures",
            ours=f"{excess(four):.0f} against {excess(teacher):.0f} of {sizes.teacher_steps} guided steps",
            holds=excess(four) <= 1.25 * excess(teacher),
            n=four.n,
            note="the aim is a quarter more at most",
        ),
    ]


def _text(found: FewSteps, sizes: Sizes) -> str:
    baselines = [row for rows in found.near.values() for row in rows]
    chosen = ", ".join(row.setting.split("/")[0] for row in baselines)
    pairs = [*found.nearest, *found.most, *found.later]
    once = {(pair.first.setting, pair.second.setting): pair for pair in pairs}
    return (
        table([*found.ours, *baselines, found.teacher])
        + f"\n\nBest guidance of {', '.join(f'{g:g}' for g in sizes.guidances)}: {chosen}. "
        "It was chosen by these same clips, which favours it.\n\n"
        "Ours less the baseline that is nearer, or shows more, at as many steps, and each of ours less the one before "
        f"it:\n\n{pair_table(list(once.values()))}"
    )


def _is_of(row: Row, sampler: str, steps: int) -> bool:
    return re.split("[:/]", row.setting)[0] == f"{sampler}@{steps}"


def _nearness(row: Row) -> float:
    return -excess(row)


def _subjects(row: Row) -> float:
    return row.concept_accuracy


def _bests(groups: Sequence[Sequence[Row]], figure: Callable[[Row], float], scale: float) -> str:
    """The best figure of each group of rows, scaled, "-" where there are none."""
    return " / ".join(f"{scale * max(map(figure, rows)):.0f}" if rows else "-" for rows in groups)


def speed(study: Study) -> Section:
    """25 times fewer evaluations, and the time that they take."""
    rounds = study.sizes.rounds

    def measure(progress: Progress) -> dict[str, list[float]]:
        fast, slow = (load_sum(source, device=study.place) for source in (ModelSource(), TEACHER))
        found: dict[str, list[float]] = {"fast": [], "slow": []}
        for number in range(rounds + 1):
            progress("time", number, rounds + 1)
            for name, model, steps, guidance in (("fast", fast, 4, 1.0), ("slow", slow, 50, 7.5)):
                request = SampleRequest(
                    prompt="a parrot", num_inference_steps=steps, guidance_scale=guidance, seed=number
                )
                (made,) = sample(model, request)
                found[name].append(made.seconds["denoise"])
        return {name: values[1:] for name, values in found.items()}  # the first one warms up

    found = study.measured("speed", measure)
    fast, slow = median(found["fast"]), median(found["slow"])
    claim = Claim(
        claim="4 evaluations in place of 100 are 25 times less work, and nearly as much less time",
        source="second paper, section 4 (A800, fp16, without the autoencoder)",
        paper="23,564 ms / 963 ms = 24.47",
        ours=f"{1000 * slow:,.0f} ms / {1000 * fast:,.0f} ms = {slow / fast:.1f}",
        holds=slow / fast >= 20,
        n=rounds,
        note="16 frames of 64x64, medians; both in one process, in turn",
    )
    text = f"4 evaluations without guidance against 50 steps with guidance 7.5: medians of {rounds} each, in turn."
    return Section(title="Time", claims=[claim], text=text)


def style(study: Study) -> Section:
    """Videos in a style that was learned from still images."""
    settings = [f"lcm@{n}" for n in study.sizes.steps]
    plain = study.rows("style_without", ModelSource(), settings, style_truth="twemoji")
    styled = study.rows("style_with", ModelSource(style=("twemoji",)), settings, style_truth="twemoji")
    pairs = [study.less(("style_with", b), ("style_without", a)) for a, b in zip(plain, styled, strict=True)]
    four = styled[study.sizes.steps.index(4)]
    claim = Claim(
        claim="a personal style, learned from images alone, brings videos nearer to those of that style",
        source="both papers, table 1 (realistic style) and figure 4",
        paper="1072 / 791 / 930 / 1082 against 1257 / 1081 / 926 / 910 without",
        ours=f"{by_steps(styled)} against {by_steps(plain)} without",
        holds=some_of([nearer(pair) for pair in pairs]),
        n=four.n,
        note="twemoji; rendered clips of the style exist as this truth alone",
    )
    subjects = Claim(
        claim="and keeps what the prompt names",
        source="first paper, figure 4",
        paper="shown in pictures",
        ours=f"{by_steps(styled, 'concept_accuracy')} % of frames, {by_steps(plain, 'concept_accuracy')} without",
        holds=all_of([shows_more(pair, margin=0.05) for pair in pairs]),
        n=four.n,
        note="the aim is five points less at most",
    )
    shown = {"without the style": (ModelSource(), "lcm@4"), "with it": (ModelSource(style=("twemoji",)), "lcm@4")}
    sheet = study.sheet("style-clips", shown, style_truth="twemoji")
    text = f"{table([*plain, *styled])}\n\nWith the style less without it:\n\n{pair_table(pairs)}"
    return Section(title="A style without its videos", claims=[claim, subjects], text=text, plots=[sheet])
