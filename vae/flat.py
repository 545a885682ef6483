"""The VAE with one latent vector: Kingma & Welling 2014, *Auto-Encoding Variational Bayes*.

    L(theta, phi; x) = -D_KL(q_phi(z|x) || p(z)) + E_{q_phi(z|x)}[log p_theta(x|z)]     the variational bound
    z = g_phi(epsilon, x) = mu + sigma * epsilon,  epsilon ~ N(0, I)              the reparameterization trick
    q_phi(z|x) = N(z; mu, sigma^2 I),  mu and log sigma^2 from the encoder                       the posterior
    -D_KL(q_phi(z|x) || p(z)) = 1/2 sum_j (1 + log sigma_j^2 - mu_j^2 - sigma_j^2)       its KL, Gaussian case

The last three are here, in `FlatVAE`; the bound, which every model shares, is in `vae.objective`. The
posterior q_phi(z|x) is the encoder with its head, p_theta(x|z) the decoder with its likelihood, p(z) the
prior.

Legend: B images, K draws an image, N = K*B rows, C channels, H W pixels, D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vae import gaussian
from vae.config import FlatConfig
from vae.likelihood import Head, Likelihood
from vae.linear import Linear
from vae.model import Inference, Model, repeat_draws
from vae.networks import Decoder, Encoder
from vae.pixels import unit
from vae.prior import StandardNormal, VampPrior


class FlatVAE(Model):
    """p(x, z) = p(z) p_theta(x|z), with the approximate posterior q_phi(z|x).

    >>> from vae.model import build
    >>> vae = build(FlatConfig(height=8, width=8, channels=1, latent_dim=2))
    >>> x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    >>> vae.infer(x, noise=torch.zeros(3, 2)).kl.shape
    torch.Size([3, 1])
    """

    config: FlatConfig

    def __init__(self, config: FlatConfig):
        super().__init__(config)
        self.levels = ((config.latent_dim,),)
        self.encoder = Encoder(config)
        self.posterior_head = Linear(self.encoder.features, 2 * config.latent_dim)
        self.likelihood = Head(config)
        self.decoder = Decoder(config, self.likelihood.channels)
        self.prior: StandardNormal | VampPrior = StandardNormal(config.latent_dim)
        if config.prior == "vamp":
            self.prior = VampPrior(
                config.pseudo_inputs, config.image_shape, config.latent_dim, self.posterior
            )
        self.kl_in_closed_form = self.prior.kl_in_closed_form
        self._start_wide()

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2 of q_phi(z|x) = N(z; mu, sigma^2 I): x in [0, 1] -> two (B, D)."""
        mu, logvar = self.posterior_head(self.encoder(x)).chunk(2, dim=1)
        return mu, logvar

    def infer(self, x: Tensor, noise: Tensor | None) -> Inference:
        mu, logvar = self.posterior(unit(x, self.dtype))
        if noise is None:
            z = mu
        else:  # the reparameterization trick: z = g_phi(epsilon, x), where the noise is epsilon
            mu, logvar = repeat_draws(mu, noise), repeat_draws(logvar, noise)
            z = gaussian.sample(mu, logvar, noise)

        @cache
        def densities() -> tuple[Tensor, Tensor]:
            """log p(z) and log q_phi(z|x), (N, 1)."""
            return self.prior.log_prob(z)[:, None], gaussian.log_prob(z, mu, logvar).sum(1, keepdim=True)

        # D_KL(q_phi(z|x) || p(z)): in closed form where p(z) is N(0, I), else log q - log p of the draw
        kl_per_dim = gaussian.standard_kl(mu, logvar) if self.kl_in_closed_form else None
        kl = densities()[1] - densities()[0] if kl_per_dim is None else kl_per_dim.sum(1, keepdim=True)
        return Inference(
            mean=mu,
            logvar=logvar,
            z=z,
            kl=kl,
            kl_per_dim=kl_per_dim,
            densities=densities,
            decoded=lambda: self.decode(z),
        )

    def decode(self, z: Tensor) -> Likelihood:
        return self.likelihood(self.decoder(z.to(self.dtype)))

    @property
    def dtype(self) -> torch.dtype:
        """Asked for in every pass: that of any other model is found by a walk over its modules."""
        return self.posterior_head.weight.dtype

    @property
    def prior_noise_dim(self) -> int:
        return self.prior.noise_dim

    def prior_sample(self, noise: Tensor, temperature: float | Sequence[float] = 1.0) -> Tensor:
        (scale,) = temperature if isinstance(temperature, Sequence) else (temperature,)
        return self.prior.sample(noise, scale)

    def initialize(self, images: Tensor) -> None:
        """The VampPrior's pseudo-inputs start as real images."""
        if isinstance(self.prior, VampPrior):
            self.prior.initialize(unit(images, self.dtype))

    def _start_wide(self) -> None:
        """Start with every variance of q_phi(z|x) near 1, so that none can overflow.

        The means start as they fall: where they start near 0 as well, z tells nothing through its noise, and
        an MLP's first epochs are spent on that (benchmarks/README.md).
        """
        with torch.no_grad():
            _, logvar_weight = self.posterior_head.weight.chunk(2)
            logvar_weight.mul_(0.1)
            self.posterior_head.bias.zero_()
