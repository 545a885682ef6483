"""Priors p(z) of the flat VAE: the standard normal and the VampPrior.

Legend: B batch, N latents, D latent dimensions, U pseudo-inputs, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from vae import gaussian

# x in [0, 1] (B, C, H, W) -> mean, logvar (B, D) of q(z|x)
Posterior = Callable[[Tensor], tuple[Tensor, Tensor]]


class Prior(Protocol):
    """What the flat VAE asks of p(z)."""

    kl_in_closed_form: bool
    noise_dim: int

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (N, D) -> (N,) nats."""

    def sample(self, noise: Tensor, temperature: float) -> Tensor:
        """(N, noise_dim) standard normals -> (N, D)."""


class StandardNormal(nn.Module):
    """p(z) = N(0, I) (Kingma & Welling 2014, section 3)."""

    kl_in_closed_form = True

    def __init__(self, latent_dim: int):
        super().__init__()
        self.noise_dim = latent_dim

    def log_prob(self, z: Tensor) -> Tensor:
        return gaussian.standard_log_prob(z).sum(1)

    def sample(self, noise: Tensor, temperature: float) -> Tensor:
        return temperature * noise


class VampPrior(nn.Module):
    """p(z) = 1/U sum_u q(z|u), the posteriors of U learned pseudo-inputs (Tomczak & Welling 2018).

    The pseudo-inputs are images: a sigmoid keeps them in [0, 1], with a gradient everywhere.
    """

    kl_in_closed_form = False

    def __init__(
        self, pseudo_inputs: int, image_shape: tuple[int, int, int], latent_dim: int, posterior: Posterior
    ):
        super().__init__()
        self.noise_dim = latent_dim + 1
        self.logits = nn.Parameter(torch.randn(pseudo_inputs, *image_shape))
        self._posterior = (
            posterior,
        )  # in a tuple: the encoder's weights belong to the model, not to the prior

    def initialize(self, pixels: Tensor) -> None:
        """Start from real images: pixels (B, C, H, W) in [0, 1], used in turn."""
        rows = torch.arange(len(self.logits), device=pixels.device) % len(pixels)
        with torch.no_grad():
            self.logits.copy_(torch.logit(pixels[rows], eps=0.02))

    def components(self) -> tuple[Tensor, Tensor]:
        """mean, logvar (U, D) of q(z|u)."""
        return self._posterior[0](torch.sigmoid(self.logits))

    def log_prob(self, z: Tensor) -> Tensor:
        mean, logvar = self.components()
        return mixture_log_prob(z, mean, logvar)

    def sample(self, noise: Tensor, temperature: float) -> Tensor:
        """The last column of noise picks the component: its normal quantile is uniform."""
        mean, logvar = self.components()
        uniform = torch.special.ndtr(noise[:, -1])
        pick = (uniform * len(mean)).long().clamp(max=len(mean) - 1)
        return gaussian.sample(mean[pick], logvar[pick], temperature * noise[:, :-1])


def mixture_log_prob(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log 1/U sum_u N(z; mean_u, exp(logvar_u)): z (N, D), mean and logvar (U, D) -> (N,).

    The square is expanded into matrix products, so that memory is N*U, not N*U*D; in float64, for narrow
    components leave the small difference of large numbers. The result has the dtype of z, or float32.

    >>> z, zero = torch.zeros(1, 2), torch.zeros(3, 2)
    >>> mixture_log_prob(z, zero, zero) - gaussian.standard_log_prob(z).sum(1)
    tensor([0.])
    """
    dtype = gaussian.upcast(z).dtype
    z, mean, logvar = z.double(), mean.double(), logvar.double()
    precision = torch.exp(-logvar)
    square = z**2 @ precision.T - 2 * z @ (mean * precision).T + (mean**2 * precision).sum(1)
    constant = logvar.sum(1) + z.shape[1] * gaussian.LOG_2PI
    return (torch.logsumexp(-0.5 * (square + constant), 1) - math.log(len(mean))).to(dtype)
