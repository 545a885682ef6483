"""A digest of a listing, which depends on its rows and not on the batches they came in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import blake3
import pyarrow as pa
import pyarrow.compute as pc

PLACES = frozenset({"file", "position", "size"})  # columns of a listing that say where an image lies


def listing_digest(rows: Iterable[pa.RecordBatch]) -> str:
    """A digest of a listing's ids, versions, splits and labels, however it is cut into batches."""
    hasher = ListingHasher()
    for batch in rows:
        hasher.update(batch)
    return hasher.digest()


class ListingHasher:
    """Hashes a listing column by column, so that the digest depends on its rows, not its batches.

    Where an image lies is left out: one that was only moved inside its archive is the same.
    """

    def __init__(self) -> None:
        # A column's lengths and its texts each have their own: interleaved, they would show the batches.
        self._lengths: dict[str, Any] = defaultdict(blake3.blake3)
        self._texts: dict[str, Any] = defaultdict(blake3.blake3)

    def update(self, batch: pa.RecordBatch | pa.Table) -> None:
        for name in batch.schema.names:
            if name not in PLACES:
                texts = as_text(batch.column(name))
                lengths = pc.fill_null(pc.cast(pc.binary_length(texts), pa.int64()), -1)
                self._lengths[name].update(lengths.to_numpy(zero_copy_only=False).tobytes())
                self._texts[name].update("".join(text for text in texts.to_pylist() if text).encode())

    def digest(self) -> str:
        whole = blake3.blake3()
        for name in sorted(self._lengths):
            whole.update(name.encode() + self._lengths[name].digest() + self._texts[name].digest())
        return whole.hexdigest(length=16)


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Any column as strings, null where it is null; equal values give equal texts."""
    if pa.types.is_string(column.type):
        return column
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        return pa.array([None if value is None else repr(value) for value in column.to_pylist()], pa.string())
    return column.cast(pa.string())
