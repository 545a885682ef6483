"""Sampling: a function of seed and index, faithful to the prior or the mixture it draws from."""

from __future__ import annotations

import numpy as np
import pytest

from vae.config import AutoencoderConfig, FlatConfig
from vae.model import build
from vae.sample import sample, sample_mixture

SMALL = {"height": 8, "width": 9, "channels": 3, "latent_dim": 2, "hidden": (4,)}
FLAT = build(FlatConfig.from_dict(SMALL))
VAMP = build(FlatConfig.from_dict(SMALL | {"prior": "vamp", "pseudo_inputs": 3}))
AUTOENCODER = build(AutoencoderConfig.from_dict(SMALL))
WEIGHTS = np.array([0.25, 0.75])
MEANS = np.array([[-5.0, 0.0], [5.0, 1.0]])
COVARIANCES = np.array([[[1.0, 0.8], [0.8, 1.0]], [[0.25, 0.0], [0.0, 4.0]]])


@pytest.mark.parametrize("model", [FLAT, VAMP])
def test_a_sample_depends_on_its_seed_and_index_alone(model: object) -> None:
    z, images = sample(model, range(20), seed=3)  # type: ignore[arg-type]
    assert z.shape == (20, 2)
    assert z.dtype == np.float32
    assert images.shape == (20, 3, 8, 9)
    assert images.dtype == np.uint8
    for index in (0, 7, 19):
        alone, picture = sample(model, [index], seed=3)  # type: ignore[arg-type]
        np.testing.assert_allclose(alone[0], z[index], rtol=1e-5)
        assert np.abs(picture[0].astype(int) - images[index]).max() <= 1  # rounding of the mean
    again, pictures = sample(model, np.arange(20), seed=3)  # type: ignore[arg-type]
    assert np.array_equal(again, z)
    assert np.array_equal(pictures, images)
    assert not np.array_equal(sample(model, range(20), seed=4)[0], z)  # type: ignore[arg-type]


def test_prior_draws_are_standard_and_scale_with_temperature() -> None:
    z, _ = sample(FLAT, range(3000))
    np.testing.assert_allclose(z.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(z.std(0), 1, atol=0.05)
    np.testing.assert_allclose(sample(FLAT, range(9), temperature=0.5)[0], z[:9] / 2)
    np.testing.assert_allclose(sample(FLAT, range(9), temperature=[0.5])[0], z[:9] / 2)


def test_mixture_draws_have_its_weights_means_and_covariances() -> None:
    z, images = sample_mixture(FLAT, WEIGHTS, MEANS, COVARIANCES, range(8000))
    assert images.shape == (8000, 3, 8, 9)
    left = z[:, 0] < 0
    assert left.mean() == pytest.approx(0.25, abs=0.02)
    for part, mean, covariance in zip((left, ~left), MEANS, COVARIANCES, strict=True):
        np.testing.assert_allclose(z[part].mean(0), mean, atol=0.1)
        np.testing.assert_allclose(np.cov(z[part].T), covariance, atol=0.2)


def test_a_diagonal_mixture_is_the_full_one_without_covariances() -> None:
    variances = np.array([[1.0, 4.0], [0.25, 1.0]])
    full = np.stack([np.diag(row) for row in variances])
    diagonal, _ = sample_mixture(FLAT, WEIGHTS, MEANS, variances, range(50), seed=2)
    np.testing.assert_allclose(diagonal, sample_mixture(FLAT, WEIGHTS, MEANS, full, range(50), seed=2)[0])


def test_the_autoencoder_refuses_its_missing_prior_but_takes_a_mixture() -> None:
    with pytest.raises(ValueError, match="an autoencoder has no prior over its codes to sample from"):
        sample(AUTOENCODER, range(3))
    assert sample_mixture(AUTOENCODER, WEIGHTS, MEANS, COVARIANCES, range(3))[1].shape == (3, 3, 8, 9)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature=-1 must not be negative"):
        sample(FLAT, range(3), temperature=-1)
    with pytest.raises(ValueError, match="over 2 latent dimensions needs means"):
        sample_mixture(FLAT, WEIGHTS, MEANS[:, :1], COVARIANCES, range(3))
    with pytest.raises(ValueError, match="must be probabilities; they sum to 2"):
        sample_mixture(FLAT, 2 * WEIGHTS, MEANS, COVARIANCES, range(3))
