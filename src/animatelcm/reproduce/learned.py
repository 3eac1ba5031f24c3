"""Claims about how models learn: the ablations, adapters without a teacher, and what takes a teacher's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from animatelcm import recipes
from animatelcm.config import TrainConfig
from animatelcm.evaluate.report import Row, table
from animatelcm.model_source import ModelSource
from animatelcm.planning import plan
from animatelcm.reproduce import bias, plots
from animatelcm.reproduce.claims import Claim, Section, excess, nearer, paired_text
from animatelcm.reproduce.study import Study


def _stage_1(study: Study) -> TrainConfig:
    """On as many pictures as it takes: each is encoded beforehand."""
    config, steps = recipes.image_lcm_emoji(), study.sizes.image_steps
    data = replace(config.data, length=steps * config.batch_size)
    return replace(config, name="image", model="emoji", data=data, steps=steps)


def _stage_2(study: Study, name: str, model: str, *, degrade: bool) -> TrainConfig:
    config = recipes.video_lcm_emoji()
    data = replace(config.data, length=min(1000, 8 * study.sizes.video_steps), degrade=degrade)
    return replace(config, name=name, model=model, data=data, steps=study.sizes.video_steps)


def _coupled(study: Study, name: str, *, degrade: bool) -> TrainConfig:
    """LoRA and temporal layers together on videos, for as many operations as both stages have."""
    first, second = _stage_1(study), _stage_2(study, "full", "emoji", degrade=degrade)
    config = recipes.video_lcm_coupled_emoji()
    config = replace(second, name=name, lora=config.lora, consistency=config.consistency)
    operations = sum(stage.steps * plan(stage).flops for stage in (first, second))
    return replace(config, steps=round(operations / plan(config).flops))


def ablations(study: Study) -> Section:
    """Figure 5: without decoupling, without the initialisation strategy; degraded videos and clean images."""
    image = study.trained(_stage_1(study)).model
    full = _stage_2(study, "full", image, degrade=True)
    direct = replace(full, name="direct", consistency=replace(full.consistency, init="direct"))
    coupled = _coupled(study, "coupled", degrade=True)
    settings = ["lcm@1", "lcm@4"]
    sources = {config.name: study.trained(config) for config in (full, direct, coupled)}
    clips = study.sizes.ablation_clips
    rows = {name: study.rows(f"ablation_{name}", source, settings, clips=clips) for name, source in sources.items()}
    four = {name: (f"ablation_{name}", found[settings.index("lcm@4")]) for name, found in rows.items()}
    n = four["full"][1].n
    decoupled, beside_coupled = _held(study, four["full"], four["coupled"])
    averaged, beside_direct = _held(study, four["full"], four["direct"])
    claims = [
        Claim(
            claim="learning the acceleration of images first, then that of motion, beats learning both on videos",
            source="first paper, figure 5; second paper, section 4",
            paper="FVD 985.9 against 1060.6, CLIPSIM 27.7 against 18.8, after 4 + 4 and 8 hours",
            ours=beside_coupled,
            holds=decoupled,
            n=n,
            note=f"{study.sizes.image_steps} x 32 images and {full.steps} x 4 clips against {coupled.steps} x 4 clips: "
            "equal operations; the videos are degraded, the images clean",
        ),
        Claim(
            claim="a target that receives the image LoRA by averaging beats one that has it from the start",
            source="first paper, figure 5; the summary's first check",
            paper="a curve without numbers",
            ours=beside_direct,
            holds=averaged,
            n=n,
        ),
    ]
    runs = {name: study.out / "runs" / name / "metrics.jsonl" for name in ("full", "direct", "coupled")}
    plots.losses(study.out / "ablation-losses.png", runs)
    plots.few_steps(study.out / "ablations.png", rows, None)
    text = "\n\n".join(f"`{name}`:\n\n{table(found)}" for name, found in rows.items())
    sheet = study.sheet("ablation-clips", {name: (source, "lcm@4") for name, source in sources.items()})
    return Section(title="Ablations", claims=claims, text=text, plots=["ablations.png", "ablation-losses.png", sheet])


def _held(study: Study, first: tuple[str, Row], second: tuple[str, Row]) -> tuple[bool | None, str]:
    """Whether the first row is nearer to real clips than the second, and what is said of both."""
    pair, ours, other = study.less(first, second), first[1], second[1]
    text = (
        f"{excess(ours):.0f} against {excess(other):.0f}; subjects {ours.concept_accuracy:.0%} against "
        f"{other.concept_accuracy:.0%}; {paired_text(pair, 'fvd_like', 'concept_accuracy')}"
    )
    return nearer(pair), text


def images_first(study: Study) -> Section:
    """The summary's third check: with and without the image stage, on the same clean data."""
    image = study.trained(_stage_1(study)).model
    pair = _stage_2(study, "clean_full", image, degrade=False), _coupled(study, "clean_coupled", degrade=False)
    settings = ["lcm@1", "lcm@4"]
    names = [f"ablation_{config.name}" for config in pair]
    clips = study.sizes.ablation_clips
    first, scratch = (
        study.rows(name, study.trained(config), settings, clips=clips) for name, config in zip(names, pair, strict=True)
    )
    at = settings.index("lcm@4")
    holds, ours = _held(study, (names[0], first[at]), (names[1], scratch[at]))
    claim = Claim(
        claim="what was learned on images is worth its time on clean videos too",
        source="the summary's third check (images first against from scratch)",
        paper="not measured there",
        ours=ours,
        holds=holds,
        n=first[at].n,
        note="equal operations",
    )
    text = f"Images first:\n\n{table(first)}\n\nFrom scratch:\n\n{table(scratch)}"
    return Section(title="Images first, or from scratch", claims=[claim], text=text)


