"""Where images come from: one reader a kind of source, all listing and reading the same way.

A source first **lists** its images, cheaply, lazily and in order of id, as record batches of `LISTING`
(plus columns passed through); later it **reads** any rows of that listing, as stored bytes or as pixels.
Listing rows are all a worker needs, so shards are planned from them and read by other processes.
"""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

import blake3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.images import LIMITS, Limits, Reject, pixel_hash

LISTING = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string()),  # the source's own: train, validation, test or none
        pa.field("label", pa.string()),
        pa.field("version", pa.string()),  # changes when the image does
        pa.field("file", pa.string()),  # where it lies, for sources that need more than the id
        pa.field("position", pa.int64()),
        pa.field("size", pa.int64()),
    ]
)
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
HELD_OUT = 0.1  # share of ids that each split the source lacks takes from its training ids

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

    `digits`, `idx:DIR`, `folder:DIR`, `torchvision:NAME` (fetched under `downloads`) and `snapshot:DIR`.

    >>> source = open_source("digits")
    >>> source.native, sum(batch.num_rows for batch in source.listing())
    ((1, 8, 8), 1797)
    """
    kind, _, place = uri.partition(":")
    if kind not in KINDS:
        hint = f"; for a folder of images write folder:{uri}" if os.path.isdir(uri) else ""
        raise ValueError(f"unknown source {uri!r}: give one of {', '.join(KIND_NAMES)}{hint}")
    if kind != "digits" and not place:
        raise ValueError(f"source {uri!r} names no place: write {kind}:PLACE")
    if kind == "torchvision":
        return open_torchvision(place, Path(downloads))
    return KINDS[kind](place)


def assign_splits(ids: Iterable[str], own: Iterable[str | None], given: frozenset[str]) -> list[str]:
    """The split of each image: its source's own validation and test, else by a hash of its id.

    Each of validation and test that the source has not `given` takes a tenth of the other ids. So an
    image keeps its split when the source grows.

    >>> assign_splits(["a", "b", "c"], ["test", None, "train"], frozenset({"train", "test"}))
    ['test', 'train', 'train']
    """
    absent = [name for name in ("validation", "test") if name not in given]
    return [
        name if name in ("validation", "test") else _hashed_split(key, absent)
        for key, name in zip(ids, own, strict=True)
    ]


def id_hash(key: str) -> int:
    """A stable 64-bit hash of an image id, uniform; splits and `limited` draw by it."""
    return int.from_bytes(blake3.blake3(key.encode()).digest(8), "little")


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
    return unquote_to_bytes(key)


@dataclass(frozen=True)
class ArraySource:
    """Images that come as arrays, one a split: digits, idx files, torchvision's small sets.

    `pixels` maps a split (or the source's name, where it has none) to a function of row numbers that
    returns uint8 (N, H, W, C). Ids are split/index, with nine digits so that they sort as numbers do.
    """

    uri: str
    name: str
    native: tuple[int, int, int]
    parts: dict[str, Part]
    columns: pa.Schema = field(default_factory=lambda: pa.schema([]))
    hashed = True

    @property
    def splits(self) -> frozenset[str]:
        return frozenset(SPLIT_NAMES[part] for part in self.parts if part in SPLIT_NAMES)

    def listing(self) -> Iterator[pa.RecordBatch]:
        for part in sorted(self.parts):
            for start in range(0, self.parts[part].count, LISTED):
                yield self._listing(part, start, min(start + LISTED, self.parts[part].count))

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        files = rows["file"].to_pylist()
        positions = rows["position"].to_numpy()
        groups = [self.parts[part].pixels(positions[a:b]) for part, a, b in runs(files)]
        return groups[0] if len(groups) == 1 else np.concatenate(groups)

    def _listing(self, part: str, start: int, stop: int) -> pa.RecordBatch:
        positions = np.arange(start, stop)
        labels = self.parts[part].labels
        return listed(
            id=[f"{part}/{i:09d}" for i in positions],
            split=[SPLIT_NAMES.get(part)] * len(positions),
            label=None if labels is None else [str(label) for label in labels[start:stop]],
            version=[pixel_hash(image).hex() for image in self.parts[part].pixels(positions)],
            file=[part] * len(positions),
            position=positions,
        )


@dataclass(frozen=True)
class Part:
    """One split of an array source: how many images, their labels or None, and how to get pixels."""

    count: int
    labels: np.ndarray | None
    pixels: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class FolderSource:
    """A folder of image files at any depth; the first sub-folder is the label.

    Where all of its top-level folders are split names (train, test, val, …), those are the splits and
    the next folder is the label. Files and folders whose name begins with a dot are left out. The id is
    the relative POSIX path. Links to files inside the tree are followed; one that leads out of it, or to
    a folder, is a reject.
    """

    root: Path
    splits: frozenset[str]
    native: tuple[int, int, int] = (3, 64, 64)
    columns: pa.Schema = field(default_factory=lambda: pa.schema([]))
    hashed = False

    @property
    def uri(self) -> str:
        return f"folder:{self.root}"

    @property
    def name(self) -> str:
        return self.root.name or "folder"

    def listing(self) -> Iterator[pa.RecordBatch]:
        for ids in chunked(self._walk(b""), LISTED):
            stats = [self._stat(key) for key in ids]
            found = [(key, info) for key, info in zip(ids, stats, strict=True) if info is not None]
            if found:
                yield self._rows([key for key, _ in found], [info for _, info in found])

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        base = os.fsencode(self.root) + b"/"
        return [self._read(base + unescape(key), limits) for key in rows["id"].to_pylist()]

    def _walk(self, folder: bytes) -> Iterator[str]:
        """Ids under a folder, in order: a folder sorts as its name and a slash, as its files' ids do."""
        for name in _sorted_names(os.path.join(os.fsencode(self.root), folder)):
            path = folder + unescape(name)
            if name.endswith("/"):
                yield from self._walk(path)
            else:
                yield escape(path)

    def _stat(self, key: str) -> os.stat_result | None:
        try:
            return os.lstat(os.fsencode(self.root) + b"/" + unescape(key))
        except FileNotFoundError:  # removed since its folder was listed
            return None

    def _rows(self, ids: list[str], stats: list[os.stat_result]) -> pa.RecordBatch:
        folders = [key.split("/")[:-1] for key in ids]
        depth = 1 if self.splits else 0
        return listed(
            id=ids,
            split=[SPLIT_NAMES[parts[0]] for parts in folders] if self.splits else None,
            label=[parts[depth] if len(parts) > depth else None for parts in folders],
            version=[f"{info.st_mtime_ns:x}-{info.st_size:x}" for info in stats],
            size=[info.st_size for info in stats],
        )

    def _read(self, path: bytes, limits: Limits) -> bytes | Reject:
        try:
            return read_regular(path, limits)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return self._read_link(path, limits)
            return _unreadable(error)

    def _read_link(self, path: bytes, limits: Limits) -> bytes | Reject:
        target = os.path.realpath(path)
        if not target.startswith(os.path.realpath(os.fsencode(self.root)) + b"/"):
            return Reject("link_outside", f"a link to {escape(target)}, outside the folder", "read")
        if os.path.isdir(target):
            return Reject("link_folder", "a link to a folder: its images are listed where they lie", "read")
        try:
            return read_regular(target, limits)
        except OSError as error:
            return _unreadable(error)


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


def read_regular(path: bytes, limits: Limits) -> bytes | Reject:
    """A regular file's bytes; a link raises OSError(ELOOP), a pipe or a device is never waited on."""
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


def too_many_bytes(size: int, limits: Limits) -> Reject:
    """The reject of a stored image that is over the cap before it is read."""
    return Reject("too_many_bytes", f"{size} bytes, over the cap of {limits.max_bytes}", "read")


def open_digits(_: str) -> Source:
    """The 1,797 handwritten digits that scikit-learn ships: 8x8 grey, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return ArraySource(
        "digits", "digits", (1, 8, 8), {"digits": Part(len(images), bunch.target, images.__getitem__)}
    )


def open_idx(place: str) -> Source:
    """The MNIST file format, plain or .gz: MNIST, Fashion-MNIST, KMNIST, EMNIST.

    `place` is the folder of the files, or that folder and a set's prefix where it holds several sets
    (`DIR/emnist-letters`). EMNIST's images, stored transposed, are turned upright.
    """
    folder, files = _idx_files(place)
    parts, shapes = {}, {}
    for part in sorted({part for part, content in files if content == "images"}):
        parts[part], shapes[part] = _idx_part(files[part, "images"], files.get((part, "labels")))
    if not parts:
        raise ValueError(
            f"no image files in {folder}: an idx source needs train-images-idx3-ubyte or the like"
        )
    if len(set(shapes.values())) > 1:
        raise ValueError(f"images of different sizes in {folder}: {shapes}")
    height, width = next(iter(shapes.values()))
    name = os.path.basename(place.rstrip("/"))
    return ArraySource(f"idx:{os.path.abspath(place)}", name or "idx", (1, height, width), parts)


def open_folder(place: str) -> Source:
    """A folder of image files; ValueError when it is missing, unreadable or has no file in it."""
    root = Path(os.path.abspath(os.path.expanduser(place)))
    _check_folder(root)
    tops = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    split = bool(tops) and all(entry.is_dir(follow_symlinks=False) for entry in tops)
    names = frozenset(SPLIT_NAMES.get(entry.name, "") for entry in tops)
    source = FolderSource(root, names if split and names <= set(SPLITS) else frozenset())
    if next(source.listing(), None) is None:
        raise ValueError(f"no files in {root}: a folder source needs image files at any depth in it")
    return source


def open_torchvision(name: str, downloads: Path) -> Source:
    """One of torchvision's image sets, fetched under `downloads` unless it is there already."""
    try:
        import torchvision.datasets as sets
    except ImportError:
        raise ValueError(f"torchvision:{name} needs torchvision: install vae-flows[torchvision]") from None
    maker = getattr(sets, name, None)
    if not isinstance(maker, type):
        raise ValueError(f"torchvision has no data set {name!r}: see torchvision.datasets")
    parts, shapes = {}, set()
    for split in ("train", "test"):
        dataset = _torchvision_set(maker, downloads, split)
        pixels = _torchvision_pixels(dataset, name)
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        parts[split] = Part(len(pixels), None if labels is None else np.asarray(labels), pixels.__getitem__)
        shapes.add(pixels.shape[1:])
    ((height, width, channels),) = shapes
    return ArraySource(f"torchvision:{name}", name.lower(), (channels, height, width), parts)


def open_snapshot_source(place: str) -> Source:
    """An ingested snapshot, read back as a source; its splits stay as they were ingested."""
    from data.snapshot import SnapshotSource, open_snapshot

    return SnapshotSource(open_snapshot(place))


KINDS: dict[str, Callable[[str], Source]] = {
    "digits": open_digits,
    "idx": open_idx,
    "folder": open_folder,
    "snapshot": open_snapshot_source,
    "torchvision": lambda name: open_torchvision(name, Path("downloads")),
}
KIND_NAMES = ("digits", "idx:DIR", "folder:DIR", "torchvision:NAME", "snapshot:DIR")


def _hashed_split(key: str, absent: list[str]) -> str:
    place = id_hash(key) / 2.0**64
    first = 1.0 - HELD_OUT * len(absent)
    return "train" if place < first else absent[min(int((place - first) / HELD_OUT), len(absent) - 1)]


def _hashes(rows: pa.RecordBatch) -> np.ndarray:
    return np.array([id_hash(key) for key in rows["id"].to_pylist()], np.uint64)


def _escape_character(character: str) -> str:
    if character == "%":
        return "%25"
    code = ord(character)
    return f"%{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else character


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
        table = pa.chunked_array(
            [pa.array(chunk, pa.string()) for chunk in chunked(names, LISTED)], pa.string()
        )
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


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise ValueError(f"no folder {folder}: check the path")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that holds it")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ValueError(f"cannot read {folder}: permission denied")


_IDX_NAME = re.compile(
    r"(?P<set>.*?)-?(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(\.gz)?"
)


def _idx_files(place: str) -> tuple[Path, dict[tuple[str, str], Path]]:
    """The folder and its files by (split, 'images' or 'labels'), of one set only."""
    path = Path(os.path.abspath(os.path.expanduser(place)))
    folder, wanted = (path, None) if path.is_dir() else (path.parent, path.name)
    if wanted is not None and not any(folder.glob(f"{wanted}-*-ubyte*")):
        raise ValueError(f"no folder {path}: check the path")
    _check_folder(folder)
    sets: dict[str, dict[tuple[str, str], Path]] = {}
    for file in sorted(folder.iterdir(), reverse=True):  # so that a plain file goes before its .gz
        match = _IDX_NAME.fullmatch(file.name)
        if match and wanted in (None, match["set"]):
            part = "test" if match["part"] == "t10k" else match["part"]
            sets.setdefault(match["set"], {})[part, match["what"]] = file
    if len(sets) > 1:
        raise ValueError(
            f"several sets in {folder}: write idx:{folder}/ and one of {', '.join(sorted(sets))}"
        )
    return folder, next(iter(sets.values()), {})


def _idx_part(images: Path, labels: Path | None) -> tuple[Part, tuple[int, int]]:
    count, height, width = _idx_header(images, 3)
    turned = images.name.startswith("emnist")
    values = None
    if labels is not None:
        (labelled,) = _idx_header(labels, 1)
        if labelled != count:
            raise ValueError(f"{labels} has {labelled} labels, {images} has {count} images")
        values = _idx_rows(labels, (1,), 8)(np.arange(labelled))[:, 0]
    rows = _idx_rows(images, (height, width), 16)

    def pixels(positions: np.ndarray) -> np.ndarray:
        found = rows(positions)
        return (found.transpose(0, 2, 1) if turned else found)[..., None]

    return Part(count, values, pixels), ((width, height) if turned else (height, width))


def _idx_header(path: Path, axes: int) -> tuple[int, ...]:
    """The sizes in an idx file's header, checked against its magic number and its length."""
    with _idx_open(path) as file:
        try:
            header = file.read(4 + 4 * axes)
            length = file.seek(0, io.SEEK_END) if path.suffix != ".gz" else len(header) + _drain(file)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    if header[:4] != bytes([0, 0, 8, axes]) or len(header) < 4 + 4 * axes:
        raise ValueError(f"{path} is no idx file of {axes}-dimensional uint8: it begins with {header[:4]!r}")
    sizes = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
    expected = 4 + 4 * axes + math.prod(sizes)
    if length != expected:
        raise ValueError(f"{path} has {length} bytes, its header {sizes} asks for {expected}")
    return sizes


def _idx_open(path: Path) -> Any:
    try:
        return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _drain(file: Any) -> int:
    return sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))


