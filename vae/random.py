"""Randomness as a function, not a state: every draw is named by (seed, stream, step or id).

So a resumed run, another batch size, shard size or number of workers draw the same numbers.
`StepDraws` serves training (one torch generator a step, for the whole batch); `IdDraws` serves
evaluation, encoding and sampling (one numpy Philox generator an image). Both offer the same two methods,
which return (B, *shape) float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike
from torch import Tensor


def stable_hash(seed: int, stream: str, name: str | int) -> bytes:
    """16 bytes that are the same in every process and on every machine, unlike Python's own hash.

    >>> stable_hash(0, "noise", 1) == stable_hash(0, "noise", "1") != stable_hash(0, "noise", 2)
    True
    """
    text = f"{seed}\x1f{stream}\x1f{name}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def generator(seed: int, stream: str, name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` for one named draw. CPU and CUDA generators draw different numbers."""
    key = int.from_bytes(stable_hash(seed, stream, name)[:8], "little") >> 1  # torch takes 63 bits
    return torch.Generator(device).manual_seed(key)


def permutation(seed: int, epoch: int | str, size: int) -> Tensor:
    """The order in which an epoch visits `size` images: f(seed, epoch), on every device the same.

    >>> sorted(permutation(0, 0, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    return torch.randperm(size, generator=generator(seed, "permutation", epoch))


class Draws(Protocol):
    """A source of named draws for a batch of B images."""

    def normal(self, stream: str, *shape: int) -> Tensor:
        """(B, *shape) standard normals."""

    def uniform(self, stream: str, *shape: int) -> Tensor:
        """(B, *shape) uniforms in [0, 1)."""


class StepDraws:
    """The draws of one training step, f(seed, stream, step), for its whole batch at once."""

    def __init__(self, seed: int, step: int | str, rows: int, device: torch.device | str = "cpu"):
        self.seed, self.step, self.rows, self.device = seed, step, rows, device

    def normal(self, stream: str, *shape: int) -> Tensor:
        source = generator(self.seed, stream, self.step, self.device)
        return torch.randn(self.rows, *shape, generator=source, device=self.device)

    def uniform(self, stream: str, *shape: int) -> Tensor:
        source = generator(self.seed, stream, self.step, self.device)
        return torch.rand(self.rows, *shape, generator=source, device=self.device)


class _Key(ISeedSequence):
    """A hash as a Philox key. Philox(key=...) also asks the system for entropy: three times as slow."""

    def __init__(self, digest: bytes):
        self.digest = digest

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> np.ndarray:
        return np.frombuffer(self.digest, dtype)[:n_words]


def _philox(key: _Key) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key))  # type: ignore[arg-type]  # missing in numpy's stubs


class IdDraws:
    """The draws of each image or sample by its id, f(seed, stream, id).

    Repeated calls on a stream continue it, so ten draws at once equal ten draws one by one:

    >>> whole = IdDraws(0, ["a", "b"]).normal("posterior", 3, 2)
    >>> parts = IdDraws(0, ["a", "b"])
    >>> torch.equal(whole, torch.cat([parts.normal("posterior", k, 2) for k in (1, 2)], dim=1))
    True
    """

    def __init__(self, seed: int, ids: Sequence[str | int], device: torch.device | str = "cpu"):
        self.seed, self.ids, self.device = seed, ids, device
        self._streams: dict[str, list[np.random.Generator]] = {}

    def _generators(self, stream: str) -> list[np.random.Generator]:
        if stream not in self._streams:
            hashes = (stable_hash(self.seed, stream, id) for id in self.ids)
            self._streams[stream] = [_philox(_Key(digest)) for digest in hashes]
        return self._streams[stream]

    def _draw(
        self, stream: str, shape: tuple[int, ...], fill: Callable[[np.random.Generator, np.ndarray], object]
    ) -> Tensor:
        rows = np.empty((len(self.ids), *shape), np.float32)
        for row, source in zip(rows, self._generators(stream), strict=True):
            fill(source, row)
        return torch.from_numpy(rows).to(self.device)

    def normal(self, stream: str, *shape: int) -> Tensor:
        return self._draw(
            stream, shape, lambda source, row: source.standard_normal(dtype=np.float32, out=row)
        )

    def uniform(self, stream: str, *shape: int) -> Tensor:
        return self._draw(stream, shape, lambda source, row: source.random(dtype=np.float32, out=row))
