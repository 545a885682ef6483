"""What a model's latents carry, cheap enough to look at after every epoch.

Legend: N images, B batch, L levels, D latent dimensions, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vae import pixels
from vae.evaluate import ACTIVE_VARIANCE
from vae.model import Model
from vae.random import IdDraws


@dataclass(frozen=True)
class Activity:
    """Means over images: the KL of each level (top first) and of each dimension, in nats; active units.

    kl_per_dim is None where the KL has no closed form. A unit is active when its posterior mean varies more
    than 0.01 over the images (Burda et al. 2016).
    """

    kl_per_level: tuple[float, ...]
    kl_per_dim: tuple[float, ...] | None
    active_units: int


@torch.inference_mode()
def activity(model: Model, images: np.ndarray, seed: int = 0) -> Activity | None:
    """The activity of a model on images (N, C, H, W) uint8; None for one that has no posterior.

    Nothing is decoded, and the same draws are made whenever it is asked.

    >>> from vae.config import FlatConfig
    >>> from vae.model import build
    >>> new = build(FlatConfig(height=8, width=8, channels=1, latent_dim=2))
    >>> activity(new, np.zeros((3, 1, 8, 8), np.uint8)).active_units
    0
    """
    if not model.generative:
        return None
    kl, per_dim, means = [], [], []
    size = pixels.rows_at_once(model.config)
    for start in range(0, len(images), size):
        batch = pixels.tensor(images[start : start + size]).to(model.device)
        draws = IdDraws(seed, range(start, start + len(batch)), model.device)
        seen, _ = model.observe(batch, draws)
        found = model.infer(seen, draws.normal("posterior", model.latent_dim))
        kl.append(found.kl)
        means.append(found.mean)
        per_dim += [] if found.kl_per_dim is None else [found.kl_per_dim]
    variance = torch.cat(means).double().var(0, correction=0)
    return Activity(
        kl_per_level=tuple(torch.cat(kl).double().mean(0).tolist()),
        kl_per_dim=tuple(torch.cat(per_dim).double().mean(0).tolist()) if per_dim else None,
        active_units=int((variance > ACTIVE_VARIANCE).sum()),
    )
