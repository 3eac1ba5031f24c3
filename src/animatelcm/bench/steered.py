"""What adapters cost while a clip is denoised, beside text alone: one machine, one run, ours by itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from animatelcm.adapters import IMAGE
from animatelcm.bench import machine, workload
from animatelcm.bench.timing import interleaved
from animatelcm.bench.workload import Case
from animatelcm.condition import Condition, Control
from animatelcm.model import VideoModel


def costs(model: VideoModel, case: Case, *, rounds: int = 9) -> dict[str, Any]:
    """One object with what each adapter of a case costs while a clip is denoised, beside text alone, A B A B.

    ``denoise_times_text_<adapter>`` first: how many times as long as with text alone. ``seconds`` and
    ``peak_bytes_denoise`` have "text" and each adapter beside it; ``weights_bytes`` the model's under "text", and
    each adapter's own. Raises ValueError where the model has no such adapter.
    """
    if unknown := [name for name in case.steer if name not in model.adapters]:
        known = ", ".join(sorted(model.adapters)) or "none"
        raise ValueError(f"{model.facts.name} has no adapter {unknown[0]!r} to steer with; its adapters are: {known}")
    model.forget_graphs()  # of the case before
    conditions = {"text": None} | {name: condition(name, case) for name in case.steer}
    calls = {name: partial(workload.denoised, model, case, seen) for name, seen in conditions.items()}
    with workload.compiled_or_failing(model, wanted=False):
        times = interleaved(calls, rounds=rounds, warmup=workload.warmup(model))
        taken = {name: workload.fresh_memory(model, call).tensors for name, call in calls.items()}
    own = {name: workload.weights([model.adapters[name]]) for name in case.steer}
    return {
        **{f"denoise_times_text_{name}": times[name].median / times["text"].median for name in case.steer},
        **workload.described(model, case),
        "seconds": {"denoise": {name: timing._asdict() for name, timing in times.items()}},
        "peak_bytes_denoise": taken,
        "weights_bytes": {"text": workload.weights(workload.networks(replace(model, adapters={}))), **own},
        "machine": machine.facts(),
    }


def condition(name: str, case: Case) -> Condition:
    """Pixels for an adapter to look at, the same each time."""
    drawn = np.random.default_rng(0).integers(0, 256, (case.frames, case.size, case.size, 3), np.uint8)
    return Condition(image=drawn[0]) if name == IMAGE else Condition(controls=(Control(name, drawn),))
