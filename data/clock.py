"""Where the time of a job goes: seconds by stage, over all threads; and who watches images pass.

Seconds only ever grow, like `time.process_time`: whoever wants to know about a job reads them before and
after. Stages are read, decode, model and write.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_seconds: dict[str, float] = defaultdict(float)
_lock = threading.Lock()
_watchers: list[Callable[[int], None]] = []


def seconds() -> dict[str, float]:
    """Seconds spent in each stage so far."""
    with _lock:
        return dict(_seconds)


@contextmanager
def spent(stage: str) -> Iterator[None]:
    """Count the block's time to a stage.

    >>> before = seconds().get("doctest", 0.0)
    >>> with spent("doctest"):
    ...     time.sleep(0.01)
    >>> seconds()["doctest"] - before >= 0.01
    True
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        add(stage, time.perf_counter() - started)


def add(stage: str, duration: float) -> None:
    """Count seconds that were measured elsewhere."""
    with _lock:
        _seconds[stage] += duration


@contextmanager
def watching(watcher: Callable[[int], None]) -> Iterator[None]:
    """Within the block the function is told of each batch that was worked on, by its number of images."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def passed(images: int) -> None:
    """Tell that so many images have been worked on, from the thread that did."""
    for watcher in _watchers:
        watcher(images)


class Timed(Iterator[T]):
    """Items of an iterator; `seconds` is the time that they took to come, at little cost."""

    def __init__(self, items: Iterable[T]):
        self._next = iter(items).__next__
        self.seconds = 0.0

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            return self._next()
        finally:
            self.seconds += time.perf_counter() - started
