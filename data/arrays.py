"""Sources whose images come as arrays: scikit-learn's digits, idx files, torchvision's small sets.

Shapes: N images, H W pixels, C channels; pixels are uint8 (N, H, W, C).
"""

from __future__ import annotations

import gzip
import inspect
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.images import LIMITS, Limits, pixel_hashes
from data.sources import LISTED, SPLIT_NAMES, Payload, Source, check_folder, listed, runs
from data.store import Store, open_store


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
            version=[digest.hex() for digest in pixel_hashes(self.parts[part].pixels(positions))],
            file=[part] * len(positions),
            position=positions,
        )


@dataclass(frozen=True)
class Part:
    """One split of an array source: how many images, their labels or None, and how to get pixels."""

    count: int
    labels: np.ndarray | None
    pixels: Callable[[np.ndarray], np.ndarray]


def open_digits() -> Source:
    """The 1,797 handwritten digits that scikit-learn ships: 8x8 grey, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return ArraySource(
        "digits", "digits", (1, 8, 8), {"digits": Part(len(images), bunch.target, images.__getitem__)}
    )


def open_idx(place: str) -> Source:
    """The MNIST file format, plain or .gz: MNIST, Fashion-MNIST, KMNIST, EMNIST.

    `place` is the folder or URL of the files, or that and a set's prefix where it holds several sets
    (`DIR/emnist-letters`). EMNIST's images, stored transposed, are turned upright.
    """
    store, wanted, files = _idx_files(place)
    parts, shapes = {}, {}
    for part in sorted({part for part, content in files if content == "images"}):
        parts[part], shapes[part] = _idx_part(store, files[part, "images"], files.get((part, "labels")))
    if not parts:
        raise ValueError(
            f"no image files in {store.url}: an idx source needs train-images-idx3-ubyte or the like"
        )
    if len(set(shapes.values())) > 1:
        raise ValueError(f"images of different sizes in {store.url}: {shapes}")
    height, width = next(iter(shapes.values()))
    url = store.uri(wanted)
    return ArraySource(f"idx:{url}", url.rsplit("/", 1)[-1] or "idx", (1, height, width), parts)


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


_IDX_NAME = re.compile(
    r"(?P<set>.*?)-?(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(\.gz)?"
)


def _idx_files(place: str) -> tuple[Store, str, dict[tuple[str, str], str]]:
    """The store, the set's prefix if one was given, and its files by (split, 'images' or 'labels')."""
    store, wanted = open_store(place), ""
    if store.local is None and not any(map(_IDX_NAME.fullmatch, store.check().files())):
        store, wanted = _parent(store)
    elif store.local is not None and not store.local.is_dir():
        store, wanted = _parent(store)
        if not any(store.local.glob(f"{wanted}-*-ubyte*")):  # type: ignore[union-attr]
            raise ValueError(f"no folder {place}: check the path")
    if store.local is not None:
        check_folder(store.local)
    sets: dict[str, dict[tuple[str, str], str]] = {}
    for name in reversed(store.files()):  # so that a plain file goes before its .gz
        match = _IDX_NAME.fullmatch(name)
        if match and wanted in ("", match["set"]):
            part = "test" if match["part"] == "t10k" else match["part"]
            sets.setdefault(match["set"], {})[part, match["what"]] = name
    if len(sets) > 1:
        raise ValueError(
            f"several sets in {store.url}: write idx:{store.url}/ and one of {', '.join(sorted(sets))}"
        )
    return store, wanted, next(iter(sets.values()), {})


def _parent(store: Store) -> tuple[Store, str]:
    above, _, name = store.url.rpartition("/")
    return open_store(above or "/"), name


def _idx_part(store: Store, images: str, labels: str | None) -> tuple[Part, tuple[int, int]]:
    count, height, width = _idx_header(store, images, 3)
    turned = images.startswith("emnist")
    values = None
    if labels is not None:
        (labelled,) = _idx_header(store, labels, 1)
        if labelled != count:
            raise ValueError(
                f"{store.uri(labels)} has {labelled} labels, {store.uri(images)} has {count} images"
            )
        values = _idx_rows(store, labels, (1,), 8)(np.arange(labelled))[:, 0]
    rows = _idx_rows(store, images, (height, width), 16)

    def pixels(positions: np.ndarray) -> np.ndarray:
        found = rows(positions)
        return (found.transpose(0, 2, 1) if turned else found)[..., None]

    return Part(count, values, pixels), ((width, height) if turned else (height, width))


def _idx_header(store: Store, name: str, axes: int) -> tuple[int, ...]:
    """The sizes in an idx file's header, checked against its magic number and its length."""
    path = store.uri(name)
    with _idx_open(store, name) as file:
        try:
            header = file.read(4 + 4 * axes)
            length = file.seek(0, io.SEEK_END) if not name.endswith(".gz") else len(header) + _drain(file)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    if header[:4] != bytes([0, 0, 8, axes]) or len(header) < 4 + 4 * axes:
        raise ValueError(f"{path} is no idx file of {axes}-dimensional uint8: it begins with {header[:4]!r}")
    sizes = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
    expected = 4 + 4 * axes + math.prod(sizes)
    if length != expected:
        raise ValueError(f"{path} has {length} bytes, its header {sizes} asks for {expected}")
    return sizes


@contextmanager
def _idx_open(store: Store, name: str) -> Iterator[Any]:
    try:
        raw = store.open(name)
    except OSError as error:
        raise ValueError(f"cannot read {store.uri(name)}: {error.strerror or error}") from None
    with raw, gzip.open(raw) if name.endswith(".gz") else nullcontext(raw) as file:
        yield file


def _drain(file: Any) -> int:
    return sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))


def _idx_rows(
    store: Store, name: str, shape: tuple[int, ...], offset: int
) -> Callable[[np.ndarray], np.ndarray]:
    """A function of row numbers; a plain file is read as it is asked for, a .gz held in memory."""
    if name.endswith(".gz"):
        with _idx_open(store, name) as file:
            whole = np.frombuffer(file.read(), np.uint8, offset=offset).reshape(-1, *shape)
        return whole.__getitem__

    def rows(positions: np.ndarray) -> np.ndarray:
        if not len(positions):
            return np.empty((0, *shape), np.uint8)
        first, last = int(positions.min()), int(positions.max())
        size = math.prod(shape)
        block = store.get_range(name, offset + first * size, offset + (last + 1) * size)
        return np.frombuffer(block, np.uint8).reshape(-1, *shape)[positions - first]

    return rows


def _torchvision_set(maker: Any, downloads: Path, split: str) -> Any:
    """The set's train or test half; torchvision's classes ask for it in one of two ways."""

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
