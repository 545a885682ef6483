"""A checkpoint knows whether it is whole."""

from __future__ import annotations

import pytest
import torch

from vae import checkpoint

TENSORS = {
    "float": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "double": torch.tensor([1e-300, float("inf")], dtype=torch.float64),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(7.0),
}
FACTS = {"step": 12, "history": [{"elbo": -1.0000000000000002}], "name": "é"}


def test_everything_comes_back_to_the_bit() -> None:
    tensors, facts = checkpoint.unpack(checkpoint.pack(TENSORS, FACTS))
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)


def test_equal_state_gives_equal_bytes() -> None:
    turned = dict(reversed(TENSORS.items()))
    first = checkpoint.pack(TENSORS, FACTS)
    assert all(first == checkpoint.pack(turned, dict(reversed(FACTS.items()))) for _ in range(20))


def test_any_flipped_bit_is_found() -> None:
    blob = checkpoint.pack(TENSORS, FACTS)
    for position in range(len(blob)):
        flipped = bytearray(blob)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(ValueError, match="checkpoint is damaged"):
            checkpoint.unpack(bytes(flipped))


def test_any_truncation_is_found() -> None:
    blob = checkpoint.pack(TENSORS, FACTS)
    for size in (0, 7, 8, 100, len(blob) // 2, len(blob) - 1):
        with pytest.raises(ValueError, match="checkpoint is damaged"):
            checkpoint.unpack(blob[:size])


def test_a_digest_within_the_facts_is_not_mistaken_for_its_own() -> None:
    facts = {"note": '"sha256":"' + "0" * 64 + '"'}
    assert checkpoint.unpack(checkpoint.pack({}, facts))[1] == facts
