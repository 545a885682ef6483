"""Scores: exact on the linear VAE, where log p(x) is known, and invariant to how they are run."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from linear_vae import LinearVAE, drawn_images

from vae.config import AutoencoderConfig, FlatConfig, LadderConfig, ModelConfig, TrainConfig
from vae.evaluate import Evaluation, Measurements, evaluate, merge, summarize
from vae.model import build
from vae.objective import elbo_loss, terms
from vae.train import fit

IMAGES = drawn_images(60)
IDS = [f"train/{i:03d}" for i in range(len(IMAGES))]
SMALL = {"height": 8, "width": 8, "channels": 1, "latent_dim": 3, "network": "mlp", "hidden": (8,)}
CONFIGS: list[ModelConfig] = [
    FlatConfig.from_dict(SMALL),
    FlatConfig.from_dict(SMALL | {"prior": "vamp", "pseudo_inputs": 3}),
    FlatConfig.from_dict(SMALL | {"likelihood": "bernoulli", "binarize": "sampled"}),
    AutoencoderConfig.from_dict(SMALL | {"corruption": "noise", "corruption_strength": 0.2}),
    LadderConfig(
        height=8,
        width=8,
        channels=1,
        strides=(4, 2),
        hidden=(4, 6),
        levels=(1, 1),
        latents=(1, 2),
        overlap=True,
    ),
]


def exact() -> LinearVAE:
    return LinearVAE().use_exact_posterior()


def inexact() -> LinearVAE:
    """The posterior a little off, so that the bounds differ."""
    model = exact()
    with torch.no_grad():
        model.logvar += 0.6
    return model


def log_marginal(model: LinearVAE) -> np.ndarray:
    with torch.no_grad():
        return model.log_marginal(torch.from_numpy(IMAGES)).numpy()


# -- against closed forms


def assert_exact_posterior_has_equal_weights() -> None:
    """With q = p(z|x) every importance weight is p(x): the bound is log p(x) at any K, with no variance."""
    for k in (1, 5):
        found = evaluate(exact(), IMAGES, IDS, k=k)
        np.testing.assert_allclose(found.per_image["iw_bound"], log_marginal(exact()), atol=1e-9)
        np.testing.assert_allclose(found.per_image["effective_samples"], k, rtol=1e-9)


def test_exact_posterior_has_equal_weights() -> None:
    assert_exact_posterior_has_equal_weights()


def assert_bounds_rise_to_log_p() -> None:
    bounds = [float(np.mean(iw_bound(inexact(), k))) for k in (1, 5, 50, 3000)]
    truth = log_marginal(inexact()).mean()
    assert bounds[0] < bounds[1] < bounds[2] < truth
    assert bounds[3] == pytest.approx(truth, abs=0.003)


def iw_bound(model: LinearVAE, k: int) -> np.ndarray:
    """Averaged over seeds where k is small, for the bounds are expectations."""
    seeds = range(max(1, 100 // k))
    return np.mean([evaluate(model, IMAGES, IDS, k=k, seed=s).per_image["iw_bound"] for s in seeds], axis=0)


def test_bounds_rise_with_k_and_converge_to_log_p() -> None:
    assert_bounds_rise_to_log_p()


def test_elbo_falls_short_of_log_p_by_the_posterior_kl() -> None:
    """log p(x) - ELBO = KL(q(z|x) || p(z|x)), here 3 dimensions with variance e^0.6 times the exact one."""
    found = [evaluate(inexact(), IMAGES, IDS, k=1, seed=s).per_image["elbo"] for s in range(200)]
    gap = 3 * 0.5 * (math.exp(0.6) - 1 - 0.6)
    assert np.mean(log_marginal(inexact()) - np.mean(found, axis=0)) == pytest.approx(gap, abs=0.08)


def test_training_reaches_the_known_optimum() -> None:
    """Maximum likelihood of probabilistic PCA, from the data's eigenvalues (Tipping & Bishop 1999)."""
    model, x = LinearVAE(sigma=0.3), torch.from_numpy(drawn_images(400))
    data = (x.double() / 255).flatten(1)
    values = torch.linalg.eigvalsh(torch.cov(data.T, correction=0)).flip(0)
    rest = values[3:].mean()
    optimum = -0.5 * (64 * math.log(2 * math.pi) + values[:3].log().sum() + 61 * rest.log() + 64)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    source = torch.Generator().manual_seed(0)
    for _ in range(800):
        noise = torch.randn(len(x), 3, generator=source, dtype=torch.float64)
        loss = elbo_loss(terms(model.infer(x, noise), x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        assert model.log_marginal(x).mean() == pytest.approx(optimum.item(), abs=0.05)
        assert -loss == pytest.approx(optimum.item(), abs=1.0)  # one draw: the ELBO is tight but noisy


def test_mutual_information_and_marginal_kl_add_up_and_are_the_exact_ones() -> None:
    """z | x is Gaussian and so, for many x, is z: I(x; z) = 1/2 sum log(1 + w^2/s^2)."""
    images = drawn_images(4000)
    scores = evaluate(exact(), images, range(len(images)), k=1).scores
    information, marginal = scores["mutual_information"], scores["marginal_kl"]
    one_draw = evaluate(exact(), images, range(len(images)), k=1)
    whole = one_draw.scores["kl"]
    assert isinstance(information.value, float)
    assert isinstance(marginal.value, float)
    assert isinstance(whole.value, float)
    assert information.value + marginal.value == pytest.approx(whole.value, abs=0.1)
    widths = torch.tensor([1.0, 0.6, 0.3])
    truth = 0.5 * torch.log(1 + widths**2 / 0.1**2).sum()
    assert information.value == pytest.approx(truth.item(), abs=0.25)
    assert information.value < math.log(4000)
    assert -0.3 < marginal.value < 0.3


def test_kl_per_dimension_sums_to_the_kl_and_units_are_active_where_means_vary() -> None:
    model = exact()
    with torch.no_grad():
        model.encoder[2] = 0
    scores = evaluate(model, IMAGES, IDS, k=1).scores
    assert sum(scores["kl_per_dim"].value) == pytest.approx(scores["kl"].value)  # type: ignore[arg-type]
    assert scores["kl_per_level"].value == pytest.approx([scores["kl"].value])
    assert scores["active_units"].value == 2


def test_a_constant_output_does_not_vary_and_another_does() -> None:
    model, means = exact(), drawn_images(50).reshape(50, -1) / 255
    varied = evaluate(model, drawn_images(50), range(50), k=1).scores["reconstruction_std"].value
    assert 0 < varied < math.sqrt(means.var(0).mean()) * 1.01  # type: ignore[operator]
    with torch.no_grad():
        model.weight[:] = 0
    assert evaluate(model, drawn_images(50), range(50), k=1).scores["reconstruction_std"].value < 1e-6


# -- however it is run


@pytest.mark.parametrize("config", CONFIGS)
def test_scores_do_not_depend_on_batch_or_chunk(config: ModelConfig) -> None:
    assert_scores_do_not_depend_on_the_batch(config)


def assert_scores_do_not_depend_on_the_batch(config: ModelConfig) -> None:
    model = build(config)
    runs = [evaluate(model, IMAGES, IDS, k=10, batch_size=b, chunk=c) for b, c in ((1, 10), (7, 3), (64, 4))]
    for other in runs[1:]:
        assert_close(runs[0], other)
    assert runs[0].protocol["images"] == len(IMAGES)
    assert all(len(column) == len(IMAGES) for run in runs for column in run.per_image.values())


def assert_close(first: Evaluation, second: Evaluation) -> None:
    assert first.scores.keys() == second.scores.keys()
    for name, score in first.scores.items():
        np.testing.assert_allclose(second.scores[name].value, score.value, rtol=1e-5, atol=1e-5)
        if score.stderr is not None:
            np.testing.assert_allclose(second.scores[name].stderr, score.stderr, rtol=1e-4, atol=1e-5)
    for name, column in first.per_image.items():
        np.testing.assert_allclose(second.per_image[name], column, rtol=1e-4, atol=1e-4)


def test_a_rotation_of_the_order_changes_nothing_but_the_order() -> None:
    turned = np.roll(np.arange(len(IMAGES)), 17)
    first = evaluate(exact(), IMAGES, IDS, k=3, batch_size=7)
    second = evaluate(exact(), IMAGES[turned], [IDS[i] for i in turned], k=3, batch_size=7)
    for name, column in first.per_image.items():
        np.testing.assert_allclose(second.per_image[name], column[turned], rtol=1e-12)


def part_of_a_split(rows: slice) -> Measurements:
    return evaluate(build(CONFIGS[0]), IMAGES[rows], IDS[rows], k=4).measured


def test_two_processes_score_as_one() -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = summarize(merge(list(pool.map(part_of_a_split, (slice(0, 23), slice(23, None))))))
    whole = evaluate(build(CONFIGS[0]), IMAGES, IDS, k=4).scores
    for name, score in whole.items():
        np.testing.assert_allclose(found[name].value, score.value, rtol=1e-5, atol=1e-5)


def test_a_score_is_free_of_the_beta_that_the_model_was_trained_with() -> None:
    """The reported ELBO of a model trained with beta = 4 is log-likelihood - KL, no weight in it."""
    model = fit(CONFIGS[0], TrainConfig(epochs=2, batch_size=16, beta=4.0), IMAGES).model
    found = evaluate(model, IMAGES, IDS, k=1)
    columns = found.per_image
    np.testing.assert_allclose(columns["elbo"], columns["log_likelihood"] - columns["kl"], rtol=1e-5)
    mean, logvar = model.posterior(torch.from_numpy(IMAGES) / 255)  # type: ignore[operator]
    exact = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1).detach().numpy()
    np.testing.assert_allclose(columns["kl"], exact, rtol=1e-4, atol=1e-6)


def test_seeds_give_other_draws_and_the_same_seed_the_same() -> None:
    model = build(CONFIGS[0])
    first, again, other = (evaluate(model, IMAGES, IDS, k=2, seed=s).per_image["elbo"] for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


# -- what the scores are


def test_standard_errors_are_those_of_means() -> None:
    found = evaluate(exact(), IMAGES, IDS, k=1)
    column = found.per_image["elbo"]
    assert found.scores["elbo"].value == pytest.approx(column.mean())
    assert found.scores["elbo"].stderr == pytest.approx(column.std(ddof=1) / math.sqrt(60))
    means = [evaluate(exact(), drawn_images(60, seed=s), IDS, k=1).scores["elbo"].value for s in range(1, 60)]
    assert found.scores["elbo"].stderr == pytest.approx(float(np.std(means)), rel=0.35)


def test_bits_per_dim_are_reported_for_eight_bit_likelihoods_alone() -> None:
    scores = evaluate(build(CONFIGS[0]), IMAGES, IDS, k=1).scores
    assert scores["bits_per_dim"].value == pytest.approx(-scores["elbo"].value / 64 / math.log(2))  # type: ignore[operator]
    assert "bits_per_dim" not in evaluate(build(CONFIGS[2]), IMAGES, IDS, k=1).scores


def test_the_autoencoder_has_reconstruction_scores_alone() -> None:
    found = evaluate(build(CONFIGS[3]), IMAGES, IDS)
    assert found.scores.keys() == {"log_likelihood", "mse", "psnr", "ssim", "reconstruction_std"}


def test_an_untrained_binary_pixel_costs_a_bit() -> None:
    """Sanity of nats: logits of zero give log 2 a pixel."""
    model = build(CONFIGS[2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scores = evaluate(model, IMAGES, IDS, k=1).scores
    assert scores["log_likelihood"].value == pytest.approx(-64 * math.log(2))
    assert scores["kl"].value == 0


def test_the_protocol_is_recorded() -> None:
    protocol = evaluate(build(CONFIGS[2]), IMAGES, IDS, k=2, seed=5).protocol
    assert protocol["seed"] == 5
    assert protocol["k"] == 2
    assert protocol["binarize"] == "sampled"


def test_a_non_finite_score_names_its_image() -> None:
    model = exact()
    with torch.no_grad():
        model.bias[5] = float("nan")
    with pytest.raises(ArithmeticError, match="is not finite for 60 images, the first of them 'train/000'"):
        evaluate(model, IMAGES, IDS, k=1)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="0 images with 0 ids"):
        evaluate(exact(), IMAGES[:0], [])
    with pytest.raises(ValueError, match="60 images with 3 ids"):
        evaluate(exact(), IMAGES, IDS[:3])
    with pytest.raises(ValueError, match="do not fit the model"):
        evaluate(exact(), IMAGES[..., :7], IDS)


def test_memory_of_the_bound_does_not_need_all_samples_at_once() -> None:
    """Two chunkings of 64 samples: the same draws, so the same bound to rounding in float64."""
    one = evaluate(inexact(), IMAGES[:5], IDS[:5], k=64, chunk=64).per_image["iw_bound"]
    many = evaluate(inexact(), IMAGES[:5], IDS[:5], k=64, chunk=5).per_image["iw_bound"]
    np.testing.assert_allclose(one, many, rtol=1e-12)
