"""Streams and resident arrays: every image once, in order, whatever the batch size or the threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.batches import rebatch, stream
from data.images import DecodePath, Limits
from data.snapshot import ingest
from data.sources import Payload, Source, open_source
from data.store import open_store

PATH = DecodePath(8, 8, 3)


def folder_of(root: Path, count: int) -> str:
    root.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (9, 9), (i % 256, i // 256, 7)).save(root / f"{i:04d}.png")
    return f"folder:{root}"


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 7))
def test_rebatch_keeps_rows_and_order(sizes: list[int], size: int) -> None:
    values = iter(range(sum(sizes)))
    batches = [pa.record_batch({"x": pa.array([next(values) for _ in range(n)], pa.int64())}) for n in sizes]
    out = list(rebatch(batches, size))
    assert [x for batch in out for x in batch["x"].to_pylist()] == list(range(sum(sizes)))
    assert all(batch.num_rows == size for batch in out[:-1])
    assert all(0 < batch.num_rows <= size for batch in out)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200])
@pytest.mark.parametrize("workers", [1, 4])
def test_batch_size_and_threads_change_nothing(tmp_path: Path, batch_size: int, workers: int) -> None:
    source = open_source(folder_of(tmp_path, 150))
    (tmp_path / "0042.png").write_bytes(b"broken")
    batches = list(stream(source, PATH, batch_size, workers=workers))
    ids = [key for batch in batches for key in batch.ids]
    assert ids == [f"{i:04d}.png" for i in range(150) if i != 42]
    red = np.concatenate([batch.images[:, 0, 0, 0] for batch in batches])
    assert red.tolist() == [int(key[:4]) % 256 for key in ids]
    assert [key for batch in batches for key, _ in batch.rejects] == ["0042.png"]
    assert all(len(batch.images) == batch.rows.num_rows == len(batch.hashes) for batch in batches)


def test_a_batch_of_rejects_is_empty(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    (batch,) = stream(open_source(f"folder:{tmp_path}"), PATH)
    assert batch.images.shape == (0, 3, 8, 8)
    assert len(batch.rejects) == 3


def test_an_open_geometry_is_refused_before_reading() -> None:
    with pytest.raises(ValueError, match="geometry is open"):
        next(stream(open_source("digits"), DecodePath()))


def test_a_stream_left_early_leaves_no_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    batches = stream(open_source(folder_of(tmp_path, 100)), PATH, 10)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_reading_ahead_is_bounded(tmp_path: Path) -> None:
    """A listing is not drained by a slow consumer: what waits is a few batches."""
    source = open_source(folder_of(tmp_path, 100))
    pulled = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal pulled
        for batch in rebatch(source.listing(), 5):
            pulled += batch.num_rows
            yield batch

    batches = stream(source, PATH, 5, rows=counted())
    next(batches)
    assert pulled <= 20


def test_pixels_and_files_give_the_same_images(tmp_path: Path) -> None:
    """An array source resized is the same as its images saved as PNG and resized."""
    digits = open_source("digits")
    rows = next(digits.listing()).slice(0, 20)
    for i, image in enumerate(digits.read(rows)):
        Image.fromarray(np.asarray(image)[..., 0]).save(tmp_path / f"{i:02d}.png")
    (files,) = stream(open_source(f"folder:{tmp_path}"), DecodePath(11, 13, 1))
    (arrays,) = stream(digits, DecodePath(11, 13, 1), rows=[rows])
    assert np.array_equal(files.images, arrays.images)
    assert arrays.sizes.tolist() == [[8, 8]] * 20


class Stuck:
    """A folder of which one file is a pipe that is opened, and waited on, as a dead network disk is."""

    def __init__(self, source: Source, pipe: Path):
        self._source, self._pipe = source, pipe
        self.uri, self.hashed, self.listing = source.uri, source.hashed, source.listing

    def read(self, rows: pa.RecordBatch, limits: Limits) -> Payload:
        if self._pipe.name in rows["id"].to_pylist():
            self._pipe.read_bytes()
        return self._source.read(rows, limits)


def test_a_hang_is_a_reject_and_named(tmp_path: Path) -> None:
    uri = folder_of(tmp_path / "in", 100)
    os.mkfifo(tmp_path / "in" / "0050.pipe")
    stuck = Stuck(open_source(uri), tmp_path / "in" / "0050.pipe")
    batches = list(stream(stuck, PATH, 70, limits=Limits(max_seconds=1.0), workers=2))  # type: ignore[arg-type]
    assert [key for batch in batches for key in batch.ids] == [f"{i:04d}.png" for i in range(100)]
    ((key, reject),) = [reject for batch in batches for reject in batch.rejects]
    assert (key, reject.error) == ("0050.pipe", "hang")


def test_ingest_names_what_hangs_too(tmp_path: Path) -> None:
    uri = folder_of(tmp_path / "in", 100)
    os.mkfifo(tmp_path / "in" / "0050.pipe")
    stuck = Stuck(open_source(uri), tmp_path / "in" / "0050.pipe")
    stuck.name, stuck.native, stuck.splits, stuck.columns = "in", (3, 8, 8), frozenset(), pa.schema([])
    snapshot = ingest(stuck, PATH, open_store(tmp_path / "out"), limits=Limits(max_seconds=1.0))  # type: ignore[arg-type]
    assert (snapshot.rows, snapshot.reasons) == (100, {"hang": 1})


def test_a_failing_source_raises_where_it_is_read(tmp_path: Path) -> None:
    class Failing(Stuck):
        def read(self, rows: pa.RecordBatch, limits: Limits) -> Payload:
            raise OSError("the disk is gone")

    source = Failing(open_source(folder_of(tmp_path, 10)), tmp_path)
    with pytest.raises(OSError, match="the disk is gone"):
        list(stream(source, PATH))  # type: ignore[arg-type]
