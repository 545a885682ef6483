"""How a training goes: the lines of its history, and the sums behind them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vae.ranks import Ranks


@dataclass(frozen=True)
class Progress:
    """One line of a run's history: means over the images since the line before, or over a whole split.

    split: 'train' (every log_every steps), 'epoch' (the training images of a finished epoch, as they were
    met), 'validation' (the whole split, after an epoch; also before the first, at step 0, where training
    starts from given weights). elbo, log_likelihood, kl in nats an image, unweighted; loss is what training
    minimises, with beta as it stood. images counts all seen so far, skipped the steps so far that were left
    out for their gradient (in no mean, if their loss is not finite). images_per_second is of this process
    and does not count in comparisons.
    """

    split: str
    epoch: int
    epochs: int
    step: int
    steps: int
    images: int
    skipped: int
    elbo: float
    log_likelihood: float
    kl: float
    loss: float | None
    beta: float
    images_per_second: float = field(compare=False)


class Meter:
    """Sums over images in float64: an interval's on the device, read when it ends; an epoch's on the host.

    A sum is (images, log_likelihood, kl, loss), each of the latter three over the images.
    """

    def __init__(self, device: torch.device | str, ranks: Ranks | None = None):
        self.interval = torch.zeros(4, dtype=torch.float64, device=device)
        self.epoch = torch.zeros(4, dtype=torch.float64)
        self.ranks = ranks or Ranks()

    @torch.no_grad()
    def add(self, figures: Tensor, left_out: Tensor) -> None:
        """Add a step's sums (4,), without waiting for the device.

        Those that are not finite are not added where the step was left out: then they did no harm.
        """
        self.interval += figures.where(figures.isfinite().all() | (left_out == 0), 0.0)

    def read_interval(self) -> tuple[float, ...]:
        """(log_likelihood, kl, loss), means over all ranks' images since the last reading."""
        sums = self.ranks.total(self.interval).cpu().clone()
        self.epoch += sums
        self.interval.zero_()
        return tuple((sums[1:] / sums[0]).tolist())

    def read_epoch(self) -> tuple[float, ...]:
        """The same over the intervals read since the last epoch."""
        means = tuple((self.epoch[1:] / self.epoch[0]).tolist())
        self.epoch.zero_()
        return means

    def gather(self) -> None:
        """Bring the interval's sums to the first rank, which alone saves them."""
        self.ranks.total(self.interval)
        self._keep_on_first()

    def restore(self, interval: Tensor, epoch: Tensor) -> None:
        """Take up what was saved after `gather`."""
        self.interval.copy_(interval)
        self.epoch.copy_(epoch)
        self._keep_on_first()

    def _keep_on_first(self) -> None:
        if not self.ranks.first:
            self.interval.zero_()
