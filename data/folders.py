"""Image files in a folder, here or in a bucket; labels from sub-folders or from a table beside them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data.files import in_arrow, parquet_table
from data.images import LIMITS, Limits, Reject
from data.sources import (
    LISTED,
    LISTING,
    NATIVE,
    SPLIT_NAMES,
    SPLITS,
    Payload,
    Source,
    check_folder,
    chunked,
    escape,
    listed,
    passed,
    too_many_bytes,
    unescape,
)
from data.store import Store, open_store

TABLES = tuple(f"{name}.{kind}" for name in ("metadata", "labels") for kind in ("csv", "jsonl", "parquet"))
FILE_NAMES = ("file_name", "file", "path", "id")  # the column of a label table that names the image


@dataclass(frozen=True)
class Labels:
    """A table beside the images: a row names a file, its `label`, its `split` and columns to pass through."""

    names: pa.Array
    table: pa.Table

    @property
    def columns(self) -> pa.Schema:
        return pa.schema([item for item in self.table.schema if item.name not in ("label", "split")])

    def add_to(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """A listing with what the table says of its rows; null for a file that it does not name."""
        found = self.table.take(pc.index_in(rows["id"], self.names)).combine_chunks()
        known = {name: rows[name] for name in rows.schema.names}
        if "label" in found.column_names:
            known["label"] = found["label"].combine_chunks().cast(pa.string())
        if "split" in found.column_names:
            splits = found["split"].to_pylist()
            known["split"] = pa.array([SPLIT_NAMES.get(str(name)) for name in splits], pa.string())
        arrays = [known[item.name] for item in LISTING] + [_one(found[item.name]) for item in self.columns]
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema([*LISTING, *self.columns]))

    @property
    def splits(self) -> frozenset[str]:
        if "split" not in self.table.column_names:
            return frozenset()
        names = (SPLIT_NAMES.get(str(name)) for name in pc.unique(self.table["split"]).to_pylist())
        return frozenset(name for name in names if name)


@dataclass(frozen=True)
class ImageFiles:
    """What files on a disk and objects in a bucket have in common: their names tell what they are."""

    store: Store
    splits: frozenset[str]
    split_folders: bool
    labels: Labels | None
    native: tuple[int, int, int] = NATIVE
    hashed = False

    @property
    def uri(self) -> str:
        return f"folder:{self.store.url}"

    @property
    def name(self) -> str:
        return self.store.url.rsplit("/", 1)[-1] or "folder"

    @property
    def columns(self) -> pa.Schema:
        return self.labels.columns if self.labels else pa.schema([])

    def describe(self, ids: list[str], versions: list[str], sizes: list[int]) -> pa.RecordBatch:
        """Listing rows of files: split and label from their folders, or from the table beside them."""
        folders = [key.split("/")[:-1] for key in ids]
        depth = 1 if self.split_folders else 0
        rows = listed(
            id=ids,
            split=[SPLIT_NAMES[parts[0]] for parts in folders] if self.split_folders else None,
            label=[parts[depth] if len(parts) > depth else None for parts in folders],
            version=versions,
            size=sizes,
        )
        return self.labels.add_to(rows) if self.labels else rows


class FolderSource(ImageFiles):
    """A folder of image files at any depth; the first sub-folder is the label.

    Where all of its top-level folders are split names (train, test, val, …), those are the splits and
    the next folder is the label. A `metadata` or `labels` table (.csv, .jsonl, .parquet) at the top gives
    labels, splits and further columns by file name instead. Files and folders whose name begins with a
    dot are left out. The id is the relative POSIX path. Links to files inside the tree are followed; one
    that leads out of it, or to a folder, is a reject.
    """

    @cached_property
    def root(self) -> bytes:
        """The folder's path, with a slash at its end."""
        return os.fsencode(self.store.url).rstrip(b"/") + b"/"

    def listing(self) -> Iterator[pa.RecordBatch]:
        for listed_ids in chunked(self._walk(""), LISTED):
            ids, versions, sizes = [], [], []
            for key in listed_ids:
                info = _stat(self.root + unescape(key))
                if info is not None:
                    ids.append(key)
                    versions.append(_version(self.root + unescape(key), info))
                    sizes.append(info.st_size)
            if ids:
                yield self.describe(ids, versions, sizes)

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        return [self._read(self.root + unescape(key), limits) for key in rows["id"].to_pylist()]

    def _walk(self, folder: str) -> Iterator[str]:
        """Ids under a folder, in order: a folder sorts as its name and a slash, as its files' ids do."""
        for name in _sorted_names(self.root + unescape(folder)):
            if name.endswith("/"):
                yield from self._walk(folder + name)
            elif folder or name not in TABLES:
                yield folder + name

    def _read(self, path: bytes, limits: Limits) -> bytes | Reject:
        try:
            return read_regular(path, limits)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return self._read_link(path, limits)
            return _unreadable(error)

    def _read_link(self, path: bytes, limits: Limits) -> bytes | Reject:
        target = os.path.realpath(path)
        if not target.startswith(os.path.realpath(self.root) + b"/"):
            return Reject("link_outside", f"a link to {escape(target)}, outside the folder", "read")
        if os.path.isdir(target):
            return Reject("link_folder", "a link to a folder: its images are listed where they lie", "read")
        try:
            return read_regular(target, limits)
        except OSError as error:
            return _unreadable(error)


