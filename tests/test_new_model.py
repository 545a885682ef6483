"""A new model is one file and one line in the allowlist: everything else works as it is."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_model import TinyConfig, TinyVAE

from vae import config as vae_config
from vae.bundle import from_files, to_files
from vae.config import TrainConfig, model_config
from vae.edit import interpolate, reconstruct
from vae.encode import Encoder
from vae.evaluate import evaluate
from vae.sample import sample
from vae.train import fit

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 9), dtype=np.uint8)


def test_one_file_and_one_line_give_a_model_that_does_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"tiny": ("tiny_model:TinyConfig", "tiny_model:TinyVAE")}
    monkeypatch.setattr(vae_config, "MODELS", vae_config.MODELS | line)
    config = model_config({"model": "tiny", "height": 8, "width": 9, "channels": 3, "latent_dim": 5})
    assert isinstance(config, TinyConfig)

    result = fit(config, TrainConfig(epochs=2, batch_size=16), IMAGES, validation=IMAGES[:9])
    assert isinstance(result.model, TinyVAE)
    assert evaluate(result.model, IMAGES, range(40), k=4).scores.keys() >= {"elbo", "iw_bound", "kl_per_dim"}
    model = from_files(to_files(result.model, {"source": "noise"}))
    latents = Encoder(model).encode(IMAGES, range(40), scores=True)
    assert latents.mu.shape == (40, 5)
    assert sample(model, range(3))[1].shape == (3, 3, 8, 9)
    assert reconstruct(model, IMAGES[:2], range(2)).shape == (2, 3, 8, 9)
    assert interpolate(latents.mu[0], latents.mu[1], [0, 1]).shape == (2, 5)

    iwae = TrainConfig(epochs=1, objective="iwae", samples=3)
    assert np.isfinite(fit(config, iwae, IMAGES).history[-1].elbo)
