"""Training images, resident on the device or streamed past it: the same batches either way.

An epoch's order is a function of (seed, epoch), made so that a stream of bounded memory can keep it. Images
come in blocks that are read whole, such as the files of a snapshot. The blocks are taken in random order and
their rows, as they come, fill windows, each of which is shuffled in itself. Where all rows fit into one
window, as most sets do, that is one permutation of them all.

Legend: N images, B batch, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vae import pixels
from vae.random import permutation

logger = logging.getLogger("vae")
MIB = 2**20
PICKED = MIB
"""Bytes of resident images that are picked at a time: after a step the caches are cold, a call is dear."""


class Blocks(Protocol):
    """Images in blocks that are read whole: uint8 (N, C, H, W) each."""

    @property
    def sizes(self) -> Sequence[int]:
        """How many images each block has."""

    @property
    def digest(self) -> str:
        """What names these very images, so that a resumed run is known to see the same."""

    def read(self, block: int) -> np.ndarray:
        """The images of one block."""


@dataclass(frozen=True)
class Array:
    """An array as one block."""

    images: np.ndarray

    @property
    def sizes(self) -> Sequence[int]:
        return (len(self.images),)

    @property
    def digest(self) -> str:
        """Of the pixels and their shape."""
        state = hashlib.blake2b(repr(self.images.shape).encode(), digest_size=16)
        state.update(np.ascontiguousarray(self.images).data)
        return state.hexdigest()

    def read(self, block: int) -> np.ndarray:
        return self.images


class Piece(NamedTuple):
    """Rows start to stop of a block."""

    block: int
    start: int
    stop: int


def windows(
    seed: int, epoch: int, sizes: Sequence[int], rows: int, first: int = 0
) -> Iterator[tuple[list[Piece], Tensor]]:
    """The windows of an epoch, from number `first`: the pieces that fill each, and the order of their rows.

    >>> [(pieces, len(order)) for pieces, order in windows(0, 0, [3, 4], rows=4)]
    [([Piece(block=1, start=0, stop=4)], 4), ([Piece(block=0, start=0, stop=3)], 3)]
    """
    if sum(sizes) <= rows:
        whole = [Piece(block, 0, size) for block, size in enumerate(sizes)]
        yield whole, permutation(seed, epoch, sum(sizes))
        return
    order = permutation(seed, f"{epoch}/blocks", len(sizes)).tolist()
    for number, pieces in enumerate(_filled(order, sizes, rows)):
        if number >= first:
            size = sum(piece.stop - piece.start for piece in pieces)
            yield pieces, permutation(seed, f"{epoch}/{number}", size)


def _filled(order: Sequence[int], sizes: Sequence[int], rows: int) -> Iterator[list[Piece]]:
    pieces: list[Piece] = []
    room = rows
    for block in order:
        start = 0
        while start < sizes[block]:
            stop = min(start + room, sizes[block])
            pieces.append(Piece(block, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], rows
    if pieces:
        yield pieces


class Batch(NamedTuple):
    """Images uint8 (B, C, H, W) on the device, and the number of each in the data set, int64 (B,)."""

    images: Tensor
    rows: Tensor


class Feed:
    """Batches of training images in the order of each epoch.

    budget: bytes of images that may be resident on the device; more are streamed from their blocks, a window
    of `window_bytes` at a time with the next one read ahead, through pinned memory to a GPU.
    """

    def __init__(
        self,
        blocks: Blocks,
        seed: int,
        batch_size: int,
        window_bytes: int,
        budget: int,
        device: torch.device,
    ):
        self.blocks, self.seed, self.batch_size, self.device = blocks, seed, batch_size, device
        self.count = sum(blocks.sizes)
        self.starts = [0, *itertools.accumulate(blocks.sizes)]
        self.shape = blocks.read(0).shape[1:]
        self.image_bytes = math.prod(self.shape)
        # whole batches, so that no batch is in two windows
        self.rows = max(1, window_bytes // self.image_bytes // batch_size) * batch_size
        self.resident = self._reside() if self.count * self.image_bytes <= budget else None
        mib = self.count * self.image_bytes / MIB
        place = f"streamed, {self.rows} at a time" if self.resident is None else f"resident on {device}"
        logger.info("train: %d images of %.1f MiB, %s", self.count, mib, place)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (from 0), from number `first`; each is good until the next is asked for."""
        size, per_window = self.batch_size, self.rows // self.batch_size
        skipped, inside = divmod(first, per_window)
        found = windows(self.seed, epoch, self.blocks.sizes, self.rows, skipped)
        for images, index in self._resident(found) if self.resident is not None else self._streamed(found):
            index = index[inside * size :]
            if self.resident is not None:
                yield from self._picked(index)
            else:
                yield from self._moved(images[inside * size :], index)
            inside = 0

    def _picked(self, index: Tensor) -> Iterator[Batch]:
        """Batches of the resident images, several picked at a time."""
        assert self.resident is not None
        several = max(1, PICKED // (self.image_bytes * self.batch_size)) * self.batch_size
        for rows in index.split(several):
            images = self.resident.index_select(0, rows)
            yield from map(Batch, images.split(self.batch_size), rows.split(self.batch_size))

    def _moved(self, images: Tensor, index: Tensor) -> Iterator[Batch]:
        """Batches of a window's images, which come to the device one by one."""
        for batch, rows in zip(images.split(self.batch_size), index.split(self.batch_size), strict=True):
            yield Batch(batch.to(self.device, non_blocking=True), rows.to(self.device))

    def _reside(self) -> Tensor:
        if len(self.blocks.sizes) == 1:
            return pixels.tensor(self.blocks.read(0)).to(self.device)
        whole = torch.empty((self.count, *self.shape), dtype=torch.uint8, device=self.device)
        for block, start in enumerate(self.starts[:-1]):
            read = pixels.tensor(self.blocks.read(block))
            whole[start : start + len(read)].copy_(read)
        return whole

    def _index(self, pieces: list[Piece]) -> Tensor:
        """The number in the data set of each row of the pieces."""
        return torch.cat([torch.arange(start, stop) + self.starts[block] for block, start, stop in pieces])

    def _resident(self, found: Iterator[tuple[list[Piece], Tensor]]) -> Iterator[Batch]:
        for pieces, order in found:
            assert self.resident is not None
            yield Batch(self.resident, self._index(pieces)[order].to(self.device))

    def _streamed(self, found: Iterator[tuple[list[Piece], Tensor]]) -> Iterator[Batch]:
        """Each window's images on the host, shuffled; the next one is read while this one is used.

        Two buffers serve them in turn: memory that is taken anew for each window falls into pieces.
        """
        buffers = itertools.cycle([self._buffer(), self._buffer()])
        with ThreadPoolExecutor(1, "feed") as pool:
            ahead = [pool.submit(self._load, next(buffers), *window) for window in itertools.islice(found, 1)]
            while ahead:
                current = ahead.pop().result()
                if self.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # copies out of the buffer that is filled next
                ahead = [
                    pool.submit(self._load, next(buffers), *window) for window in itertools.islice(found, 1)
                ]
                yield current

    def _buffer(self) -> Tensor:
        """Room for a window's images, pinned where they go to a GPU."""
        rows = min(self.rows, self.count)
        return torch.empty((rows, *self.shape), dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _load(self, buffer: Tensor, pieces: list[Piece], order: Tensor) -> Batch:
        images = buffer[: len(order)]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))  # where each row of the pieces goes
        done = 0
        for block, start, stop in pieces:
            rows = pixels.tensor(self.blocks.read(block)[start:stop])
            images[places[done : done + len(rows)]] = rows
            done += len(rows)
        return Batch(images, self._index(pieces)[order])


def first_images(blocks: Blocks, count: int) -> np.ndarray:
    """The first images of all, up to `count` of them."""
    found = [blocks.read(0)[:count]]
    for block in range(1, len(blocks.sizes)):
        if (missing := count - sum(map(len, found))) <= 0:
            break
        found.append(blocks.read(block)[:missing])
    return found[0] if len(found) == 1 else np.concatenate(found)
