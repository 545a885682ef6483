"""Where images come from: one reader a kind of source, all listing and reading the same way.

A source first **lists** its images, cheaply, lazily and in order of id, as record batches of `LISTING`
(plus columns passed through); later it **reads** any rows of that listing, as stored bytes or as pixels.
Listing rows are all a worker needs, so shards are planned from them and read by other processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import blake3
import numpy as np
import pyarrow as pa

from data.images import LIMITS, Limits, Reject
from data.store import Entry, Store, open_store

LISTING = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string()),  # the source's own: train, validation, test or none
        pa.field("label", pa.string()),
        pa.field("version", pa.string()),  # changes when the image does
        pa.field("file", pa.string()),  # where it lies, for sources that need more than the id
        pa.field("position", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("problem", pa.string()),  # the code of PROBLEMS that its place alone is refused with
    ]
)
PROBLEMS = {
    "path_outside": "its name climbs out of the archive",
    "not_a_file": "a link, folder or device in the archive",
    "duplicate_id": "an earlier image of the archive has its name",
    "truncated": "the archive ends within it",
    "corrupt": "the archive cannot be read",
}
LISTED = 8192  # rows of a listing's batch
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "t10k": "test",
    "testing": "test",
}
NATIVE = (3, 64, 64)  # what image files become where the decode path leaves it open
HELD_OUT = 0.1  # share of ids that each split the source lacks takes from its training ids

KINDS = {
    "digits": "digits",
    "idx": "idx:DIR",
    "folder": "folder:DIR",
    "tar": "tar:DIR",
    "parquet": "parquet:DIR",
    "torchvision": "torchvision:NAME",
    "snapshot": "snapshot:DIR",
}

# Names of our own columns: a column passed through under one of them is called source_NAME.
RESERVED = frozenset(
    {*LISTING.names, "source", "content_hash", "pixel_hash", "width", "height", "image"}
    | {"mu", "logvar", "kl", "kl_levels", "log_likelihood", "elbo"}
)

Payload = Sequence[bytes | np.ndarray | Reject] | np.ndarray


class Source(Protocol):
    """What every kind of source offers."""

    @property
    def uri(self) -> str:
        """How a person names it, in full; part of a table's key."""

    @property
    def name(self) -> str:
        """A short name for folders."""

    @property
    def native(self) -> tuple[int, int, int]:
        """(C, H, W) when a decode path leaves it open."""

    @property
    def splits(self) -> frozenset[str]:
        """Which of train, validation and test the source itself has."""

    @property
    def hashed(self) -> bool:
        """Whether the versions it lists are content hashes, in hex."""

    @property
    def columns(self) -> pa.Schema:
        """Columns passed through, beside those of LISTING."""

    def listing(self) -> Iterator[pa.RecordBatch]:
        """All images, in order of id; a new pass over the source at each call."""

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        """What the rows hold: bytes as stored, or uint8 pixels (N, H, W, C); or a reject in its place."""


def open_source(uri: str, *, downloads: str | os.PathLike[str] = "downloads") -> Source:
    """The source that `uri` names; ValueError of one line when it is missing, empty or unreadable.

    `digits`, `idx:DIR`, `folder:DIR`, `tar:DIR` (WebDataset shards), `parquet:DIR`, `torchvision:NAME`
    (fetched under `downloads`) and `snapshot:DIR`; DIR may be a URL of s3, gs or az.

    >>> source = open_source("digits")
    >>> source.native, sum(batch.num_rows for batch in source.listing())
    ((1, 8, 8), 1797)
    """
    kind, _, place = uri.partition(":")
    if kind not in KINDS:
        hint = f"; for a folder of images write folder:{uri}" if os.path.isdir(uri) else ""
        raise ValueError(f"unknown source {uri!r}: give one of {', '.join(KINDS.values())}{hint}")
    if kind != "digits" and not place:
        raise ValueError(f"source {uri!r} names no place: write {KINDS[kind]}")
    return _open(kind, place, Path(downloads))


