"""A checkpoint is one safetensors blob that can tell whether it is whole.

Tensors as they are, everything else as one more tensor of JSON bytes, and in the metadata a SHA-256 of the
entire blob (taken with the digest's own place filled by zeros), so that no flipped bit goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_FACTS = "facts.json"
_ZEROS = b"0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def pack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """One blob of tensors and JSON-able facts; the same input gives the same bytes.

    >>> tensors, facts = unpack(pack({"w": torch.ones(2)}, {"step": 3}))
    >>> tensors["w"], facts
    (tensor([1., 1.]), {'step': 3})
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts, sort_keys=True).encode()
    contiguous[_FACTS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    # the one entry of the metadata: with two, safetensors would order them at random
    blob = safetensors.torch.save(contiguous, metadata={"sha256": _ZEROS.decode()})
    place, whole = _place(blob), memoryview(blob)
    return b"".join((whole[:place], hashlib.sha256(blob).hexdigest().encode(), whole[place + 64 :]))


def unpack(blob: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a blob; a ValueError that says what is wrong with a damaged one.

    >>> unpack(pack({}, {"step": 3})[:-1])
    Traceback (most recent call last):
    ValueError: checkpoint is damaged: its SHA-256 is not the one it states
    """
    place = _place(blob)
    whole = hashlib.sha256(blob[:place] + _ZEROS + blob[place + 64 :]).hexdigest().encode()
    if blob[place : place + 64] != whole:
        raise ValueError("checkpoint is damaged: its SHA-256 is not the one it states")
    try:
        tensors = safetensors.torch.load(blob)
    except SafetensorError as error:
        raise ValueError(f"checkpoint is damaged: {error}") from error
    facts = json.loads(tensors.pop(_FACTS).numpy().tobytes())
    return tensors, facts


def digest(tensors: Mapping[str, Tensor] | None) -> str | None:
    """What names these tensors; None for none."""
    if tensors is None:
        return None
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].detach().cpu().contiguous().numpy().data)
    return state.hexdigest()


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of this prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _place(blob: bytes) -> int:
    """Where the digest stands: in the header, which follows 8 bytes of its length, and once."""
    size = int.from_bytes(blob[:8], "little")
    found = list(_DIGEST.finditer(blob, 8, min(8 + size, len(blob))))
    if len(found) != 1:
        raise ValueError("checkpoint is damaged: its header has no SHA-256")
    return found[0].start(1)
