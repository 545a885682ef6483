"""Which device a task runs on, and how many tasks a GPU takes at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

GPU_LIMIT = "gpu"  # Prefect's limit on tasks that use a GPU, which `vae-flows bootstrap` sets
LEASE_SECONDS = 60  # after which the slot of a process that was killed comes free


def pick_device(device: str) -> str:
    """'auto' is the GPU when there is one; ValueError for a GPU that isn't there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch finds no GPU here: use --device auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


@contextmanager
def gpu_slot(device: str) -> Iterator[None]:
    """Hold a slot of the limit on GPUs, where the device is one and Prefect's server has the limit."""
    if not device.startswith("cuda") or not limited():
        yield
        return
    from prefect.concurrency.sync import concurrency

    with concurrency(GPU_LIMIT, strict=True, lease_duration=LEASE_SECONDS):
        yield


def limited() -> bool:
    """Whether Prefect's server has the limit; never without a server of the user's."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        return False
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            return False
    return True