def assign_splits(ids: Iterable[str], own: Iterable[str | None], given: frozenset[str]) -> list[str]:
    """The split of each image: its source's own validation and test, else by a hash of its id.

    Each of validation and test that the source has not `given` takes a tenth of the other ids. So an
    image keeps its split when the source grows.

    >>> assign_splits(["a", "b", "c"], ["test", None, "train"], frozenset({"train", "test"}))
    ['test', 'train', 'train']
    """
    absent = [name for name in ("validation", "test") if name not in given]
    keys = list(ids)
    drawn = _hashed_splits(keys, absent)
    return [name if name in ("validation", "test") else other for other, name in zip(drawn, own, strict=True)]


def id_hashes(keys: Iterable[str]) -> np.ndarray:
    """Stable 64-bit hashes of image ids, uniform, uint64 (N,); splits draw by them."""
    digest = blake3.blake3
    return np.frombuffer(b"".join([digest(key.encode()).digest(8) for key in keys]), "<u8")


def escape(name: bytes) -> str:
    """A file name as an id: UTF-8 as it is, `%` and bytes that are not UTF-8 percent-escaped.

    >>> escape("é.png".encode()), escape(b"100%.png"), escape(bytes([0xFF]) + b".png")
    ('é.png', '100%25.png', '%FF.png')
    """
    try:
        text = name.decode()
    except UnicodeDecodeError:
        decoded = name.decode("utf-8", "surrogateescape")
        return "".join(_escape_character(c) for c in decoded)
    return text.replace("%", "%25")


def unescape(key: str) -> bytes:
    """The file name that `escape` made the id from."""
    return unquote_to_bytes(key) if "%" in key else key.encode()


@dataclass(frozen=True)
class Limited:
    """The `count` images of a source whose hashed ids are smallest: a fair subset, stable as it grows."""

    source: Source
    count: int

    @property
    def uri(self) -> str:
        return self.source.uri

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def native(self) -> tuple[int, int, int]:
        return self.source.native

    @property
    def splits(self) -> frozenset[str]:
        return self.source.splits

    @property
    def hashed(self) -> bool:
        return self.source.hashed

    @property
    def columns(self) -> pa.Schema:
        return self.source.columns

    def listing(self) -> Iterator[pa.RecordBatch]:
        bound = self._bound()
        for rows in self.source.listing():
            chosen = rows.filter(pa.array(_hashes(rows) <= bound))
            if chosen.num_rows:
                yield chosen

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        return self.source.read(rows, limits)

    def _bound(self) -> np.uint64:
        smallest = np.empty(0, np.uint64)
        for rows in self.source.listing():
            smallest = np.sort(np.concatenate([smallest, _hashes(rows)]))[: self.count]
        return smallest[-1] if len(smallest) else np.uint64(0)


def limited(source: Source, count: int | None) -> Source:
    """The source, or a fair subset of `count` of its images, the same ones every time.

    >>> sum(rows.num_rows for rows in limited(open_source("digits"), 10).listing())
    10
    """
    if count is None:
        return source
    if count < 1:
        raise ValueError(f"limit {count}: give at least 1 image")
    return Limited(source, count)


def listed(**columns: Any) -> pa.RecordBatch:
    """A record batch of LISTING from its columns; those not given are null."""
    length = len(columns["id"])
    arrays = [
        pa.nulls(length, item.type)
        if columns.get(item.name) is None
        else pa.array(columns[item.name], item.type)
        for item in LISTING
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=LISTING)


def with_columns(rows: pa.RecordBatch, extra: Sequence[tuple[pa.Field, pa.Array]]) -> pa.RecordBatch:
    """A listing's rows with columns passed through beside them."""
    arrays = [*rows.columns, *(array for _, array in extra)]
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([*rows.schema, *(item for item, _ in extra)]))


