"""activity(): the same figures as an evaluation gives, without decoding."""

from __future__ import annotations

import numpy as np
import pytest

from vae.activity import activity
from vae.config import AutoencoderConfig, FlatConfig, LadderConfig
from vae.evaluate import evaluate
from vae.model import build

IMAGES = np.random.default_rng(0).integers(0, 256, (300, 1, 8, 8), dtype=np.uint8)
GEOMETRY = {"height": 8, "width": 8, "channels": 1}


def test_it_agrees_with_an_evaluation() -> None:
    model = build(FlatConfig(**GEOMETRY, latent_dim=3), seed=1)
    found = activity(model, IMAGES)
    scores = evaluate(model, IMAGES, range(len(IMAGES)), k=1).scores
    assert found is not None
    assert found.kl_per_dim == pytest.approx(scores["kl_per_dim"].value, rel=1e-5)
    assert found.kl_per_level == pytest.approx(scores["kl_per_level"].value, rel=1e-5)
    assert found.active_units == scores["active_units"].value


def test_levels_of_a_ladder_and_dimensions_add_up() -> None:
    model = build(LadderConfig(**GEOMETRY), seed=1)
    found = activity(model, IMAGES[:20])
    assert found is not None
    assert found.kl_per_dim is not None
    assert len(found.kl_per_level) == len(model.levels) > 1
    assert sum(found.kl_per_dim) == pytest.approx(sum(found.kl_per_level), rel=1e-6)


def test_no_kl_of_a_dimension_without_a_closed_form_and_nothing_of_an_autoencoder() -> None:
    vamp = activity(build(FlatConfig(**GEOMETRY, latent_dim=3, prior="vamp", pseudo_inputs=2)), IMAGES)
    assert vamp is not None
    assert vamp.kl_per_dim is None
    assert activity(build(AutoencoderConfig(**GEOMETRY, latent_dim=3)), IMAGES) is None
