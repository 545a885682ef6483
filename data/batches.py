"""Images in batches: a whole split resident in memory, or a stream of bounded memory.

Shapes: B batch, C channels, H W pixels; images are uint8 (B, C, H, W).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from data.clock import Timed, add, passed, spent
from data.images import (
    LIMITS,
    DecodePath,
    Limits,
    Reject,
    Rejected,
    content_hash,
    decode,
    fit_pixels,
    pixel_hash,
    pixel_hashes,
)
from data.sources import Source

CHUNK = 64  # images one worker takes at a time
REMOTE_WORKERS = 32  # threads that mostly wait for a network
AHEAD = 2  # batches decoded before they are asked for

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Decoded images and what is known of each, in the listing's order.

    `images` uint8 (B, C, H, W); `rows` their rows of the source's listing; `hashes` blake3 of each one's
    stored bytes; `sizes` int32 (B, 2), width and height as stored, upright; `rejects` the ids that gave
    no image, with the reason.
    """

    images: np.ndarray
    rows: pa.RecordBatch
    hashes: list[bytes]
    sizes: np.ndarray
    rejects: list[tuple[str, Reject]]

    @property
    def ids(self) -> list[str]:
        return self.rows["id"].to_pylist()


class Resident(NamedTuple):
    """A whole split in memory: images uint8 (N, C, H, W), ids, and labels (None where there is none)."""

    images: np.ndarray
    ids: list[str]
    labels: list[str | None]


