"""Progress of a long step: on a terminal, in the log, in Prefect and in MLflow.

Each says how much of the total is done, the rate, what is left, and on which stage most time goes: read,
decode, model or write, as `data.clock` counts them.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from data import clock

if TYPE_CHECKING:
    from flows.tracking import Run

logger = logging.getLogger("vae_flows")
LOG_SECONDS = 10.0
SHARE = 0.5  # of the time: a stage that takes as much is the slow one


class Advance(Protocol):
    """Called with what is done of the total, and a few words on how it goes, as often as one likes."""

    def __call__(self, done: int, total: int, words: str = "") -> None: ...


@dataclass(frozen=True)
class State:
    """How far a step is: the rate is of this process, since what an earlier one did came for nothing."""

    step: str
    done: int
    total: int
    seconds: float
    rate: float
    stages: Mapping[str, float]
    words: str

    @property
    def slow(self) -> str:
        """The stage on which most of the time goes, if one does.

        >>> State("encode", 1, 2, 9.0, 1.0, {"read": 1.0, "decode": 7.0}, "").slow
        'mostly decode'
        """
        whole = sum(self.stages.values())
        name = max(self.stages, key=lambda stage: self.stages[stage], default="")
        return f"mostly {name}" if whole and self.stages[name] >= SHARE * whole else ""

    @property
    def left(self) -> float | None:
        """Seconds to go, at the rate so far."""
        return (self.total - self.done) / self.rate if self.rate else None

    def __str__(self) -> str:
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        left = f"{clock_time(self.left)} left" if self.left and self.done < self.total else ""
        told = [self.words, f"{self.rate:,.0f}/s" if self.rate else "", left, self.slow]
        return f"{self.done:,}/{self.total:,}{share} " + ", ".join(part for part in told if part)


def clock_time(seconds: float) -> str:
    """As 1:02:03 or 2:03.

    >>> clock_time(3723), clock_time(123.4)
    ('1:02:03', '2:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Meter:
    """Makes a state of what a step reports, and of the images that pass meanwhile."""

    def __init__(self, step: str):
        self.step, self.started, self.before = step, time.monotonic(), clock.seconds()
        self.first: tuple[int, float] | None = None
        self.last: State | None = None

    def read(self, done: int, total: int, words: str) -> State:
        """The state now; what was done when it was first asked is not this process's work."""
        now = time.monotonic()
        self.first = self.first or (done, now)
        spent = {name: value - self.before.get(name, 0.0) for name, value in clock.seconds().items()}
        stages = {name: value for name, value in spent.items() if value > 0}
        rate = (done - self.first[0]) / (now - self.first[1]) if now > self.first[1] else 0.0
        self.last = State(self.step, done, total, now - self.started, rate, stages, words)
        return self.last

    def times(self) -> dict[str, float]:
        """The step's time, rate, and the share of each stage, as metrics; none where nothing was done here.

        Unlike a rate on the way, this one is over all the seconds: to list a source, to load a model count.
        """
        state, (before, _) = self.last, self.first or (0, 0.0)
        if state is None or state.done <= before:
            return {}
        whole = sum(state.stages.values())
        return {
            f"time/{self.step}_seconds": state.seconds,
            f"time/{self.step}_per_second": (state.done - before) / state.seconds,
            **{f"time/{self.step}_share_{name}": value / whole for name, value in state.stages.items()},
        }


@contextmanager
def progress(step: str, run: Run | None = None) -> Iterator[Advance]:
    """Show how far a step is; the block calls the given function as often as it likes, or not at all.

    `run` gets the rate over steps, and at the end the step's time and where it went.
    """
    meter = Meter(step)
    with _bar(step) if sys.stderr.isatty() else _lines(step) as show:
        far = _Far(step, run)
        told = (0, 0, "")
        since = 0  # images that passed since the step told how far it is: it may do so once a shard

        def advance(done: int, total: int, words: str = "") -> None:
            nonlocal told, since
            told, since = (done, total, words), 0
            state = meter.read(done, total, words)
            show(state)
            far.show(state)

        def passed(images: int) -> None:
            nonlocal since
            (done, total, words), since = told, since + images
            if done + since < total:
                state = meter.read(done + since, total, words)
                show(state)
                far.show(state)

        with clock.watching(passed):
            yield advance
    if run is not None and (times := meter.times()):
        run.log_metrics(times)


class _Far:
    """Who watches from afar: MLflow and Prefect, now and then, and only of a step that takes long."""

    def __init__(self, step: str, run: Run | None):
        self.step, self.run, self.last = step, run, time.monotonic()
        self.artifact: UUID | None = None

    def show(self, state: State) -> None:
        if time.monotonic() - self.last < LOG_SECONDS and not (self.artifact and state.done == state.total):
            return
        self.last = time.monotonic()
        if self.run is not None and state.rate:
            self.run.log_metrics({f"progress/{self.step}_per_second": state.rate}, state.done)
        self._to_prefect(100 * state.done / max(state.total, 1), str(state))

    def _to_prefect(self, percent: float, words: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact
        from prefect.runtime import flow_run

        if not flow_run.id:
            return
        if self.artifact is None:
            self.artifact = create_progress_artifact(percent, key=f"progress-{self.step}", description=words)  # type: ignore[assignment]
        else:
            update_progress_artifact(self.artifact, percent, description=words)


@contextmanager
def _bar(step: str) -> Iterator[Callable[[State], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[words]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(step, total=None, words="")

        def show(state: State) -> None:
            told = str(state).split(" ", 2 if state.total else 1)[-1]
            bar.update(task, completed=state.done, total=state.total, words=told)

        yield show


@contextmanager
def _lines(step: str) -> Iterator[Callable[[State], None]]:
    last = time.monotonic()

    def show(state: State) -> None:
        nonlocal last
        if time.monotonic() - last > LOG_SECONDS or state.done == state.total:
            last = time.monotonic()
            logger.info("%s: %s", step, state)

    yield show
