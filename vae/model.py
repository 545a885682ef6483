"""The one interface between models and everything else.

Training, evaluation, encoding, sampling and editing use only what is here and know no model by name.
A model is one file with a subclass of `Model`, and one line in `vae.config.MODELS`.

Legend: B images, K draws an image, N = K*B rows (draw-major: row k*B + b), C channels, H W pixels,
L latent levels (top first), D latent dimensions of all levels together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vae import constants
from vae.config import ModelConfig, model_class
from vae.likelihood import Likelihood
from vae.pixels import binarize
from vae.random import Draws


@dataclass(frozen=True)
class Inference:
    """One pass of x through posterior, prior and decoder.

    mean, logvar (N, D) of q(z|x); a level is conditioned on the draws (or means) of those above it.
    z (N, D): the draws, or the means where no noise was given.
    kl (N, L): KL(q||p) a level, in closed form where both are Gaussian, else the one-draw estimate
    log q - log p. kl_per_dim (N, D) where it is in closed form, else None.
    densities gives `log_prior` and `log_posterior`, decoded gives `likelihood`: each is asked for once and
    only when it is needed, as encoding has no need of them.
    A model without a posterior density has logvar, log_prior, log_posterior None.
    """

    mean: Tensor
    logvar: Tensor | None
    z: Tensor
    kl: Tensor
    kl_per_dim: Tensor | None
    densities: Callable[[], tuple[Tensor | None, Tensor | None]]
    decoded: Callable[[], Likelihood]

    @cached_property
    def _densities(self) -> tuple[Tensor | None, Tensor | None]:
        return self.densities()

    @property
    def log_prior(self) -> Tensor | None:
        """log p(z_l|z_>l) at z, (N, L), in nats."""
        return self._densities[0]

    @property
    def log_posterior(self) -> Tensor | None:
        """log q(z_l|z_>l, x) at z, (N, L), in nats."""
        return self._densities[1]

    @cached_property
    def likelihood(self) -> Likelihood:
        """p(x|z) of the N rows."""
        return self.decoded()


class Model(nn.Module, ABC):
    """A model of images: q(z|x), p(z), p(x|z).

    levels: the shape of each latent level, top first; latents of all levels are one flat vector.
    All that a model knows beside its configuration is in parameters and persistent buffers.
    extra: facts that travel with the model (decode path, dataset), for whoever bundled it.
    """

    config: ModelConfig
    levels: tuple[tuple[int, ...], ...]
    # Has a prior and a posterior density: can be sampled from and has an ELBO.
    generative: bool = True
    # `kl` given x does not depend on the draw (one Gaussian level), so needs none.
    kl_in_closed_form: bool = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.extra: dict[str, Any] = {}

    @property
    def latent_dim(self) -> int:
        """D, over all levels."""
        return sum(math.prod(level) for level in self.levels)

    @property
    def prior_noise_dim(self) -> int:
        """Standard normals that one draw from the prior takes."""
        return self.latent_dim

    @abstractmethod
    def infer(self, x: Tensor, noise: Tensor | None) -> Inference:
        """x (B, C, H, W) in grey values 0..255, uint8 or float; noise (K*B, D) standard normal, or None.

        Noise is draw-major, and the pass over x alone happens once, whatever K is. With None, z is the
        posterior's mean, and N = B.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Likelihood:
        """z (N, D) -> p(x|z)."""

    @abstractmethod
    def prior_sample(self, noise: Tensor, temperature: float | Sequence[float] = 1.0) -> Tensor:
        """noise (N, prior_noise_dim) -> z (N, D) from p(z), its standard deviations times the temperature."""

    def observe(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """(what the encoder sees, what the likelihood scores) of stored images: binarised where stated."""
        pixels = binarize(images, self.config.binarize, draws)
        return pixels, pixels

    def initialize(self, images: Tensor) -> None:
        """Set what should start from the data; images: uint8 (B, C, H, W), some of the training split."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def build(config: ModelConfig, seed: int = 0) -> Model:
    """A new model with weights f(seed); torch's global generator is left as it was."""
    constants.touch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Model = model_class(config)(config)
    return model


def repeat_draws(features: Tensor, noise: Tensor) -> Tensor:
    """Repeat (B, ...) to the N = K*B rows of the noise, draw-major.

    >>> repeat_draws(torch.tensor([[1], [2]]), torch.zeros(4, 1)).flatten().tolist()
    [1, 2, 1, 2]
    """
    draws, rest = divmod(len(noise), len(features))
    assert rest == 0, f"{len(noise)} rows of noise for {len(features)} images"
    return features if draws == 1 else features.repeat(draws, *(1,) * (features.dim() - 1))
