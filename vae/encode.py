"""Images -> latents: the posterior's mean and log-variance, deterministic.

Legend: B batch, L levels, D latent dimensions, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vae import pixels
from vae.model import Inference, Model
from vae.objective import terms
from vae.random import IdDraws


@dataclass(frozen=True)
class Latents:
    """Rows of a latent table, float32.

    mu (B, D); logvar (B, D), None for the autoencoder; kl (B,) in nats and kl_levels (B, L);
    with scores also log_likelihood and elbo (B,), which the autoencoder has no second of.
    """

    mu: np.ndarray
    logvar: np.ndarray | None
    kl: np.ndarray | None
    kl_levels: np.ndarray | None
    log_likelihood: np.ndarray | None
    elbo: np.ndarray | None


class Encoder:
    """Encodes batches of images with one model on one device.

    Levels of a ladder are conditioned on the posterior means above them. Where the KL needs a draw, it is
    f(seed, id); with scores kl, log_likelihood and elbo are all of that one draw, so that
    elbo = log_likelihood - kl, and their means are those that `evaluate` reports under the same seed.
    """

    def __init__(self, model: Model, device: str | torch.device | None = None):
        self.model = model.to(device or model.device).eval()

    @torch.inference_mode()
    def encode(
        self, images: np.ndarray, ids: Sequence[str | int], *, scores: bool = False, seed: int = 0
    ) -> Latents:
        """images (B, C, H, W) uint8 with one id each -> their latents.

        Raises:
            ValueError: images that do not fit the model.
        """
        model = self.model
        x, draws = self._seen(images, ids, seed)
        at_mean = model.infer(x, None)
        scored = at_mean
        if model.generative and (scores or not model.kl_in_closed_form):
            scored = model.infer(x, draws.normal("posterior", model.latent_dim))
        return _latents(at_mean, scored, x if scores else None, model.generative)

    @torch.inference_mode()
    def sample(self, images: np.ndarray, ids: Sequence[str | int], *, seed: int = 0) -> np.ndarray:
        """One draw z ~ q(z|x) an image, float32 (B, D): the draw that the scores are of.

        Raises:
            ValueError: images that do not fit the model, or a model without a posterior to draw from.
        """
        if not self.model.generative:
            raise ValueError("an autoencoder has codes and no posterior: there is nothing to draw from")
        x, draws = self._seen(images, ids, seed)
        return _array(self.model.infer(x, draws.normal("posterior", self.model.latent_dim)).z)

    def _seen(self, images: np.ndarray, ids: Sequence[str | int], seed: int) -> tuple[Tensor, IdDraws]:
        """What the encoder sees of checked images, and their draws."""
        pixels.check(self.model.config, images)
        draws = IdDraws(seed, ids, self.model.device)
        x = pixels.tensor(images).to(self.model.device)
        return pixels.binarize(x, self.model.config.binarize, draws), draws


def _latents(at_mean: Inference, scored: Inference, x: Tensor | None, generative: bool) -> Latents:
    now = None if x is None else terms(scored, x)
    kl = scored.kl if generative else None
    return Latents(
        mu=_array(at_mean.mean),
        logvar=None if at_mean.logvar is None else _array(at_mean.logvar),
        kl=None if kl is None else _array(kl.sum(1)),
        kl_levels=None if kl is None else _array(kl),
        log_likelihood=None if now is None else _array(now.log_likelihood),
        elbo=None if now is None or kl is None else _array(now.elbo),
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
