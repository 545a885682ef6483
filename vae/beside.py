"""Work beside training, in order, on a thread of its own."""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class Beside:
    """Calls handed over are made one after the other on one thread, so that none of them holds up a step.

    An error of a call is raised by the next `submit`, or at the end of the block; calls after it are not
    made. Only `most` calls wait at once: a store slower than training slows it, and memory stays bounded.

    >>> with Beside() as beside:
    ...     for number in range(3):
    ...         beside.submit(print, number)
    0
    1
    2
    """

    def __init__(self, most: int = 4):
        self.most = most
        self._pool = ThreadPoolExecutor(1, "beside")
        self._pending: deque[Future[None]] = deque()
        self._context = contextvars.copy_context()
        self._failed = False

    def submit(self, call: Callable[..., object], *arguments: Any) -> None:
        """Make the call soon."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self.most):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._context.run, self._make, call, *arguments))

    def finish(self) -> None:
        """Wait until every call has been made."""
        while self._pending:
            self._pending.popleft().result()

    def _make(self, call: Callable[..., object], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            call(*arguments)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._pool.shutdown()
