"""The flat VAE: the paper's pieces, and real digits learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vae import gaussian
from vae.config import FlatConfig, TrainConfig
from vae.evaluate import evaluate
from vae.flat import FlatVAE
from vae.model import build
from vae.train import fit

DIGITS = (load_digits().images * (255 / 16)).round().astype(np.uint8)[:, None]
TRAIN, TEST = DIGITS[:1400], DIGITS[1400:]


def test_latents_are_reparameterized_draws_of_the_posterior() -> None:
    model = build(FlatConfig(height=8, width=8, channels=1, latent_dim=3)).double()
    assert isinstance(model, FlatVAE)
    x = torch.from_numpy(DIGITS[:5])
    noise = torch.randn(5, 3, dtype=torch.float64)
    found = model.infer(x, noise)
    mean, logvar = model.posterior(x.double() / 255)
    torch.testing.assert_close(found.z, mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(found.kl[:, 0], gaussian.standard_kl(mean, logvar).sum(1))
    torch.testing.assert_close(found.kl_per_dim, gaussian.standard_kl(mean, logvar))


def test_training_starts_with_the_posterior_near_the_prior() -> None:
    model = build(FlatConfig(height=28, width=28, channels=3))
    x = torch.randint(0, 256, (20, 3, 28, 28), dtype=torch.uint8)
    assert 0 <= model.infer(x, None).kl.mean() < 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prior": "vamp", "pseudo_inputs": 32},
        {"network": "mlp", "hidden": (128,)},
        {"network": "residual"},
        {"upsampling": "unpool"},
    ],
)
def test_digits_are_learned(fields: dict[str, object]) -> None:
    """Better than the best model of independent pixels, with latents in use."""
    geometry = {"height": 8, "width": 8, "channels": 1, "latent_dim": 16}
    binary = {"likelihood": "bernoulli", "binarize": "threshold"}
    config = FlatConfig.from_dict(geometry | binary | fields)
    result = fit(config, TrainConfig(epochs=15, batch_size=64, learning_rate=3e-3), TRAIN)
    scores = evaluate(result.model, TEST, range(len(TEST)), k=16).scores
    elbo, bound = scores["elbo"].value, scores["iw_bound"].value
    assert isinstance(elbo, float)
    assert isinstance(bound, float)
    assert elbo > independent_pixels() + 3
    assert elbo < bound < 0
    assert scores["active_units"].value >= 4  # type: ignore[operator]


def independent_pixels() -> float:
    """Mean log-likelihood of the test digits when each pixel is white as often as in training."""
    share = ((TRAIN > 127).sum(0) + 0.5) / (len(TRAIN) + 1)
    white = TEST > 127
    return float(np.where(white, np.log(share), np.log1p(-share)).sum((1, 2, 3)).mean())
