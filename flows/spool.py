"""What training tells, on its way to MLflow: on disk at once, sent by a thread, so that no training waits.

A metric keeps the time at which it was logged and is sent until it has arrived. MLflow keeps a metric of one
run, name, time, step and value once, so what may have arrived is sent again without harm.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

from data.secrets import redact

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger("vae_flows.tracking")
T = TypeVar("T")
SEND_SECONDS = 2.0  # a batch of metrics costs 0.1 s, a single one 0.02 s
AT_ONCE = 1000  # metrics that MLflow takes in one request
LONGEST_PAUSE = 15.0


class MlflowAwayError(RuntimeError):
    """MLflow did not answer for as long as we wait for it."""


class Picture(NamedTuple):
    """A picture of a step, its PNG in a file beside the spool's."""

    name: str
    step: int
    file: str


class Receiver(Protocol):
    """One run at MLflow."""

    def metrics(self, metrics: list[Metric]) -> object: ...

    def picture(self, name: str, step: int, png: bytes) -> object:
        """Called again where an answer was lost: to look first is the receiver's part."""

    def last_step(self, metric: str) -> int:
        """The last step that MLflow has of a metric, -1 for none: no step is sent twice."""


class Spool:
    """Metrics and pictures of one run in the order in which they were logged.

    path: of what has not arrived, which an earlier process may have left.
    """

    def __init__(self, path: Path, receiver: Receiver):
        self.path, self._receiver = path, receiver
        self._last: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._waiting = deque(_left(path))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._changed = threading.Condition()
        self._hurry = self._closed = False
        self._error: Exception | None = None
        threading.Thread(target=self._work, name="mlflow-metrics", daemon=True).start()

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Put the metrics of a step on disk and in the queue; raises what sending has met, but no outage."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._add([Metric(name, float(value), now, step) for name, value in metrics.items()])

    def add_picture(self, name: str, step: int, png: bytes) -> None:
        """Put a picture on disk and in the queue."""
        file = self.path.with_suffix(f".{name}.{step}.png")
        file.write_bytes(png)
        self._add([Picture(name, step, file.name)])

    def _add(self, new: Sequence[Metric | Picture]) -> None:
        with self._changed:
            self._raise()
            self._write("".join(map(_line, new)).encode())
            self._waiting += new
            self._changed.notify_all()

    def sync(self) -> None:
        """Bring what waits through a power cut."""
        os.fsync(self._file.fileno())

    def drain(self, seconds: float) -> None:
        """Wait until all has arrived; MlflowAwayError if it has not within so many seconds."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting or self._error, seconds)
            self._raise()
            if self._waiting:
                raise MlflowAwayError(
                    f"MLflow did not take {len(self._waiting)} lines within {seconds:g} s: they wait in "
                    f"{self.path}, and the same command sends them"
                )

    def close(self) -> None:
        """Send no more; a file in which nothing waits has served."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._file.close()
            if not self._waiting:
                self.path.unlink(missing_ok=True)

    def _write(self, lines: bytes) -> None:
        try:
            self._file.write(lines)
        except OSError as error:  # which names no path
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """The thread's life: a batch now and then; while MLflow is away, the same one again."""
        outage = Outage()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._changed.wait_for(lambda: self._hurry or self._closed, SEND_SECONDS)
                if self._closed:
                    return
                first = _together(self._waiting)
            try:
                self._send(first)
            except Exception as error:
                if away(error):
                    outage.pause(error)
                    continue
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            outage.over()
            self._forget(1 if isinstance(first, Picture) else len(first))

    def _send(self, items: list[Metric] | Picture) -> None:
        if isinstance(items, Picture):
            file = self.path.with_name(items.file)
            if file.exists():  # else it has arrived, and the line about it stayed when a process was killed
                self._receiver.picture(items.name, items.step, file.read_bytes())
                file.unlink()
            return
        last, new = dict(self._last), []
        for metric in items:
            if metric.key not in last:
                last[metric.key] = self._receiver.last_step(metric.key)
            if metric.step > last[metric.key]:
                last[metric.key] = metric.step
                new.append(metric)
        if new:
            self._receiver.metrics(new)
        self._last = last

    def _forget(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._waiting.popleft()
            if not self._waiting and not self._closed:
                self._file.truncate(0)
            self._changed.notify_all()


class Outage:
    """Says once that MLflow is away and once that it is back, and how long to wait in between."""

    def __init__(self) -> None:
        self._failures = 0

    def pause(self, error: Exception) -> None:
        """Wait before the next attempt: a second, then twice as long each time, up to a quarter minute."""
        if not self._failures:
            logger.warning("mlflow: away, work goes on and waits for it where it must: %s", in_a_line(error))
        time.sleep(min(2 ** min(self._failures, 10), LONGEST_PAUSE))
        self._failures += 1

    def over(self) -> None:
        """An attempt has succeeded."""
        if self._failures:
            logger.info("mlflow: back after %d attempts", self._failures)
        self._failures = 0


def patience() -> float:
    """Seconds that a command waits for MLflow where it can't go on without: VAE_FLOWS_PATIENCE, else 600."""
    return float(os.environ.get("VAE_FLOWS_PATIENCE") or 600)


def patiently(call: Callable[[], T]) -> T:
    """What a call to MLflow gives, made again while MLflow is away: it must do no harm twice.

    Raises MlflowAwayError when it stays away for longer than `patience`.
    """
    end, outage = time.monotonic() + patience(), Outage()
    while True:
        try:
            given = call()
        except Exception as error:
            if not away(error):
                raise
            if time.monotonic() > end:
                raise MlflowAwayError(
                    f"MLflow did not answer for {patience():g} s ({in_a_line(error)}): "
                    "the same command goes on from here"
                ) from None
            outage.pause(error)
        else:
            outage.over()
            return given


class Patient:
    """An object of MLflow's whose methods wait for it."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            return patiently(lambda: method(*arguments, **named))

        return call


def away(error: Exception) -> bool:
    """Whether MLflow's server can't be reached, is too slow, or answers 5xx: what time may mend."""
    import mlflow
    import requests

    if isinstance(error, requests.RequestException):
        answer = error.response
        return answer is None or answer.status_code >= 500
    remote = any(uri.startswith("http") for uri in (mlflow.get_tracking_uri(), mlflow.get_registry_uri()))
    return remote and isinstance(error, mlflow.MlflowException) and error.get_http_status_code() >= 500


def in_a_line(error: Exception) -> str:
    """The first words of an error, without credentials."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])[:500]


def _together(waiting: deque[Metric | Picture]) -> list[Metric] | Picture:
    """What one request takes of what waits: a picture, or the metrics before the next one."""
    if isinstance(waiting[0], Picture):
        return waiting[0]
    first = itertools.takewhile(
        lambda item: not isinstance(item, Picture), itertools.islice(waiting, AT_ONCE)
    )
    return list(cast("Iterator[Metric]", first))


def _line(item: Metric | Picture) -> str:
    if isinstance(item, Picture):
        return json.dumps(item) + "\n"
    return json.dumps([item.key, item.value, item.timestamp, item.step]) + "\n"


def _left(path: Path) -> list[Metric | Picture]:
    """What an earlier process has left; a last line that a full disk has cut short goes."""
    from mlflow.entities import Metric

    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    os.truncate(path, len(whole) + bool(whole))
    told = [json.loads(line) for line in whole.splitlines()]
    return [Picture(*line) if len(line) == 3 else Metric(*line) for line in told]
