"""The diagonal Gaussian N(mean, exp(logvar)): pure functions, elementwise, in nats.

Every function broadcasts and returns one value an element; sums are the caller's. float64 is kept,
anything narrower is computed in float32. Log-variances of -30 to 20 are exact and have gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def upcast(x: Tensor) -> Tensor:
    """float64 as it is; float32, and narrower under mixed precision, as float32."""
    return x if x.dtype == torch.float64 else x.float()


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """The reparameterization trick: z = mu + sigma * eps (Kingma & Welling 2014, section 2.4).

    noise: standard normal, same shape as mean.

    >>> sample(torch.zeros(2), torch.full((2,), math.log(4.0)), torch.tensor([1.0, -0.5]))
    tensor([ 2., -1.])
    """
    return upcast(mean) + torch.exp(0.5 * upcast(logvar)) * noise


def log_prob(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mean, exp(logvar)).

    >>> log_prob(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    tensor([-0.9189])
    """
    x, mean, logvar = upcast(x), upcast(mean), upcast(logvar)
    return -0.5 * (LOG_2PI + logvar + (x - mean) ** 2 * torch.exp(-logvar))


def standard_log_prob(x: Tensor) -> Tensor:
    """log N(x; 0, 1)."""
    return -0.5 * (LOG_2PI + upcast(x) ** 2)


def kl(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(prior_mean, exp(prior_logvar))).

    expm1 keeps the digits that 1 + log(r) - r would cancel where the two are close.

    >>> kl(torch.ones(1), torch.zeros(1), torch.zeros(1), torch.zeros(1))
    tensor([0.5000])
    """
    mean, logvar, prior_mean, prior_logvar = map(upcast, (mean, logvar, prior_mean, prior_logvar))
    log_ratio = logvar - prior_logvar
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (mean - prior_mean) ** 2 * torch.exp(-prior_logvar))


def standard_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) (Kingma & Welling 2014, appendix B, with the sign turned).

    >>> standard_kl(torch.zeros(1), torch.zeros(1))
    tensor([0.])
    """
    mean, logvar = upcast(mean), upcast(logvar)
    return 0.5 * (torch.expm1(logvar) - logvar + mean**2)
