"""Augmentation: each image flipped or shifted as a function of (seed, epoch, its number), on the device.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vae.random import stable_hash

# Steele, Lea and Flood 2014 (SplitMix64), as signed 64-bit numbers: products wrap alike on every device
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def numbers(seed: int, epoch: int, index: Tensor) -> Tensor:
    """63 random bits for each image number (B,): a function of (seed, epoch, number), in one batch.

    >>> draws = numbers(0, 0, torch.arange(4))
    >>> torch.equal(draws[2:], numbers(0, 0, torch.tensor([2, 3]))), len(set(draws.tolist()))
    (True, 4)
    """
    key = int.from_bytes(stable_hash(seed, "augment", epoch)[:8], "little", signed=True)
    x = (index + 1) * _STEP + key
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return _shifted(x ^ _shifted(x, 31), 1)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right with zeros coming in, not the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def augment(images: Tensor, draws: Tensor, flip: bool, shift: int) -> Tensor:
    """Mirror left to right every other image, and move it by up to `shift` pixels either way.

    Pixels that come in at an edge repeat it. images (B, C, H, W); draws (B,) of `numbers`.

    >>> image = torch.arange(3).reshape(1, 1, 1, 3)
    >>> [augment(image, torch.tensor([draw]), True, 0).flatten().tolist() for draw in (0, 1)]
    [[0, 1, 2], [2, 1, 0]]
    """
    if not flip and not shift:
        return images
    height, width = images.shape[-2:]
    side = 2 * shift + 1
    rows = torch.arange(height, device=images.device) + ((draws >> 20) % side - shift)[:, None]
    columns = torch.arange(width, device=images.device) + ((draws >> 40) % side - shift)[:, None]
    columns = columns.clamp(0, width - 1)
    if flip:
        columns = torch.where((draws & 1)[:, None] == 1, width - 1 - columns, columns)
    places = rows.clamp(0, height - 1)[:, :, None] * width + columns[:, None, :]  # (B, H, W)
    flat = places.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, flat).reshape(images.shape)
