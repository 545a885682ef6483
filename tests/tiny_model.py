"""A whole model in one file: the example that CONTRIBUTING points to. Linear encoder, linear decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vae import gaussian
from vae.config import ModelConfig, check_range
from vae.likelihood import Head, Likelihood
from vae.model import Inference, Model, repeat_draws
from vae.pixels import unit


@dataclass(frozen=True, kw_only=True)
class TinyConfig(ModelConfig):
    """Its own fields beside the geometry and likelihood that every model states."""

    model: ClassVar[str] = "tiny"
    latent_dim: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("latent_dim", self.latent_dim, 1, 1000)


class TinyVAE(Model):
    """Everything that training, evaluation, encoding, sampling and editing ask of a model."""

    config: TinyConfig

    def __init__(self, config: TinyConfig):
        super().__init__(config)
        _, height, width = config.image_shape
        self.levels = ((config.latent_dim,),)
        self.likelihood = Head(config)
        self.encoder = nn.Linear(math.prod(config.image_shape), 2 * config.latent_dim)
        self.decoder = nn.Linear(config.latent_dim, self.likelihood.channels * height * width)

    def infer(self, x: Tensor, noise: Tensor | None) -> Inference:
        moments = self.encoder(unit(x, self.dtype).flatten(1))
        mean, logvar = (moments if noise is None else repeat_draws(moments, noise)).chunk(2, 1)
        z = mean if noise is None else gaussian.sample(mean, logvar, noise)
        kl = gaussian.standard_kl(mean, logvar)
        return Inference(
            mean=mean,
            logvar=logvar,
            z=z,
            kl=kl.sum(1, keepdim=True),
            kl_per_dim=kl,
            densities=lambda: (
                gaussian.standard_log_prob(z).sum(1, keepdim=True),
                gaussian.log_prob(z, mean, logvar).sum(1, keepdim=True),
            ),
            decoded=lambda: self.decode(z),
        )

    def decode(self, z: Tensor) -> Likelihood:
        _, height, width = self.config.image_shape
        return self.likelihood(self.decoder(z).unflatten(1, (-1, height, width)))

    def prior_sample(self, noise: Tensor, temperature: float | Sequence[float] = 1.0) -> Tensor:
        (scale,) = temperature if isinstance(temperature, Sequence) else (temperature,)
        return scale * noise
