"""The ELBO of a whole split while training: exact means, the same draws every time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vae import pixels
from vae.feed import Blocks
from vae.model import Model
from vae.objective import terms
from vae.random import StepDraws
from vae.ranks import Ranks


@torch.no_grad()
def mean_terms(model: Model, blocks: Blocks, seed: int, ranks: Ranks) -> tuple[float, float]:
    """(log_likelihood, kl) in nats, means over all images, of which the ranks score every other batch."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    for number, (start, images) in enumerate(_batches(blocks, pixels.rows_at_once(model.config))):
        if number % ranks.world != ranks.rank:
            continue
        draws = StepDraws(seed, f"validation/{start}", len(images), model.device)
        seen, target = model.observe(images.to(model.device), draws)
        now = terms(model.infer(seen, draws.normal("posterior", model.latent_dim)), target)
        sums += torch.stack([now.log_likelihood.sum(), now.kl.sum()])
    model.train()
    log_likelihood, kl = (ranks.total(sums) / sum(blocks.sizes)).tolist()
    return log_likelihood, kl


def _batches(blocks: Blocks, size: int) -> Iterator[tuple[int, Tensor]]:
    """The images in order, `size` at a time whatever the blocks, and the number of the first."""
    number = 0
    held = torch.empty(0)
    for block in range(len(blocks.sizes)):
        read = pixels.tensor(blocks.read(block))
        held = torch.cat([held, read]) if len(held) else read
        last = block == len(blocks.sizes) - 1
        for batch in held.split(size):
            if len(batch) == size or last:
                yield number, batch
                number += len(batch)
        held = held[len(held) // size * size :]
