"""Progress of a long step: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger("vae_flows")
LOG_SECONDS = 10.0


class Advance(Protocol):
    """Called with what is done of the total, and a few words on how it goes, as often as one likes."""

    def __call__(self, done: int, total: int, words: str = "") -> None: ...


@contextmanager
def progress(step: str) -> Iterator[Advance]:
    """Show how far a step is; the block calls the given function as often as it likes."""
    with _bar(step) if sys.stderr.isatty() else _lines(step) as advance:
        yield advance


@contextmanager
def _bar(step: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[words]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(step, total=None, words="")

        def advance(done: int, total: int, words: str = "") -> None:
            bar.update(task, completed=done, total=total, words=words)

        yield advance


@contextmanager
def _lines(step: str) -> Iterator[Advance]:
    last = time.monotonic()

    def advance(done: int, total: int, words: str = "") -> None:
        nonlocal last
        if time.monotonic() - last > LOG_SECONDS or done == total:
            last = time.monotonic()
            logger.info("%s: %d/%d %s", step, done, total, words)

    yield advance
