"""Which device a task runs on."""

from __future__ import annotations


def pick_device(device: str) -> str:
    """'auto' is the GPU when there is one; ValueError for a GPU that isn't there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch finds no GPU here: use --device auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