def adaptation(study: Study) -> Section:
    """Figure 6: an adapter of edges used on videos as it is, and made fit for them with and without a teacher."""
    free = recipes.t2i_adapter_lora_emoji()
    free = replace(
        free,
        name="adapter_free",
        model="emoji",
        steps=study.sizes.adapter_steps,
        data=replace(free.data, length=min(1000, 8 * study.sizes.adapter_steps)),
        consistency=replace(free.consistency, earlier="noise", feedback=0.0, k=100),
    )
    half = max(1, free.steps // 2)  # four evaluations a step in place of two

    def led_by(earlier: Literal["teacher", "guided-noise"]) -> TrainConfig:
        led = replace(free.consistency, earlier=earlier, w_min=1.0, w_max=3.0)
        return replace(free, name=f"adapter_{earlier}", steps=half, consistency=led)

    sources = {
        "as it is": ModelSource(),
        "without a teacher": study.trained(free),
        "guided by the image model": study.trained(led_by("guided-noise")),
        "with a teacher": study.trained(led_by("teacher")),
    }

    def folder(name: str) -> str:
        return f"adapter {name}".replace(" ", "_")

    rows = {name: study.rows(folder(name), source, ["lcm@4"], steer="edge")[0] for name, source in sources.items()}
    before, after, led, taught = rows.values()
    assert before.control_error is not None
    assert after.control_error is not None
    change = 1 - after.control_error / before.control_error
    pair = study.less((folder("without a teacher"), after), (folder("as it is"), before))
    claims = [
        Claim(
            claim="adapters of the image model steer few-step videos as they are",
            source="first paper, section 4.3 and figure 6",
            paper="shown in pictures",
            ours=f"{before.motion_accuracy:.0%} of clips show the motion of the edges, 1 - F1 of edges "
            f"{before.control_error:.3f}",
            holds=(before.motion_accuracy or 0) > 0.75,
            n=before.n,
        ),
        Claim(
            claim="adaptation without a teacher makes them keep to details",
            source="first paper, section 4.3 and figure 6",
            paper="shown in pictures; the aim here is a quarter less error",
            ours=f"error {before.control_error:.3f} to {after.control_error:.3f} ({-change:+.0%}), subjects "
            f"{before.concept_accuracy:.0%} to {after.concept_accuracy:.0%}; "
            + paired_text(pair, "control_error", "concept_accuracy"),
            holds=change >= 0.25,
            n=before.n,
            note=f"at equal operations, with a teacher {taught.control_error:.3f} and {taught.concept_accuracy:.0%}, "
            "with the image model's guidance in the clip's noise "
            f"{led.control_error:.3f} and {led.concept_accuracy:.0%}",
        ),
    ]
    lines = "\n\n".join(f"{name}:\n\n{table([row])}" for name, row in rows.items())
    sheet = study.sheet("adapter-clips", {name: (source, "lcm@4") for name, source in sources.items()}, steer="edge")
    return Section(title="Adapters without a teacher", claims=claims, text=lines, plots=[sheet])


def estimate(study: Study) -> Section:
    """The summary's second check: the one-sample estimate beside the teacher's prediction."""
    found = study.measured("bias", partial(bias.measure, min(study.sizes.clips, 32)))
    plots.bias(study.out / "teacher-free-estimate.png", found)
    middle = found["slope_unguided"][len(found["t"]) // 2]
    unbiased = all(abs(slope - 1) < 0.15 for slope in found["slope_unguided"])
    claim = Claim(
        claim="the clip's own noise is an unbiased stand-in for the teacher's prediction",
        source="first paper, eq. 11-12; the summary's second check",
        paper="works well in practice",
        ours=f"slope over the unguided teacher {_span(found['slope_unguided'])} (1: unbiased), over the guided one "
        f"{_span(found['slope_guided'])}",
        holds=unbiased,
        n=found["clips"],
        note=f"unbiased or not, it has no guidance in it; {middle:.2f} in the middle of the timesteps",
    )
    return Section(
        title="The estimate that takes the teacher's place",
        claims=[claim],
        text=bias.table(found),
        plots=["teacher-free-estimate.png"],
    )


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
