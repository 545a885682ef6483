"""Seeds -> images: draws from the model's prior, or from a mixture fitted to its latents.

Sample `index` under `seed` is the same image whatever batch, shard or process draws it.

Legend: N samples, D latent dimensions, U mixture components, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vae import pixels
from vae.model import Model
from vae.random import IdDraws


def sample(
    model: Model,
    indices: Sequence[int] | np.ndarray,
    seed: int = 0,
    temperature: float | Sequence[float] = 1.0,
    device: str | torch.device | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw z ~ p(z) for each index and decode it: z (N, D) float32, images (N, C, H, W) uint8.

    temperature scales the prior's standard deviations, one for all levels or one each. An image is the
    likelihood's mean, rounded.

    Raises:
        ValueError: a model without a prior, or a negative temperature.
    """
    if min(temperature if isinstance(temperature, Sequence) else (temperature,)) < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    model = model.to(device or model.device).eval()
    noise = IdDraws(seed, [int(i) for i in indices], model.device).normal("prior", model.prior_noise_dim)
    with torch.inference_mode():
        return _decode(model, model.prior_sample(noise, temperature))


def sample_mixture(
    model: Model,
    weights: np.ndarray,
    means: np.ndarray,
    covariances: np.ndarray,
    indices: Sequence[int] | np.ndarray,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw z from a Gaussian mixture on the latents (the aggregated posterior) and decode it, as `sample`.

    weights (U,) summing to 1, means (U, D), covariances (U, D, D) or, diagonal, (U, D): the attributes of
    scikit-learn's GaussianMixture. Serves the autoencoder too, which has no prior of its own.
    """
    _check_mixture(model, weights, means, covariances)
    model = model.to(device or model.device).eval()
    draws = IdDraws(seed, [int(i) for i in indices])
    noise = draws.normal("mixture", model.latent_dim).double().numpy()
    uniform = draws.uniform("component", 1).double().numpy()[:, 0]
    ends = np.cumsum(weights)
    pick = np.searchsorted(ends[:-1], uniform, side="right")
    spread = np.sqrt(covariances) if covariances.ndim == 2 else np.linalg.cholesky(covariances)
    moved = noise * spread[pick] if spread.ndim == 2 else np.einsum("nij,nj->ni", spread[pick], noise)
    z = torch.from_numpy((means[pick] + moved).astype(np.float32)).to(model.device)
    with torch.inference_mode():
        return _decode(model, z)


def _check_mixture(model: Model, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> None:
    parts, size = len(weights), model.latent_dim
    if means.shape != (parts, size) or covariances.shape not in ((parts, size), (parts, size, size)):
        raise ValueError(
            f"a mixture of {parts} components over {size} latent dimensions needs means ({parts}, {size}), "
            f"not {means.shape}, and covariances to match, not {covariances.shape}"
        )
    if not np.isclose(weights.sum(), 1) or (weights < 0).any():
        raise ValueError(f"the mixture's weights must be probabilities; they sum to {weights.sum():g}")


def _decode(model: Model, z: Tensor) -> tuple[np.ndarray, np.ndarray]:
    images = pixels.to_uint8(model.decode(z).mean)
    return z.float().cpu().numpy(), images.cpu().numpy()
