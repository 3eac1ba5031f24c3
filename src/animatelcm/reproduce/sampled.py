"""Claims about models that are there: few steps, time, and a style whose videos nobody has seen.

FVD-like is ``evaluate.judge``'s; what counts is its excess over other real clips. Concept accuracy stands in for
CLIPSIM: whether a frame shows what the prompt names. Both are of the miniature's own world and of nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median, stdev
from typing import NamedTuple

from animatelcm.assembly import load_sum
from animatelcm.evaluate.judge import Judge, Progress, Protocol
from animatelcm.evaluate.report import Row, table
from animatelcm.model_source import ModelSource
from animatelcm.reproduce import plots
from animatelcm.reproduce.claims import Claim, Section, all_of, by_steps, excess, nearer, share_deviation, verdict
from animatelcm.reproduce.study import Sizes, Study
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample

TEACHER = ModelSource(teacher=True)
SAMPLERS = ("ddim", "dpm++")
"""The baselines."""
SPREAD_SEED = 1004


def deviation(study: Study) -> float:
    """The standard deviation of the FVD-like distance over sets of as many real clips: what cannot be told apart."""
    sizes = study.sizes

    def measure(progress: Progress) -> dict[str, float]:
        protocol = Protocol(clips=sizes.clips, real=sizes.real)
        folder = study.out / "few_steps_ours"
        folder.mkdir(parents=True, exist_ok=True)
        judge, found = Judge(protocol, folder, progress), []
        for number in range(3 if sizes.quick else 6):
            data = protocol.data(SPREAD_SEED + number, sizes.clips)
            found.append(judge.fvd_like([data[i].frames for i in range(sizes.clips)]))
        return {"deviation": stdev(found), "sets": len(found)}

    return study.measured("deviation", measure)["deviation"]


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
    deviation: float
    """Of an FVD-like distance."""


def few_steps(study: Study) -> Section:
    """Table 1: DDIM, DPM++ and the distilled model at a few steps each, and the teacher at many."""
    found = _measured(study)
    near = {"DDIM": found.near["ddim"], "DPM++": found.near["dpm++"]}
    file = "few-steps.png"
    plots.few_steps(study.out / file, {"distilled": found.ours, **near}, found.teacher, found.deviation)
    many = f"{study.sizes.teacher_steps} guided steps"
    shown = {f"{n} evaluation{'s' * (n > 1)}": (ModelSource(), f"lcm@{n}") for n in study.sizes.steps}
    sheet = study.sheet("few-steps-clips", {**shown, many: (TEACHER, found.teacher.setting)})
    claims, text = _claims(found, study.sizes), _text(found, study.sizes)
    return Section(title="Few steps", claims=claims, text=text, plots=[file, sheet])


def _measured(study: Study) -> FewSteps:
    sizes = study.sizes
    ours = study.rows("few_steps_ours", ModelSource(), [f"lcm@{n}" for n in sizes.steps])
    grid = [
        f"{sampler}@{steps}{f':{guidance:g}' if guidance != 1 else ''}/trailing"
        for sampler in SAMPLERS
        for steps in sizes.steps
        for guidance in sizes.guidances
    ]
    *few, teacher = study.rows("few_steps_teacher", TEACHER, [*grid, f"ddim@{sizes.teacher_steps}:4"])
    tried = {sampler: [[row for row in few if _is_of(row, sampler, n)] for n in sizes.steps] for sampler in SAMPLERS}
    return FewSteps(
        ours=ours,
        near={sampler: [max(rows, key=_nearness) for rows in each] for sampler, each in tried.items()},
        naming={sampler: [max(rows, key=_subjects) for rows in each] for sampler, each in tried.items()},
        equal=[[other for other in few if other.evaluations == row.evaluations] for row in ours],
        teacher=teacher,
        deviation=deviation(study),
    )


def _claims(found: FewSteps, sizes: Sizes) -> list[Claim]:
    ours, teacher = found.ours, found.teacher
    (ddim, dpm), named = found.near.values(), [by_steps(rows, "concept_accuracy") for rows in found.naming.values()]
    four, steps = ours[sizes.steps.index(4)], " / ".join(map(str, sizes.steps))
    equal = [_bests(found.equal, figure, scale) for figure, scale in ((_nearness, -1), (_subjects, 100))]
    falls = [nearer(b, a, found.deviation) for a, b in pairwise(ours)]
    better = False if False in falls else True in falls or None
    return [
        Claim(
            claim=f"nearer to real videos than DDIM and DPM++ at {steps} steps",
            source="both papers, table 1 (FVD)",
            paper="1257 / 1081 / 926 / 910 against DDIM 4941 / 3219 / 1945 / 1210, DPM++ 2731 / 2093 / 1044 / 932",
            ours=f"{by_steps(ours)} against DDIM {by_steps(ddim)}, DPM++ {by_steps(dpm)}",
            holds=_are_nearer(found),
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
            holds=_show_more(found),
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


def _are_nearer(found: FewSteps) -> bool | None:
    """Than the better baseline at every number of steps."""
    rivals = zip(*found.near.values(), strict=True)
    best = [min(rows, key=excess) for rows in rivals]
    return all_of([nearer(row, other, found.deviation) for row, other in zip(found.ours, best, strict=True)])


def _show_more(found: FewSteps) -> bool | None:
    """Of what the prompt names than the better baseline at every number of steps."""
    verdicts = []
    for row, *rivals in zip(found.ours, *found.naming.values(), strict=True):
        best = max(rivals, key=_subjects)
        spread = share_deviation(*((other.concept_accuracy, row.n) for other in (row, best)))
        verdicts.append(verdict(row.concept_accuracy - best.concept_accuracy, spread))
    return all_of(verdicts)


def _text(found: FewSteps, sizes: Sizes) -> str:
    baselines = [row for rows in found.near.values() for row in rows]
    chosen = ", ".join(row.setting.split("/")[0] for row in baselines)
    return (
        table([*found.ours, *baselines, found.teacher])
        + f"\n\nBest guidance of {', '.join(f'{g:g}' for g in sizes.guidances)}: {chosen}. "
        f"Sets of {found.ours[0].n} real clips spread by {found.deviation:.0f} (one standard deviation)."
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
    gains = [nearer(b, a, deviation(study)) for a, b in zip(plain, styled, strict=True)]
    four = styled[study.sizes.steps.index(4)]
    claim = Claim(
        claim="a personal style, learned from images alone, brings videos nearer to those of that style",
        source="both papers, table 1 (realistic style) and figure 4",
        paper="1072 / 791 / 930 / 1082 against 1257 / 1081 / 926 / 910 without",
        ours=f"{by_steps(styled)} against {by_steps(plain)} without",
        holds=False if False in gains else True in gains or None,
        n=four.n,
        note="twemoji; rendered clips of the style exist as this truth alone",
    )
    kept = [
        verdict(
            b.concept_accuracy - a.concept_accuracy + 0.05,
            share_deviation((a.concept_accuracy, a.n), (b.concept_accuracy, b.n)),
        )
        for a, b in zip(plain, styled, strict=True)
    ]
    subjects = Claim(
        claim="and keeps what the prompt names",
        source="first paper, figure 4",
        paper="shown in pictures",
        ours=f"{by_steps(styled, 'concept_accuracy')} % of frames, {by_steps(plain, 'concept_accuracy')} without",
        holds=all_of(kept),
        n=four.n,
        note="the aim is five points less at most",
    )
    shown = {"without the style": (ModelSource(), "lcm@4"), "with it": (ModelSource(style=("twemoji",)), "lcm@4")}
    sheet = study.sheet("style-clips", shown, style_truth="twemoji")
    text = table([*plain, *styled])
    return Section(title="A style without its videos", claims=[claim, subjects], text=text, plots=[sheet])
