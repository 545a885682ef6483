"""The deterministic autoencoder, the baseline: a code z = f(x) and its reconstruction p(x|z).

It has no prior and no posterior density, so no ELBO and no samples. Trained from a corrupted input to the
clean image it removes noise, or upscales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vae.config import AutoencoderConfig
from vae.likelihood import Head, Likelihood
from vae.linear import Linear
from vae.model import Inference, Model
from vae.networks import Decoder, Encoder
from vae.pixels import corrupt, unit
from vae.random import Draws


class Autoencoder(Model):
    """x -> code (B, D) -> p(x|code); `infer` ignores noise, and the KL is zero.

    >>> import torch
    >>> from vae.model import build
    >>> model = build(AutoencoderConfig(height=8, width=8, channels=1, latent_dim=2))
    >>> model.prior_sample(torch.zeros(1, 2))
    Traceback (most recent call last):
    ValueError: an autoencoder has no prior over its codes to sample from: ...
    """

    config: AutoencoderConfig
    generative = False

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.levels = ((config.latent_dim,),)
        self.encoder = Encoder(config)
        self.code_head = Linear(self.encoder.features, config.latent_dim)
        self.likelihood = Head(config)
        self.decoder = Decoder(config, self.likelihood.channels)

    def observe(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The encoder sees the corrupted image, the likelihood scores the clean one."""
        _, clean = super().observe(images, draws)
        return corrupt(clean, self.config.corruption, self.config.corruption_strength, draws), clean

    def infer(self, x: Tensor, noise: Tensor | None) -> Inference:
        code = self.code_head(self.encoder(unit(x, self.dtype)))
        zero = torch.zeros_like(code[:, :1])
        return Inference(code, None, code, zero, None, lambda: (None, None), lambda: self.decode(code))

    def decode(self, z: Tensor) -> Likelihood:
        return self.likelihood(self.decoder(z.to(self.dtype)))

    def prior_sample(self, noise: Tensor, temperature: float | Sequence[float] = 1.0) -> Tensor:
        raise ValueError(
            "an autoencoder has no prior over its codes to sample from: train model='flat', "
            "or sample a mixture fitted to its codes"
        )
