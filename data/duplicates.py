"""How many images of a table have the bytes of another, counted out of core.

Shapes: N content hashes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.files import StoredFile
from data.parquet import open_parquet_file
from data.store import Store

HASHES_AT_ONCE = 1_000_000  # sorted in memory: some 40 MB
MOST_PILES = 512  # files open at once


def count_duplicates(store: Store, files: Sequence[StoredFile]) -> int:
    """Images beyond the first of each set of equal content hashes in a table's files.

    Only the column of hashes is read, once. More than fit in memory are dealt onto piles in a temporary
    folder (16 bytes an image), equal ones onto the same pile, and each pile is counted on its own.
    """
    rows = sum(file.rows for file in files)
    piles = min(-(-rows // HASHES_AT_ONCE), MOST_PILES)
    hashes = (_hashes(store, file) for file in files)
    if piles <= 1:
        return _repeats(np.concatenate([np.empty((0, 2), np.uint64), *hashes]))
    with tempfile.TemporaryDirectory(prefix="vae-flows-duplicates-") as folder:
        return sum(_repeats(pile) for pile in _deal(hashes, piles, Path(folder)))


def _deal(blocks: Iterator[np.ndarray], piles: int, folder: Path) -> Iterator[np.ndarray]:
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / str(pile), "wb")) for pile in range(piles)]
        for block in blocks:
            pile = block[:, 0] % np.uint64(piles)
            order = np.argsort(pile, kind="stable")
            bounds = np.searchsorted(pile[order], np.arange(piles + 1))
            for file, start, stop in zip(files, bounds[:-1], bounds[1:], strict=True):
                file.write(block[order[start:stop]].tobytes())
    for number in range(piles):
        yield np.fromfile(folder / str(number), np.uint64).reshape(-1, 2)


def _repeats(hashes: np.ndarray) -> int:
    """How many of these hashes, uint64 (N, 2), equal one before them in sorted order."""
    ordered = hashes[np.lexsort((hashes[:, 1], hashes[:, 0]))]
    return int((ordered[1:] == ordered[:-1]).all(1).sum())


def _hashes(store: Store, file: StoredFile) -> np.ndarray:
    """The content hashes of a file, uint64 (N, 2), page checksums verified."""
    column = open_parquet_file(store, file.path).read(["content_hash"], use_threads=False)["content_hash"]
    return np.concatenate([np.empty((0, 2), np.uint64), *(_words(chunk) for chunk in column.chunks)])


def _words(chunk: pa.FixedSizeBinaryArray) -> np.ndarray:
    words = np.frombuffer(chunk.buffers()[1], np.uint64, 2 * len(chunk), 16 * chunk.offset)
    return words.reshape(-1, 2)
