"""A split of a snapshot file by file: what training reads when it may be larger than memory."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow.compute as pc

from data.commit import StoredFile, read_file
from data.snapshot import Snapshot, pixels_of


class Split:
    """The images of one split, in order of id, as blocks: one for each file of the snapshot that has some.

    Of all that is read only the latest block is kept, decoded: a file's, which is 64 MiB at most.

    >>> from data.images import DecodePath
    >>> from data.snapshot import ingest
    >>> from data.sources import open_source
    >>> from data.store import open_store
    >>> split = Split(ingest(open_source("digits"), DecodePath(), open_store("memory://split")), "train")
    >>> split.sizes, split.read(0).shape
    ((1451,), (1451, 1, 8, 8))
    """

    def __init__(self, snapshot: Snapshot, split: str):
        self.snapshot, self.split = snapshot, split
        self._latest: tuple[int, np.ndarray] | None = None

    @cached_property
    def _files(self) -> list[tuple[StoredFile, int]]:
        """The files with images of the split, and how many. Without any, nothing is read."""
        if not self.snapshot.counts.get(self.split):
            return []
        store = self.snapshot.manifest.store
        tables = ((file, read_file(store, file, ["split"])) for file in self.snapshot.manifest.parts)
        counted = (
            (file, pc.sum(pc.equal(table["split"], self.split)).as_py() or 0) for file, table in tables
        )
        return [(file, count) for file, count in counted if count]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many images each block has."""
        return tuple(count for _, count in self._files)

    @property
    def digest(self) -> str:
        """The snapshot's fingerprint, which its images and splits determine, and the split."""
        return f"{self.snapshot.fingerprint}/{self.split}"

    def read(self, block: int) -> np.ndarray:
        """The images of one block, uint8 (N, C, H, W); ValueError for a file that is damaged."""
        if self._latest is None or self._latest[0] != block:
            self._latest = None  # not both in memory at once
            file, _ = self._files[block]
            table = read_file(self.snapshot.manifest.store, file, ["split", "image"])
            chosen = table.filter(pc.equal(table["split"], self.split))
            self._latest = block, pixels_of(chosen["image"], self.snapshot.decode)
        return self._latest[1]