def stream(
    source: Source,
    path: DecodePath,
    batch_size: int = 256,
    *,
    rows: Iterable[pa.RecordBatch] | None = None,
    limits: Limits = LIMITS,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Batches of a source's images, read and decoded ahead in threads; memory is that of a few batches.

    `rows` picks rows of the source's listing, in their order; all of it when None. A batch holds up to
    `batch_size` images: fewer where some are rejected. `workers` defaults to
    `workers_for` the source. An image that takes longer than `limits.max_seconds` is a reject of code hang.

    >>> from data.sources import open_source
    >>> digits = open_source("digits")
    >>> batch = next(stream(digits, DecodePath().resolved(digits.native), 100))
    >>> batch.images.shape, batch.ids[0]
    ((100, 1, 8, 8), 'digits/000000000')
    """
    path.geometry  # noqa: B018  an open geometry is the caller's error, before any work
    count = workers or workers_for(source)
    hang = partial(_hung, path, limits.max_seconds)
    crew = Crew(lambda piece: read_rows(source, piece, path, limits), hang, limits.max_seconds, count)
    pending: deque[list[Task[Batch]]] = deque()
    try:
        for piece in rebatch(source.listing() if rows is None else rows, batch_size):
            pending.append(crew.submit(piece))
            if len(pending) > AHEAD:
                yield from _handed(crew.results(pending.popleft()))
        while pending:
            yield from _handed(crew.results(pending.popleft()))
    finally:
        crew.close()


def workers_for(source: Source) -> int:
    """The machine's cores, more for a remote source."""
    return REMOTE_WORKERS if "://" in source.uri else os.cpu_count() or 1


def read_rows(source: Source, rows: pa.RecordBatch, path: DecodePath, limits: Limits = LIMITS) -> Batch:
    """Read and decode some rows of a source's listing, here and now."""
    with spent("read"):
        payload = source.read(rows, limits)
    if isinstance(payload, np.ndarray) and payload.shape[1:] == _hwc(path):
        return _ready(payload, rows, source.hashed)
    return _decoded(payload, rows, path, limits)


def rebatch(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly `size`, but for the last.

    >>> import pyarrow as pa
    >>> three = pa.record_batch({"x": [1, 2, 3]})
    >>> [batch.num_rows for batch in rebatch([three, three, three], 4)]
    [4, 4, 1]
    """
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        start = 0
        while count + batch.num_rows - start >= size:
            take = size - count
            held.append(batch.slice(start, take))
            yield pa.concat_batches(held)
            held, count, start = [], 0, start + take
        if start < batch.num_rows:
            held.append(batch.slice(start))
            count += batch.num_rows - start
    if held:
        yield pa.concat_batches(held)


class Task(Generic[T]):
    """Rows for a worker, when it began on them, and what came of it."""

    def __init__(self, rows: pa.RecordBatch):
        self.rows = rows
        self.result: Future[T] = Future()
        self.began: float | None = None
        self.worker: Thread | None = None
        self.given_up = False


class Crew(Generic[T]):
    """Threads that work on rows, with a watchdog: a thread cannot be ended, but it can be left behind.

    When a chunk takes longer than an image may, its images are done again, each on its own: the one
    that hangs gets what `hung` says of its row, and the others are as if nothing had happened.
    """

    def __init__(
        self,
        work: Callable[[pa.RecordBatch], T],
        hung: Callable[[pa.RecordBatch], T],
        patience: float,
        size: int,
    ):
        self._work, self._hung, self._patience = work, hung, patience
        self._tasks: SimpleQueue[Task[T] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._closed = False
        for _ in range(size):
            self._hire()

    def submit(self, rows: pa.RecordBatch, size: int = CHUNK) -> list[Task[T]]:
        """Hand the rows out, `size` of them a task."""
        tasks = [Task[T](rows.slice(start, size)) for start in range(0, rows.num_rows, size)]
        for task in tasks:
            self._tasks.put(task)
        return tasks

    def results(self, tasks: list[Task[T]]) -> list[T]:
        """What came of the tasks, in their order; waits for it. An error of the work is raised here."""
        return [part for task in tasks for part in self._wait(task)]

    def close(self) -> None:
        """Let the threads go, once each has finished what it is at; those left behind are not waited for."""
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _hire(self) -> None:
        thread = Thread(target=self._toil, name="decode", daemon=True)  # a hung one must not hold up the exit
        self._threads.append(thread)
        thread.start()

    def _toil(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.worker, task.began = current_thread(), time.monotonic()
            try:
                if not self._closed:
                    task.result.set_result(self._work(task.rows))
            except BaseException as error:
                task.result.set_exception(error)  # raised where the batch is asked for
            if task.given_up:
                return

    def _wait(self, task: Task[T]) -> list[T]:
        while True:
            left = self._patience if task.began is None else task.began + self._patience - time.monotonic()
            try:
                return [task.result.result(timeout=max(left, 0.0))]
            except TimeoutError:
                if not task.result.done() and task.began is not None and left <= 0.0:
                    return self._leave_behind(task)

    def _leave_behind(self, task: Task[T]) -> list[T]:
        task.given_up = True
        self._threads = [thread for thread in self._threads if thread is not task.worker]
        self._hire()
        return self.results(self.submit(task.rows, 1)) if task.rows.num_rows > 1 else [self._hung(task.rows)]


def _handed(parts: list[Batch]) -> Iterator[Batch]:
    """The parts as one batch, which is worked on when the next is asked for."""
    batch = _joined(parts)
    yield batch
    passed(len(batch.images) + len(batch.rejects))


def _joined(parts: list[Batch]) -> Batch:
    return Batch(
        np.concatenate([part.images for part in parts]),
        pa.concat_batches([part.rows for part in parts]),
        [digest for part in parts for digest in part.hashes],
        np.concatenate([part.sizes for part in parts]),
        [reject for part in parts for reject in part.rejects],
    )


def _hung(path: DecodePath, patience: float, row: pa.RecordBatch) -> Batch:
    """A batch without its one image, which hangs."""
    hang = Reject("hang", f"not read and decoded within {patience:g} seconds", "decode")
    empty, sizes = np.empty((0, *path.geometry), np.uint8), np.empty((0, 2), np.int32)
    return Batch(empty, row.slice(0, 0), [], sizes, [(row["id"][0].as_py(), hang)])


def _hwc(path: DecodePath) -> tuple[int, int, int]:
    channels, height, width = path.geometry
    return height, width, channels


def _ready(pixels: np.ndarray, rows: pa.RecordBatch, hashed: bool) -> Batch:
    """Pixels (B, H, W, C) that have the geometry already: no image is touched on its own."""
    if hashed:
        hashes = [bytes.fromhex(version) for version in rows["version"].to_pylist()]
    else:
        hashes = pixel_hashes(pixels)
    height, width = pixels.shape[1:3]
    sizes = np.broadcast_to(np.array([width, height], np.int32), (len(pixels), 2))
    return Batch(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), rows, hashes, sizes, [])


def _decoded(payload: Iterable[object], rows: pa.RecordBatch, path: DecodePath, limits: Limits) -> Batch:
    images = np.empty((rows.num_rows, *path.geometry), np.uint8)
    kept: list[int] = []
    hashes, sizes, rejects = [], [], []
    started, items = time.perf_counter(), Timed(payload)  # many sources read an image when it is asked for
    for place, (key, item) in enumerate(zip(rows["id"].to_pylist(), items, strict=True)):
        try:
            image, digest = _one(item, path, key, limits)
        except Rejected as error:
            rejects.append((key, error.reject))
            continue
        images[len(kept)] = image.pixels
        kept.append(place)
        hashes.append(digest)
        sizes.append((image.width, image.height))
    add("read", items.seconds)
    add("decode", time.perf_counter() - started - items.seconds)
    if rejects:
        rows = rows.take(pa.array(kept, pa.int64()))
    return Batch(images[: len(kept)], rows, hashes, np.array(sizes, np.int32).reshape(-1, 2), rejects)


def _one(item: object, path: DecodePath, key: str, limits: Limits):  # type: ignore[no-untyped-def]
    if isinstance(item, Reject):
        raise Rejected(*item)
    if isinstance(item, np.ndarray):
        return fit_pixels(item, path), pixel_hash(item)
    assert isinstance(item, bytes)
    return decode(item, path, name=key, limits=limits), content_hash(item)
