"""The deterministic autoencoder on real digits: it reconstructs, cleans noise, upscales, and has no prior."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vae.config import AutoencoderConfig, TrainConfig
from vae.edit import reconstruct
from vae.evaluate import evaluate
from vae.model import Model
from vae.quality import psnr
from vae.random import IdDraws
from vae.train import fit

DIGITS = (load_digits().images * (255 / 16)).round().astype(np.uint8)[:, None]
TRAIN, TEST = DIGITS[:1400], DIGITS[1400:]
IDS = range(len(TEST))


def trained(latent_dim: int = 16, **fields: object) -> Model:
    geometry = {"height": 8, "width": 8, "channels": 1, "latent_dim": latent_dim, "network": "mlp"}
    config = AutoencoderConfig.from_dict(geometry | {"hidden": (128,), "likelihood": "gaussian"} | fields)
    return fit(config, TrainConfig(epochs=15, learning_rate=3e-3), TRAIN).model


def quality(a: np.ndarray, b: np.ndarray) -> float:
    pair = (torch.from_numpy(images.astype(np.float32) / 255) for images in (a, b))
    return psnr(*pair).mean().item()


def test_reconstruction_improves_with_the_size_of_the_code() -> None:
    small, large = (evaluate(trained(size), TEST, IDS).scores["psnr"].value for size in (2, 24))
    assert isinstance(small, float)
    assert isinstance(large, float)
    assert large > small + 3


@pytest.mark.parametrize(("corruption", "strength"), [("noise", 0.3), ("downscale", 2)])
def test_a_corrupted_image_is_restored(corruption: str, strength: float) -> None:
    model = trained(corruption=corruption, corruption_strength=strength)
    seen, clean = model.observe(torch.from_numpy(TEST), IdDraws(0, IDS))
    corrupted = seen.round().to(torch.uint8).numpy()
    assert np.array_equal(clean.numpy(), TEST)
    restored = reconstruct(model, corrupted, IDS)
    assert quality(restored, TEST) > quality(corrupted, TEST) + 1
    score = evaluate(model, TEST, IDS).scores["psnr"].value
    assert score == pytest.approx(
        quality(restored, TEST), abs=0.2
    )  # evaluation corrupts, and scores the restored


def test_it_refuses_to_sample_saying_why() -> None:
    with pytest.raises(ValueError, match="has no prior over its codes to sample from: train model='flat'"):
        trained().prior_sample(torch.zeros(1, 16))
