"""Images in a column of Parquet files, here or in a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.images import LIMITS, Limits, Reject
from data.pixel_columns import holds_pixels, images_of
from data.sources import (
    LISTED,
    NATIVE,
    SPLIT_NAMES,
    Payload,
    Source,
    find_files,
    listed,
    passed,
    runs,
    split_of,
    stem,
    too_many_bytes,
    with_columns,
)
from data.store import Entry, Store

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "pixels")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files with a column of image bytes, of Hugging Face's struct of bytes and path, or of pixels.

    Pixels are those of `data.pixel_columns`. The id is file/row; a column named id is passed through as
    source_id, other columns as they are. The split is that of a column `split`, or of the file's name
    (`train-00000-of-00002.parquet`).
    """

    store: Store
    files: tuple[Entry, ...]
    image: str
    schema: pa.Schema
    native: tuple[int, int, int] = NATIVE
    hashed = False
    _groups: dict[tuple[str, int], pa.ChunkedArray] = field(default_factory=dict, repr=False, compare=False)
    _open: dict[str, pq.ParquetFile] = field(default_factory=dict, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @property
    def uri(self) -> str:
        return f"parquet:{self.store.url}"

    @property
    def name(self) -> str:
        return self.store.url.rsplit("/", 1)[-1].removesuffix(".parquet")

    @property
    def splits(self) -> frozenset[str]:
        if "split" in self.schema.names:
            return frozenset(SPLIT_NAMES.values())
        return frozenset(split for split in (split_of(file.path) for file in self.files) if split)

    @property
    def columns(self) -> pa.Schema:
        kept = [item for item in self.schema if item.name not in (self.image, "label", "split")]
        return pa.schema([item.with_name(passed(item.name)).remove_metadata() for item in kept])

    def listing(self) -> Iterator[pa.RecordBatch]:
        names = [name for name in self.schema.names if name != self.image]
        for file in self.files:
            start = 0
            opened = open_parquet_file(self.store, file.path)
            if not names:  # a file of images alone: only its number of rows is known without them
                for first in range(0, opened.metadata.num_rows, LISTED):
                    yield self._rows(file, None, first, min(LISTED, opened.metadata.num_rows - first))
                continue
            for batch in opened.iter_batches(LISTED, columns=names, use_threads=False):
                yield self._rows(file, batch, start, batch.num_rows)
                start += batch.num_rows

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        positions = rows["position"].to_numpy()
        parts: list[Payload] = []
        for path, a, b in runs(rows["file"].to_pylist()):
            parts += [_payloads(column, limits) for column in self._columns(path, positions[a:b])]
        return _joined(parts)

    def _columns(self, path: str, positions: np.ndarray) -> Iterator[pa.Array]:
        """The image column at these rows of a file, a row group at a time."""
        bounds = self._bounds(path)
        groups = np.searchsorted(bounds, positions, "right") - 1
        for group, a, b in runs(groups.tolist()):
            yield _rows(self._group(path, group), positions[a:b] - bounds[group])

    def _bounds(self, path: str) -> np.ndarray:
        """First row of each row group."""
        metadata = self._file(path).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return np.cumsum([0, *sizes])[:-1]

    def _group(self, path: str, group: int) -> pa.ChunkedArray:
        """The images of a row group; the last two are kept, since rows come in the order of the file."""
        file = self._file(path)
        with self._lock:
            if (path, group) not in self._groups:
                while len(self._groups) > 1:
                    del self._groups[next(iter(self._groups))]
                column = file.read_row_group(group, [self.image], use_threads=False)[self.image]
                self._groups[path, group] = column
            return self._groups[path, group]

    def _file(self, path: str) -> pq.ParquetFile:
        with self._lock:
            if path not in self._open:
                while len(self._open) > 1:
                    del self._open[next(iter(self._open))]
                self._open[path] = open_parquet_file(self.store, path)
            return self._open[path]

    def _rows(self, file: Entry, batch: pa.RecordBatch | None, start: int, count: int) -> pa.RecordBatch:
        own = {} if batch is None else {name: batch[name] for name in batch.schema.names}
        rows = listed(
            id=[f"{stem(file)}/{row:09d}" for row in range(start, start + count)],
            split=_split_column(own["split"]) if "split" in own else [split_of(file.path)] * count,
            label=self._labels(own["label"]) if "label" in own else None,
            version=[file.version] * count,
            file=[file.path] * count,
            position=np.arange(start, start + count),
        )
        kept = [name for name in self.schema.names if name not in (self.image, "label", "split")]
        return with_columns(rows, [(item, own[name]) for item, name in zip(self.columns, kept, strict=True)])

    def _labels(self, column: pa.Array) -> list[str | None]:
        """Labels as text; where Hugging Face's metadata names the classes, their names."""
        about = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about.get("info", {}).get("features", {}).get("label", {}).get("names")
        values = column.to_pylist()
        if names:
            return [None if value is None or value < 0 else names[value] for value in values]
        return [None if value is None else str(value) for value in values]


def open_parquet(place: str) -> Source:
    """Parquet files in a folder, or one file; `?image=COLUMN` names the column where it has another name."""
    place, _, wanted = place.partition("?image=")
    store, files = find_files(place, ".parquet")
    if not files:
        raise ValueError(f"no .parquet files in {store.url}")
    try:
        schema = open_parquet_file(store, files[0].path).schema_arrow
    except pa.ArrowInvalid as error:
        raise ValueError(f"{store.uri(files[0].path)} is no Parquet file: {error}") from None
    image = wanted or _image_column(schema)
    if image not in schema.names or not _holds_images(schema.field(image).type):
        there = ", ".join(f"{item.name} ({item.type})" for item in schema)
        raise ValueError(
            f"no column of images in {store.url}: it has {there}; "
            f"write parquet:{place}?image=COLUMN for one of bytes, or of uint8 tensors or lists of rows"
        )
    ordered = tuple(sorted(files, key=lambda file: stem(file) + "/"))
    return ParquetSource(store, ordered, image, schema, _native(store, ordered[0], schema.field(image)))


def open_parquet_file(store: Store, path: str) -> pq.ParquetFile:
    """A Parquet file read as it is asked for, with its page checksums verified.

    Read it with use_threads=False: see `data.files.parquet_table`.
    """
    file = store.local / path if store.local is not None else pa.PythonFile(store.open(path), mode="r")
    return pq.ParquetFile(file, page_checksum_verification=True)


def _native(store: Store, file: Entry, column: pa.Field) -> tuple[int, int, int]:
    """(C, H, W) of the first image, where images are pixels already."""
    if holds_pixels(column.type):
        opened = open_parquet_file(store, file.path)
        for batch in opened.iter_batches(1, columns=[column.name], use_threads=False):
            (image,) = images_of(batch[0])
            if isinstance(image, np.ndarray):
                height, width, channels = image.shape
                return channels, height, width
            break
    return NATIVE


def _rows(column: pa.ChunkedArray, positions: np.ndarray) -> pa.Array:
    """Rows of a row group's column, as they lie where they follow one another."""
    first, count = int(positions[0]), len(positions)
    if (np.diff(positions) == 1).all():
        column = column.slice(first, count)
    else:
        column = column.take(pa.array(positions))
    return column.combine_chunks()


def _payloads(column: pa.Array, limits: Limits) -> Payload:
    if holds_pixels(column.type):
        return images_of(column)
    return [_payload(value, limits) for value in column.to_pylist()]


def _joined(parts: list[Payload]) -> Payload:
    """One array where all parts are arrays of one shape, else the images one by one."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts) and len({part.shape[1:] for part in arrays}) == 1:
        return np.concatenate(arrays)
    return [image for part in parts for image in part]


def _split_column(column: pa.Array) -> list[str | None]:
    return [SPLIT_NAMES.get(str(value)) for value in column.to_pylist()]


def _payload(value: dict[str, bytes | None] | bytes | None, limits: Limits) -> bytes | Reject:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        return Reject("missing", "null in its image column", "read")
    return too_many_bytes(len(data), limits) if len(data) > limits.max_bytes else data


def _image_column(schema: pa.Schema) -> str:
    """The usual name, or the only column that holds images; '' when neither is clear."""
    holds = [item.name for item in schema if _holds_images(item.type)]
    named = [name for name in IMAGE_COLUMNS if name in holds]
    return named[0] if named else holds[0] if len(holds) == 1 else ""


def _holds_images(kind: pa.DataType) -> bool:
    return _holds_bytes(kind) or holds_pixels(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(item.name == "bytes" and _holds_bytes(item.type) for item in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
