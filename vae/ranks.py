"""The processes of one training: alone, or those that torch's launcher has joined in a group.

Every rank sees the whole of each batch's numbers and draws, and takes its slice of the rows; gradients are
averaged by DistributedDataParallel, sums of figures are added up. So how many ranks there are changes no
draw and no figure beyond rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process's number among `world` of them.

    >>> [Ranks(rank, 3).share(10) for rank in range(3)]
    [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None)]
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that reports and saves."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This rank's of so many rows; the shares differ by one at most."""
        size, more = divmod(rows, self.world)
        start = self.rank * size + min(self.rank, more)
        return slice(start, start + size + (self.rank < more))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: bool, device: torch.device) -> bool:
        """Whether any rank says yes."""
        return bool(self.total(torch.tensor(float(value), device=device))) if self.world > 1 else value

    def joined(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module with its gradients averaged over the ranks."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, [device.index] if device.type == "cuda" else None)

    def alone(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within the block, gradients stay this rank's own: others follow in the same step."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def here() -> Ranks:
    """The group this process is in, if it is in one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextmanager
def group(device: torch.device) -> Iterator[Ranks]:
    """Join the group that torch's launcher describes in the environment: by NCCL on GPUs, else gloo.

    VAE_RANKS_MEET, where it is set, is a file's path at which ranks of one machine meet, without a server.
    """
    # The launcher keeps its store when it begins lost ranks anew: without a name for each attempt,
    # they would look for each other at the addresses of those that are gone.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if file := os.environ.get("VAE_RANKS_MEET"):
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store: dist.Store = dist.FileStore(f"{file}-{attempt}", world)
    else:
        met, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(attempt, met)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield here()
    finally:
        dist.destroy_process_group()
