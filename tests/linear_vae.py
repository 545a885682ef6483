"""Probabilistic PCA as a VAE (Tipping & Bishop 1999): every quantity is known in closed form.

p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I), so p(x) = N(b, W W' + s^2 I) and, with M = W'W + s^2 I, the
posterior is N(M^-1 W'(x - b), s^2 M^-1): diagonal where W's columns are orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vae import gaussian
from vae.config import FlatConfig
from vae.model import Inference, Model, repeat_draws
from vae.pixels import unit

GEOMETRY = FlatConfig(height=8, width=8, channels=1, latent_dim=3, network="mlp")
PIXELS = 64


@dataclass(frozen=True)
class FixedGaussian:
    """N(mean, s^2 I) on x/255."""

    mean: Tensor
    log_sigma: Tensor
    eight_bit: ClassVar[bool] = False
    binary: ClassVar[bool] = False

    def log_prob(self, x: Tensor) -> Tensor:
        x = unit(x, self.mean.dtype)
        return gaussian.log_prob(x, self.mean, 2 * self.log_sigma).flatten(1).sum(1)


class LinearVAE(Model):
    """A model of the interface, with linear encoder and decoder in float64."""

    levels = ((GEOMETRY.latent_dim,),)

    def __init__(self, sigma: float = 0.1):
        super().__init__(GEOMETRY)
        source = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(PIXELS, 3, generator=source, dtype=torch.float64))
        self.weight = nn.Parameter(basis * torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64))
        self.bias = nn.Parameter(torch.full((PIXELS,), 0.5, dtype=torch.float64))
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma), dtype=torch.float64))
        self.encoder = nn.Parameter(torch.zeros(3, PIXELS, dtype=torch.float64))
        self.logvar = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    @torch.no_grad()
    def use_exact_posterior(self) -> LinearVAE:
        precision = self.weight.T @ self.weight + torch.exp(2 * self.log_sigma) * torch.eye(3)
        self.encoder.copy_(torch.linalg.solve(precision, self.weight.T))
        self.logvar.copy_(2 * self.log_sigma + torch.linalg.inv(precision).diagonal().log())
        return self

    def infer(self, x: Tensor, noise: Tensor | None) -> Inference:
        mean = (unit(x, self.dtype).flatten(1) - self.bias) @ self.encoder.T
        mean = mean if noise is None else repeat_draws(mean, noise)
        logvar = self.logvar.expand_as(mean)
        z = mean if noise is None else gaussian.sample(mean, logvar, noise)
        log_posterior = gaussian.log_prob(z, mean, logvar).sum(1, keepdim=True)
        log_prior = gaussian.standard_log_prob(z).sum(1, keepdim=True)
        kl = gaussian.standard_kl(mean, logvar)
        return Inference(
            mean=mean,
            logvar=logvar,
            z=z,
            kl=kl.sum(1, keepdim=True),
            kl_per_dim=kl,
            densities=lambda: (log_prior, log_posterior),
            decoded=lambda: self.decode(z),
        )

    def decode(self, z: Tensor) -> FixedGaussian:  # type: ignore[override]
        mean = (z @ self.weight.T + self.bias).unflatten(1, (1, 8, 8))
        return FixedGaussian(mean, self.log_sigma)

    def prior_sample(self, noise: Tensor, temperature: float | Sequence[float] = 1.0) -> Tensor:
        assert isinstance(temperature, float)
        return temperature * noise

    def log_marginal(self, x: Tensor) -> Tensor:
        """The exact log p(x), (B,)."""
        covariance = self.weight @ self.weight.T + torch.exp(2 * self.log_sigma) * torch.eye(PIXELS)
        exact = torch.distributions.MultivariateNormal(self.bias, covariance)
        return exact.log_prob(unit(x, torch.float64).flatten(1))


def drawn_images(count: int, seed: int = 0) -> np.ndarray:
    """uint8 images drawn from the linear model, rounded."""
    model, source = LinearVAE(), torch.Generator().manual_seed(seed)
    z = torch.randn(count, 3, generator=source, dtype=torch.float64)
    mean = model.decode(z).mean
    x = mean + 0.1 * torch.randn(mean.shape, generator=source, dtype=torch.float64)
    return (255 * x).round().clamp(0, 255).to(torch.uint8).detach().numpy()
