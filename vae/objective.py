"""The terms of the ELBO, the importance-weighted bound, and the losses that training minimises.

    L(x)   = E_{q(z|x)}[log p(x|z)] - D_KL(q(z|x) || p(z))          Kingma & Welling 2014
    L_K(x) = E[log 1/K sum_k w_k],  w_k = p(x, z_k) / q(z_k|x)      Burda et al. 2016, section 3

with the expectations over draws z_k ~ q(z|x), of which each value here takes one or K; the KL is in closed
form where it has one. `terms`, `log_weights` and `importance_bound` are what is reported: nats,
natural sign, one value an image or draw. The losses below them are what is trained: scalars, with whatever
weights the configuration gives. Higgins et al. 2017: beta. Kingma et al. 2016: free bits. Vahdat & Kautz
2020: balancing. Tucker et al. 2018: the doubly reparameterized gradient of L_K.

Legend: B images, K draws an image, N = K*B rows (draw-major), L latent levels, D latent dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vae import gaussian
from vae.config import TrainConfig
from vae.model import Inference, repeat_draws


@dataclass(frozen=True)
class Terms:
    """log_likelihood (N,): log p(x|z). kl (N, L): KL(q(z|x) || p(z)), a column a level. In nats."""

    log_likelihood: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """L(x) = E_q[log p(x|z)] - KL(q(z|x) || p(z)), (N,): Kingma & Welling 2014."""
        return self.log_likelihood - self.kl.sum(1)


def terms(inference: Inference, x: Tensor) -> Terms:
    """The ELBO's terms of images x (B, C, H, W), sampled with one draw a row."""
    return Terms(inference.likelihood.log_prob(repeat_draws(x, inference.z)), inference.kl)


def log_weights(inference: Inference, log_likelihood: Tensor) -> Tensor:
    """log w = log p(x|z) + log p(z) - log q(z|x), (N,): the w_k of Burda et al. 2016, section 3.

    From the densities at the draw, never from the closed-form KL: the bound needs each draw's own weight.
    """
    assert inference.log_prior is not None
    assert inference.log_posterior is not None
    return log_likelihood + inference.log_prior.sum(1) - inference.log_posterior.sum(1)


def importance_bound(log_w: Tensor) -> Tensor:
    """L_K(x) = log 1/K sum_k w_k, from log w (K, B) to (B,): Burda et al. 2016, section 3.

    >>> importance_bound(torch.log(torch.tensor([[1.0], [3.0]]))).exp()
    tensor([2.])
    """
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def elbo_loss(terms: Terms, *, beta: float = 1.0, free_bits: float = 0.0, balance: bool = False) -> Tensor:
    """-E[log p(x|z)] + beta * sum_l KL_l, averaged over the batch: with beta = 1 the negative ELBO.

    beta: Higgins et al. 2017.
    free_bits: lambda in sum_l max(lambda, KL_l) with KL_l the batch's mean (Kingma et al. 2016);
        a level below it has no gradient from its KL.
    balance: weigh the levels by `balancing`.
    """
    kl = terms.kl.mean(0)
    rate = kl.clamp(min=free_bits) if free_bits else kl
    rate = balancing(kl) * rate if balance else rate
    return beta * rate.sum() - terms.log_likelihood.mean()


def balancing(kl: Tensor) -> Tensor:
    """gamma_l proportional to KL_l with mean 1: a level that carries more pays more, (L,) -> (L,).

    Vahdat & Kautz 2020 (NVAE); no gradient flows through the weights.

    >>> balancing(torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    """
    share = kl.detach().clamp(min=1e-6)
    return share / share.mean()


def iwae_loss(log_w: Tensor) -> Tensor:
    """-L_K averaged over the batch, (K, B) -> scalar, with its plain gradient."""
    return -importance_bound(log_w).mean()


def dreg_loss(inference: Inference, log_likelihood: Tensor, draws: int) -> Tensor:
    """-L_K averaged over the batch, with the doubly reparameterized gradient of Tucker et al. 2018.

    For phi:   sum_k w~_k^2 (d log w_k / d z_k) (d z_k / d phi),  w~_k = w_k / sum_j w_j,
    for theta: sum_k w~_k d log w_k / d theta, as in Burda et al. 2016, section 3.

    Two things give both in one backward pass. log q is taken at phi held fixed, so phi is reached through z
    alone. A hook multiplies the gradient that arrives at z by w~ once more, after theta has had its share.
    """
    assert inference.log_prior is not None
    assert inference.logvar is not None
    z = inference.z
    log_q = gaussian.log_prob(z, inference.mean.detach(), inference.logvar.detach()).sum(1)
    log_w = (log_likelihood + inference.log_prior.sum(1) - log_q).unflatten(0, (draws, -1))  # (K, B)
    weights = torch.softmax(log_w.detach(), 0)
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * weights.reshape(-1, 1))
    surrogate = -(weights * log_w).sum(0).mean()
    return surrogate + (iwae_loss(log_w.detach()) - surrogate.detach())  # the bound's value, this gradient


def training_loss(config: TrainConfig, beta: float, inference: Inference, x: Tensor) -> tuple[Tensor, Terms]:
    """(the scalar that this configuration minimises, the unweighted terms to report)."""
    now = terms(inference, x)
    if config.objective == "elbo":
        balance = config.kl_balancing and beta < config.beta
        return elbo_loss(now, beta=beta, free_bits=config.free_bits, balance=balance), now
    if config.gradient == "dreg":
        return dreg_loss(inference, now.log_likelihood, config.samples), now
    log_w = log_weights(inference, now.log_likelihood)
    return iwae_loss(log_w.unflatten(0, (config.samples, -1))), now


def beta_at(config: TrainConfig, step: int, steps: int) -> float:
    """The KL's weight at a step (from 0) of `steps` in the whole run.

    'warmup' rises linearly over the first warmup_epochs; 'cyclic' repeats `cycles` times: half a cycle
    rising from 0, half at the final value (Fu et al. 2019, with R = 0.5).

    >>> cyclic = TrainConfig(beta_schedule="cyclic", cycles=2)
    >>> [beta_at(cyclic, step, 8) for step in range(8)]
    [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0]
    """
    if config.beta_schedule == "warmup":
        rise = step * config.epochs / (steps * config.warmup_epochs)
    elif config.beta_schedule == "cyclic":
        rise = 2 * (step * config.cycles % steps) / steps
    else:
        rise = 1.0
    return config.beta * min(rise, 1.0)