def _idx_rows(path: Path, shape: tuple[int, ...], offset: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function of row numbers; a plain file is read as it is asked for, a .gz held in memory."""
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            whole = np.frombuffer(file.read(), np.uint8, offset=offset).reshape(-1, *shape)
        return whole.__getitem__

    def rows(positions: np.ndarray) -> np.ndarray:
        if not len(positions):
            return np.empty((0, *shape), np.uint8)
        first, last = int(positions.min()), int(positions.max())
        size = math.prod(shape)
        block = np.fromfile(path, np.uint8, (last - first + 1) * size, offset=offset + first * size)
        return block.reshape(-1, *shape)[positions - first]

    return rows


def _torchvision_set(maker: Any, downloads: Path, split: str) -> Any:
    """The set's train or test half; torchvision's classes ask for it in one of two ways."""
    import inspect

    choice: dict[str, Any] = {"train": split == "train"}
    if "train" not in inspect.signature(maker).parameters:
        choice = {"split": split}
    root = str(downloads)
    try:
        return maker(root, download=True, **choice)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"torchvision:{maker.__name__} under {root}: {str(error).splitlines()[0]}") from None


def _torchvision_pixels(dataset: Any, name: str) -> np.ndarray:
    """uint8 (N, H, W, C) of the sets that keep their images in one array."""
    pixels = np.asarray(getattr(dataset, "data", None))
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(f"torchvision:{name} keeps files, not one array: give its folder as folder:DIR")
    if pixels.ndim == 3:
        return pixels[..., None]
    return pixels.transpose(0, 2, 3, 1) if pixels.shape[1] in (1, 3) else pixels