class BucketSource(ImageFiles):
    """The same under a prefix of a bucket: every object but those of a name that begins with a dot."""

    def listing(self) -> Iterator[pa.RecordBatch]:
        visible = (entry for entry in self.store.entries() if not _hidden(entry.path))
        last = ""
        for entries in chunked((entry for entry in visible if entry.path not in TABLES), LISTED):
            ids = [escape(entry.path.encode()) for entry in entries]
            if sorted([last, *ids]) != [last, *ids]:
                raise ValueError(f"{self.store.url} does not list its objects in order: use another store")
            last = ids[-1]
            versions, sizes = [entry.version for entry in entries], [entry.size for entry in entries]
            yield self.describe(ids, versions, sizes)

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        keys, sizes = rows["id"].to_pylist(), rows["size"].to_pylist()
        return [self._read(key, size, limits) for key, size in zip(keys, sizes, strict=True)]

    def _read(self, key: str, size: int, limits: Limits) -> bytes | Reject:
        if size > limits.max_bytes:
            return too_many_bytes(size, limits)
        try:
            return self.store.get(unescape(key).decode())
        except FileNotFoundError:
            return Reject("missing", "gone since it was listed", "read")


def open_folder(place: str) -> Source:
    """A folder or bucket prefix of image files; ValueError when it is missing, unreadable or empty."""
    store = open_store(place)
    if store.local is not None:
        check_folder(store.local)
    else:
        store.check()
    labels = _open_labels(store)
    tops, files = _tops(store)
    names = frozenset(SPLIT_NAMES.get(name, "") for name in tops)
    split_folders = bool(tops) and not files and names <= set(SPLITS)
    given = labels.splits if labels and labels.splits else names if split_folders else frozenset()
    kind = BucketSource if store.local is None else FolderSource
    source = kind(store, given, split_folders, labels)
    if next(source.listing(), None) is None:
        raise ValueError(f"no files in {store.url}: a folder source needs image files at any depth in it")
    return source


