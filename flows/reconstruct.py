"""Reconstruct: images over what is left of them after the latent."""

from __future__ import annotations

import numpy as np

from flows.config import Reconstruct
from flows.pictures import Studio
from flows.results import Drawn


def reconstruct(config: Reconstruct) -> Drawn:
    """Draw the reconstructions of image files under the originals, or of rows of a table alone."""
    studio = Studio(config)
    latents = np.stack([studio.latent(name) for name in config.images])
    originals = None if config.table else np.stack([studio.pixels(file) for file in config.images])
    return studio.draw(latents, above=originals)
