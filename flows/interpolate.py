"""Interpolate: the way from one image to another through the latent space."""

from __future__ import annotations

import numpy as np

from flows.config import Interpolate
from flows.pictures import Studio
from flows.results import Drawn


def interpolate(config: Interpolate) -> Drawn:
    """Draw `steps` images between A and B, whose reconstructions stand at degrees 0 and 1."""
    from vae.edit import interpolate as between

    studio = Studio(config)
    degrees = np.linspace(config.start, config.stop, config.steps)
    return studio.draw(
        between(studio.latent(config.a), studio.latent(config.b), degrees.tolist(), config.how)
    )
