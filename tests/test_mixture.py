"""The mixture fitted to a latent table, and the dimensions that a table keeps."""

from __future__ import annotations

import numpy as np
import pytest

from flows.config import Sample
from flows.encode import columns
from flows.mixture import fit_mixture
from flows.runners import kept

LADDER = {"levels": [[2, 1, 1], [1, 2, 2]], "extra": {"generative": True}}
FLAT = {"levels": [[3]], "extra": {"generative": True, "kl_per_dim": [0.0, 2.0, 0.02]}}


def test_a_mixture_finds_the_clusters_it_is_fitted_to() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[-5.0, 0.0], [5.0, 1.0]])
    which = rng.random(4000) < 0.25
    weights, means, covariances = fit_mixture(
        centres[which.astype(int)] + rng.normal(size=(4000, 2)) * [1, 0.5], 2
    )
    order = np.argsort(means[:, 0])
    np.testing.assert_allclose(weights[order], [0.75, 0.25], atol=0.03)
    np.testing.assert_allclose(means[order], centres, atol=0.1)
    np.testing.assert_allclose(covariances[order], [np.diag([1, 0.25])] * 2, atol=0.12)


def test_a_mixture_of_many_dimensions_is_diagonal_and_the_same_every_time() -> None:
    z = np.random.default_rng(0).normal(size=(400, 70))
    first, second = fit_mixture(z, 3), fit_mixture(z, 3)
    assert first[2].shape == (3, 70)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(ValueError, match="400 rows are too few to fit 300 components: give fewer"):
        fit_mixture(z, 300)


def test_a_mixture_needs_a_table_and_has_no_temperature() -> None:
    with pytest.raises(ValueError, match="--prior mixture and --table go together"):
        Sample(model="m", prior="mixture")
    with pytest.raises(ValueError, match="--prior mixture and --table go together"):
        Sample(model="m", table="t")
    with pytest.raises(ValueError, match=r"--temperature 0.5 is of the model's prior, not of a mixture"):
        Sample(model="m", prior="mixture", table="t", temperature=0.5)


def test_a_table_keeps_the_dimensions_whose_kl_is_above() -> None:
    found = columns(FLAT, scores=False, min_kl=0.01)
    assert (found.dims, found.dimensions, found.levels) == (2, (1, 2), ((2,),))
    facts = {**LADDER, "extra": {"generative": True, "kl_per_dim": [0.5, 0.0, 0.0, 0.3, 0.02, 0.0]}}
    ladder = columns(facts, scores=False, min_kl=0.01)
    assert (ladder.dims, ladder.dimensions, ladder.levels) == (3, (0, 3, 4), ((1,), (2,)))
    assert ladder.kl_levels
    everything = columns(FLAT, scores=False)
    assert (everything.dims, everything.dimensions) == (3, ())


def test_kept_columns_are_those_of_the_dimensions_and_scores_stay_whole() -> None:
    mu = np.arange(6.0).reshape(2, 3)
    latents = {"mu": mu, "logvar": -mu, "kl": mu[:, 0], "elbo": None}
    found = kept(latents, columns(FLAT, scores=False, min_kl=0.01))
    assert found.keys() == {"mu", "logvar", "kl"}
    assert np.array_equal(found["mu"], mu[:, 1:])
    assert np.array_equal(found["logvar"], -mu[:, 1:])
    assert np.array_equal(found["kl"], mu[:, 0])


def test_where_no_dimension_can_be_chosen_it_is_said() -> None:
    with pytest.raises(ValueError, match="states no KL of each dimension"):
        columns(LADDER, scores=False, min_kl=0.01)
    with pytest.raises(ValueError, match="--min-kl 9 leaves no dimension: the largest KL is 2"):
        columns(FLAT, scores=False, min_kl=9)