def passed(name: str) -> str:
    """The name under which a source's own column is passed through.

    >>> passed("caption"), passed("id")
    ('caption', 'source_id')
    """
    return f"source_{name}" if name in RESERVED else name


def chunked(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` items.

    >>> list(chunked("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def runs(values: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Runs of equal values as (value, start, stop).

    >>> list(runs("aab"))
    [('a', 0, 2), ('b', 2, 3)]
    """
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[start]:
            yield values[start], start, stop
            start = stop


def too_many_bytes(size: int, limits: Limits) -> Reject:
    """The reject of a stored image that is over the cap before it is read."""
    return Reject("too_many_bytes", f"{size} bytes, over the cap of {limits.max_bytes}", "read")


def find_files(place: str, suffix: str) -> tuple[Store, tuple[Entry, ...]]:
    """The store of a folder or of a single file's folder, and the files in it that end with `suffix`."""
    single = place.endswith(suffix)
    folder, _, name = place.rpartition("/") if single else (place, "", "")
    store = open_store(folder or ".").check()
    if store.local is not None and not single:
        check_folder(store.local)
    if single:
        entry = store.stat(name)
        if entry is None:
            raise ValueError(f"no file {store.uri(name)}: check the path")
        return store, (entry,)
    visible = (entry for entry in store.entries() if not re.search(r"(^|/)[._]", entry.path))
    return store, tuple(entry for entry in visible if entry.path.endswith(suffix))


def split_of(path: str) -> str | None:
    """The split that a file's name or top folder tells of.

    >>> split_of("train-00000-of-00002.parquet"), split_of("val/0.tar"), split_of("training_notes.tar")
    ('train', 'validation', None)
    """
    top = re.split(r"[-./]", path, maxsplit=1)[0]
    return SPLIT_NAMES.get(top)


def stem(entry: Entry) -> str:
    """A file's path without its extension, as the first part of its images' ids."""
    return escape(entry.path.encode()).rsplit(".", 1)[0]


def check_folder(folder: Path) -> None:
    """Refuse, in one line, a folder that is missing, a file, or unreadable."""
    if not folder.exists():
        raise ValueError(f"no folder {folder}: check the path")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that holds it")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ValueError(f"cannot read {folder}: permission denied")


def _open(kind: str, place: str, downloads: Path) -> Source:
    """Each kind's module is imported when it is asked for."""
    if kind in ("digits", "idx", "torchvision"):
        from data import arrays

        opened = {
            "digits": arrays.open_digits,
            "idx": lambda: arrays.open_idx(place),
            "torchvision": lambda: arrays.open_torchvision(place, downloads),
        }
        return opened[kind]()
    if kind == "folder":
        from data.folders import open_folder

        return open_folder(place)
    if kind == "tar":
        from data.archives import open_tar

        return open_tar(place)
    if kind == "parquet":
        from data.parquet import open_parquet

        return open_parquet(place)
    from data.snapshot import SnapshotSource, open_snapshot

    return SnapshotSource(open_snapshot(place))


def _hashed_splits(keys: list[str], absent: list[str]) -> list[str]:
    """Train, or one of the absent splits, each a tenth of the ids by their hash."""
    places = id_hashes(keys) / 2.0**64
    first = 1.0 - HELD_OUT * len(absent)
    tenths = np.minimum(((places - first) / HELD_OUT).astype(int), len(absent) - 1)
    names = ["train", *absent]
    return [names[number] for number in np.where(places < first, 0, 1 + tenths).tolist()]


def _hashes(rows: pa.RecordBatch) -> np.ndarray:
    """Other hashes than those that splits draw by: the images with the smallest of those are all in train."""
    return id_hashes([f"limited/{key}" for key in rows["id"].to_pylist()])


def _escape_character(character: str) -> str:
    if character == "%":
        return "%25"
    code = ord(character)
    return f"%{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else character