def _stat(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:  # removed since its folder was listed
        return None


def _version(path: bytes, info: os.stat_result) -> str:
    """By time and size; a file that cannot be opened is another version than once it can, to be read then."""
    readable = os.access(path, os.R_OK, effective_ids=True)
    return f"{info.st_mtime_ns:x}-{info.st_size:x}" + ("" if readable else "-unreadable")


def read_regular(path: bytes, limits: Limits) -> bytes | Reject:
    """A regular file's bytes; a link raises OSError(ELOOP), a pipe or a device is never waited on.

    What fails is tried once more: a reject stays in its table, and the hiccup of a disk should not.
    """
    try:
        return _read_once(path, limits)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise
        return _read_once(path, limits)


def _read_once(path: bytes, limits: Limits) -> bytes | Reject:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            return Reject("not_a_file", "a pipe, socket, device or folder", "read")
        if info.st_size > limits.max_bytes:
            return too_many_bytes(info.st_size, limits)
        return _read_all(descriptor, info.st_size)
    finally:
        os.close(descriptor)


def _tops(store: Store) -> tuple[list[str], bool]:
    """Names of the folders at the top, and whether there are image files (or links) beside them."""
    if store.local is None:
        tops = [name for name in store.folders() if not name.startswith(".")]
        first = (entry.path for entry in store.entries())
        return tops, any("/" not in path and not _hidden(path) and path not in TABLES for path in first)
    tops = []
    with _scan(os.fsencode(store.local)) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                tops.append(os.fsdecode(entry.name))
            elif not entry.name.startswith(b".") and os.fsdecode(entry.name) not in TABLES:
                return tops, True  # a flat folder may hold millions: one is enough to know
    return [name for name in tops if not name.startswith(".")], False


def _open_labels(store: Store) -> Labels | None:
    """The label table at the top of a folder, if there is one; ValueError if it cannot be used."""
    present = [name for name in TABLES if store.exists(name)]
    if not present:
        return None
    if len(present) > 1:
        raise ValueError(f"{len(present)} label tables in {store.url}: keep one of {', '.join(present)}")
    place = store.uri(present[0])
    try:
        table = _read_labels(store.get(present[0]), present[0])
    except pa.ArrowInvalid as error:
        raise ValueError(f"{place} cannot be read: {str(error).splitlines()[0]}") from None
    key = next((name for name in FILE_NAMES if name in table.column_names), None)
    if key is None:
        raise ValueError(f"{place} has no column {', '.join(FILE_NAMES)} that names the image of each row")
    names = pa.array([escape(os.fsencode(str(name))) for name in table[key].to_pylist()], pa.string())
    if len(pc.unique(names)) != len(names):
        raise ValueError(f"{place} names a file more than once in its column {key}")
    table = table.drop_columns([key])
    kept = {"label", "split"}
    return Labels(
        names, table.rename_columns([name if name in kept else passed(name) for name in table.column_names])
    )


def _read_labels(data: bytes, name: str) -> pa.Table:
    """The label table's columns; text stays text, so that a label 007 is not the number 7."""
    if name.endswith(".parquet"):
        return parquet_table(data)
    if name.endswith(".jsonl"):
        from pyarrow import json

        return json.read_json(in_arrow(data))
    from pyarrow import csv

    with csv.open_csv(in_arrow(data)) as reader:
        known = dict.fromkeys(set(reader.schema.names) & {"label", "split", *FILE_NAMES}, pa.string())
    return csv.read_csv(in_arrow(data), convert_options=csv.ConvertOptions(column_types=known))


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _sorted_names(folder: bytes) -> Iterator[str]:
    """Escaped names in a folder, sub-folders with a slash at their end, sorted.

    They are kept in Arrow, since a million Python strings weigh five times as much.
    """
    with _scan(folder) as entries:
        names = (
            escape(entry.name) + ("/" if entry.is_dir(follow_symlinks=False) else "")
            for entry in entries
            if not entry.name.startswith(b".")
        )
        chunks = [pa.array(chunk, pa.string()) for chunk in chunked(names, LISTED)]
    table = pa.chunked_array(chunks, pa.string())
    order = pc.sort_indices(table)
    for start in range(0, len(order), LISTED):
        yield from table.take(order.slice(start, LISTED)).to_pylist()


def _scan(folder: bytes) -> Any:
    try:
        return os.scandir(folder)
    except PermissionError:
        raise ValueError(f"cannot read {escape(folder)}: permission denied") from None


def _read_all(descriptor: int, size: int) -> bytes:
    data = os.read(descriptor, size + 1)
    while len(data) < size:  # a signal or a network disk may return less
        more = os.read(descriptor, size + 1 - len(data))
        if not more:
            break
        data += more
    return data


def _unreadable(error: OSError) -> Reject:
    """The reject of a file that cannot be read; failures of the machine itself are raised."""
    if isinstance(error, FileNotFoundError):
        return Reject("missing", "gone since it was listed, or a link to nothing", "read")
    if isinstance(error, PermissionError):
        return Reject("unreadable", "permission denied", "read")
    if error.errno in (errno.EIO, errno.ENXIO, errno.ELOOP, errno.EISDIR, errno.ENOTDIR):
        return Reject("unreadable", os.strerror(error.errno), "read")
    raise error
