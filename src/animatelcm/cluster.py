"""The rows of a batch on many processes and machines, by Ray: one copy of the model in each actor.

A row that is lost with its actor is made by another one; in its place a new actor starts. Files come back to the
process that asked, which writes them: the machines need no common disk, except for what steers a video.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from animatelcm import batch
from animatelcm.batch import About, Done, Engine, Left, Made, Row
from animatelcm.memory import best_dtype, load_for
from animatelcm.model_source import Compile, ModelSource, Offload, Precision
from animatelcm.sampling import best_device

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

LOG = logging.getLogger(__name__)
TRIES = 3
"""Actors that may die of a row, or in a row while they load the model."""
PATIENCE = 60.0
"""Seconds without any news until the log says what is waited for."""


class Worker:
    """A copy of the model in a process of its own. It is loaded at the first call, so that an error comes as its
    result. ``folder`` is where relative paths begin."""

    def __init__(
        self,
        source: ModelSource,
        folder: str,
        device: str,
        precision: Precision,
        adapters: Collection[str] | None,
        offload: Offload = "auto",
        compiled: Compile = "auto",
    ) -> None:
        with suppress(OSError):
            os.chdir(folder)
        self._source, self._device, self._precision, self._adapters = source, device, precision, adapters
        self._offload, self._compiled = offload, compiled
        self._engine: Engine | None = None

    def about(self) -> About:
        """Load the model, and say what it is."""
        device = best_device() if self._device == "auto" else self._device
        dtype = best_dtype(self._precision, device)
        options = {"dtype": dtype, "offload": self._offload, "adapters": self._adapters}
        model = load_for(self._source, device=device, keep=False, **options)
        model.compile_as(self._compiled)
        self._engine = batch.here(model, self._source, self._offload)
        return batch.about(model)

    def make(self, row: Row, suffix: str) -> Made | Left | str:
        """One row with a resolved request."""
        assert self._engine is not None
        outcomes: list[Made | Left | str] = []
        self._engine([row], suffix, lambda _, outcome: outcomes.append(outcome))
        return outcomes[0]


class Pool:
    """Actors that load, wait or work. Those for which there is no room yet, or whose machine is gone, hold up nobody.

    Raises ValueError where a model cannot be loaded, or is not the same on all machines.
    """

    def __init__(self, start: Callable[[], ActorHandle], count: int) -> None:
        self._start = start
        self._busy: dict[ObjectRef, tuple[ActorHandle, Row | None]] = {}
        self._idle: list[ActorHandle] = []
        self._deaths: Counter[int | None] = Counter()
        self.known: About | None = None
        for _ in range(count):
            self._add()

    def _add(self) -> None:
        actor = self._start()
        self._busy[actor.about.remote()] = (actor, None)

    def wait(self) -> About:
        """Until the first actor has loaded the model."""
        while self.known is None:
            self._step(deque(), lambda *_: None)
        return self.known

    def work(self, rows: Sequence[Row], suffix: str, done: Done) -> None:
        """``batch.Engine``."""
        waiting = deque(rows)
        while waiting or any(row for _, row in self._busy.values()):
            while self._idle and waiting:
                actor, row = self._idle.pop(), waiting.popleft()
                self._busy[actor.make.remote(row, suffix)] = (actor, row)
            self._step(waiting, done)

    def _step(self, waiting: deque[Row], done: Done) -> None:
        """Wait for news, and act on it."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        ready, _ = ray.wait(list(self._busy), timeout=PATIENCE)
        if not ready and not self._idle and not any(row for _, row in self._busy.values()):
            LOG.warning("no actor runs yet; the cluster has %s free", ray.available_resources())
        for reference in ready:
            actor, row = self._busy.pop(reference)
            try:
                said = ray.get(reference)
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                LOG.warning("an actor died (%s); another one takes its place", type(error).__name__)
                self._add()
                self._lost(row, waiting, done)
                continue
            self._idle.append(actor)
            if row is None:
                self._meet(said)
            else:
                done(row, said)

    def _meet(self, said: About) -> None:
        self._deaths[None] = 0
        if self.known not in (None, said):
            raise ValueError(
                f"the model is another one on some machine ({said.fingerprint}, and {self.known.fingerprint} before); "
                "give all machines the same files"
            )
        self.known = said

    def _lost(self, row: Row | None, waiting: deque[Row], done: Done) -> None:
        number = None if row is None else row.number
        self._deaths[number] += 1
        if row is None and self._deaths[None] >= TRIES * 2:
            raise ValueError(
                "actors die while they load the model; machines with more memory, or fewer --actors, may do"
            )
        if row is not None and self._deaths[number] >= TRIES:
            done(row, f"{TRIES} actors died of this row; perhaps memory does not suffice for it")
        elif row is not None:
            waiting.appendleft(row)


@contextmanager
def actors(
    source: ModelSource,
    *,
    count: int | None = None,
    address: str = "",
    device: str = "auto",
    precision: Precision = "auto",
    adapters: Collection[str] | None = None,
    offload: Offload = "auto",
    compiled: Compile = "auto",
) -> Iterator[tuple[About, Engine]]:
    """A pool of ``count`` actors (None: one a GPU, else one a core) on the cluster at ``address``, or here without one.

    Each has one core, and one GPU where there are any and ``device`` does not say cpu. Comes when the first has
    loaded the model. Raises ValueError where Ray is not installed, no cluster answers, or the model cannot be loaded.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("the engine ray is not installed; pip install 'animatelcm[cluster]'") from error
    with redirect_stdout(sys.stderr), ExitStack() as stack:  # Ray prints of actors that die, in the midst of results
        _connect(address or os.environ.get("RAY_ADDRESS", ""), count)
        stack.callback(ray.shutdown)  # which ends the actors of this process, wherever they are
        has = ray.cluster_resources()
        gpus = int(has.get("GPU", 0)) if device in ("auto", "cuda") else 0
        kind = ray.remote(Worker).options(num_cpus=1, num_gpus=1 if gpus else 0)
        where = (source, str(Path.cwd()), device, precision, adapters, offload, compiled)
        pool = Pool(lambda: kind.remote(*where), count or gpus or int(has.get("CPU", 1)))
        yield pool.wait(), pool.work


def _connect(address: str, count: int | None) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        ray.init("local", num_cpus=max(count or 0, os.cpu_count() or 1), include_dashboard=False, **quiet)
        return
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal() and "/" not in host:  # Ray itself asks for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"no Ray cluster answers at {address!r} ({said}); start one with: ray start --head") from error
