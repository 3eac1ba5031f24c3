"""What verbs share: the model they are asked for, what they say, and the bars they show meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from animatelcm.model_source import ModelSource, Offload, Precision
from animatelcm.request import SampleRequest

if TYPE_CHECKING:
    from animatelcm.model import VideoModel
    from animatelcm.sampling import Preview


@contextmanager
def told(*, quiet: bool) -> Iterator[None]:
    """What the library logs meanwhile, on stderr."""
    import logging

    log, handler = logging.getLogger("animatelcm"), logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def load(
    source: ModelSource,
    device: str,
    *,
    offload: Offload = "none",
    precision: Precision = "fp32",
    keep: bool = True,
    adapters: Collection[str] | None = None,
) -> VideoModel:
    from animatelcm.memory import best_dtype, load_for
    from animatelcm.sampling import best_device

    place = best_device() if device == "auto" else device
    dtype = best_dtype(precision, place)
    return load_for(source, device=place, dtype=dtype, offload=offload, keep=keep, adapters=adapters)


@contextmanager
def step_bar(request: SampleRequest, *, quiet: bool) -> Iterator[Callable[[Preview], None]]:
    """A bar on stderr for the steps of a resolved request."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bar:
        steps = request.num_inference_steps * request.num_videos_per_prompt
        task = bar.add_task(escape(request.prompt), total=steps)
        yield lambda preview: bar.advance(task, len(preview.latents))


@contextmanager
def bars(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr for whatever is being done: (title, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=total)
            bar.update(tasks[title], completed=done, visible=done < total)

        yield show


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
