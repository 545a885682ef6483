"""Flips and shifts: functions of (seed, epoch, number), whatever the batch."""

from __future__ import annotations

import torch

from vae.augment import augment, numbers

IMAGES = torch.randint(0, 256, (40, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
EVERY = torch.arange(40)


def by_hand(image: torch.Tensor, flipped: bool, down: int, right: int) -> torch.Tensor:
    """The same, one pixel at a time."""
    out = torch.empty_like(image)
    height, width = image.shape[-2:]
    for y in range(height):
        for x in range(width):
            column = min(max(x + right, 0), width - 1)
            out[:, y, x] = image[
                :, min(max(y + down, 0), height - 1), width - 1 - column if flipped else column
            ]
    return out


def test_it_is_what_was_drawn() -> None:
    draws = numbers(3, 1, EVERY)
    moved = augment(IMAGES, draws, flip=True, shift=2)
    for image, draw, found in zip(IMAGES, draws.tolist(), moved, strict=True):
        expected = by_hand(image, draw % 2 == 1, (draw >> 20) % 5 - 2, (draw >> 40) % 5 - 2)
        assert torch.equal(found, expected)


def test_a_batch_changes_nothing() -> None:
    whole = augment(IMAGES, numbers(3, 1, EVERY), True, 2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(IMAGES[order], numbers(3, 1, order), True, 2), whole[order])


def test_epochs_and_seeds_draw_anew() -> None:
    first, epoch, seed = numbers(0, 0, EVERY), numbers(0, 1, EVERY), numbers(1, 0, EVERY)
    assert not (first == epoch).any()
    assert not (first == seed).any()


def test_every_shift_is_as_likely_and_half_are_flipped() -> None:
    draws = numbers(0, 0, torch.arange(60_000))
    assert (draws >= 0).all()
    assert abs((draws & 1).double().mean() - 0.5) < 0.01
    for bits in (20, 40):
        counts = torch.bincount((draws >> bits) % 5, minlength=5)
        expected = 12_000
        assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees, 0.1 %


def test_nothing_asked_nothing_done() -> None:
    assert augment(IMAGES, EVERY, False, 0) is IMAGES
