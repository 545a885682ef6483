"""The autoencoder's code in few bytes."""

from __future__ import annotations

import numpy as np
import pytest
from linear_vae import LinearVAE, drawn_images

from vae import quality
from vae.compress import compression_curve, quantize
from vae.config import AutoencoderConfig
from vae.model import build

MODEL = LinearVAE().use_exact_posterior().float()


def test_more_bits_give_a_better_image_and_sixteen_lose_nothing() -> None:
    images, reference = drawn_images(100, seed=1), drawn_images(300, seed=2)
    curve = compression_curve(MODEL, images, reference)
    assert [point.bytes_per_image for point in curve] == [1, 2, 3, 3, 5, 6]
    qualities = [point.psnr for point in curve]
    assert qualities == sorted(qualities) or max(np.diff(sorted(qualities)[-3:])) < 0.1
    assert curve[-1].psnr > curve[0].psnr + 1


def test_quantizing_moves_a_value_by_half_a_step_at_most() -> None:
    reference = np.random.default_rng(0).normal(size=(100, 4))
    for bits in (1, 3, 8):
        step = np.ptp(reference, axis=0) / (2**bits - 1)
        error = np.abs(quantize(reference, reference, bits) - reference)
        assert (error <= step / 2 + 1e-12).all()
        assert len(np.unique(quantize(reference, reference, bits)[:, 0])) <= 2**bits


def test_a_constant_dimension_stays_itself() -> None:
    constant = np.full((5, 1), 3.0)
    np.testing.assert_array_equal(quantize(constant, constant, 4), constant)


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bits=0 must be in \[1, 16\]"):
        quantize(np.zeros((1, 1)), np.zeros((1, 1)), 0)


def test_the_autoencoder_has_a_curve() -> None:
    model = build(AutoencoderConfig(height=8, width=8, channels=1, latent_dim=4))
    (point,) = compression_curve(model, drawn_images(10), drawn_images(20), bits=[8])
    assert point.bytes_per_image == 4
    assert 0 < point.psnr < -10 * np.log10(quality.ROUNDING)
