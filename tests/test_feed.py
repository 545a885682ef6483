"""Resident or streamed: the same batches, each image once an epoch, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vae.feed import MIB, Array, Batch, Feed, first_images, windows

CPU = torch.device("cpu")


@dataclass
class Numbered:
    """Blocks whose images all hold their number in the data set (in two pixels), and which count reads."""

    sizes: Sequence[int]
    digest: str = "numbered"
    reads: list[int] = field(default_factory=list)

    def read(self, block: int) -> np.ndarray:
        self.reads.append(block)
        numbers = np.arange(self.sizes[block]) + sum(self.sizes[:block])
        images = np.zeros((len(numbers), 1, 8, 8), np.uint8)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
        return images


def numbers_of(batch: Batch) -> list[int]:
    return (batch.images[:, 0, 0, 0].int() * 256 + batch.images[:, 0, 0, 1]).tolist()


def feed(blocks: Numbered, budget: int, batch_size: int = 8, window: int = 24) -> Feed:
    return Feed(blocks, 0, batch_size, window * 64, budget, CPU)


@pytest.mark.parametrize("sizes", [[100], [40, 30, 30], [7, 1, 50, 2, 40]])
def test_streamed_is_resident(sizes: list[int]) -> None:
    resident, streamed = feed(Numbered(sizes), budget=MIB), feed(Numbered(sizes), budget=0)
    assert resident.resident is not None
    assert streamed.resident is None
    for epoch in range(3):
        pairs = zip(resident.epoch(epoch), streamed.epoch(epoch), strict=True)
        for first, second in pairs:
            assert torch.equal(first.images, second.images)
            assert torch.equal(first.rows, second.rows)
            assert numbers_of(first) == first.rows.tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 60), st.data())
def test_every_image_once_and_from_any_batch(
    sizes: list[int], batch_size: int, window: int, data: st.DataObject
) -> None:
    streamed = feed(Numbered(sizes), 0, batch_size, window)
    batches = [batch.rows.tolist() for batch in streamed.epoch(1)]
    assert sorted(row for batch in batches for row in batch) == list(range(sum(sizes)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    first = data.draw(st.integers(0, len(batches) - 1))
    for budget in (0, MIB):
        place = feed(Numbered(sizes), budget, batch_size, window)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vae.feed.PICKED", data.draw(st.integers(1, 64 * 64)))
            found = [(batch.rows.tolist(), numbers_of(batch)) for batch in place.epoch(1, first)]
        assert found == [(rows, rows) for rows in batches[first:]]


def test_epochs_and_seeds_differ() -> None:
    orders = [[b.rows.tolist() for b in feed(Numbered([50, 50]), 0).epoch(epoch)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    other = Feed(Numbered([50, 50]), 1, 8, 24 * 64, 0, CPU)
    assert [b.rows.tolist() for b in other.epoch(0)] != orders[0]


def test_a_window_that_holds_all_is_one_permutation() -> None:
    (whole,) = windows(0, 0, [3, 4, 5], rows=12)
    assert sorted(whole[1].tolist()) == list(range(12))
    assert whole[1].tolist() != list(range(12))


def test_a_stream_reads_no_more_than_a_window_ahead() -> None:
    blocks = Numbered([10] * 100)
    batches = feed(blocks, 0, batch_size=5, window=10).epoch(0)
    blocks.reads.clear()
    for _ in range(4):  # two windows' worth of batches
        next(batches)
    assert len(blocks.reads) <= 3
    batches.close()  # type: ignore[attr-defined]


def test_first_images_go_across_blocks() -> None:
    images = first_images(Numbered([3, 4, 5]), 9)
    assert images[:, 0, 0, 1].tolist() == list(range(9))
    assert len(first_images(Numbered([3]), 9)) == 3


def test_an_array_is_named_by_pixels_and_shape() -> None:
    images = np.zeros((4, 1, 8, 8), np.uint8)
    other = images.copy()
    other[3, 0, 7, 7] = 1
    digests = {Array(images).digest, Array(other).digest, Array(images.reshape(1, 4, 8, 8)).digest}
    assert len(digests) == 3
