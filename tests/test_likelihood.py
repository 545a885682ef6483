"""The likelihoods against `torch.distributions`, sums and integrals, in float64."""

import math
from typing import get_args

import pytest
import torch
from torch import distributions

from vae.config import FlatConfig, LikelihoodName
from vae.likelihood import (
    LIKELIHOODS,
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Head,
    Likelihood,
    log_discretized_logistic,
    optimal_variance,
)

NAMES = get_args(LikelihoodName)
GREYS = torch.arange(256, dtype=torch.float64).reshape(256, 1, 1, 1)


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def greys(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def head(name: str, channels: int = 3) -> Head:
    return Head(FlatConfig(height=8, width=8, channels=channels, likelihood=name, binarize="none"))


def decoded(name: str, scale: float = 1.0, rows: int = 4) -> Likelihood:
    """p(x|z) of some decoder output, evaluated (not training)."""
    module = head(name).eval()
    return module(normal(rows, module.channels, 8, 8, scale=scale))


def uniforms(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_the_configuration_and_the_classes_name_the_same_likelihoods():
    assert set(NAMES) == set(LIKELIHOODS)


def test_bernoulli_is_torch_s():
    logits, x = normal(5, 3, 8, 8, scale=10), greys(5, 3, 8, 8) // 128
    expected = distributions.Bernoulli(logits=logits).log_prob(x.double()).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli(logits, 3).log_prob(255 * x), expected)


def test_gaussian_is_torch_s():
    output, x = normal(5, 3, 8, 8), greys(5, 3, 8, 8)
    sigma = torch.tensor(0.3, dtype=torch.float64)
    gaussian = Gaussian(output, 3, sigma.log())
    floored = gaussian.log_sigma.exp()
    assert abs(floored - sigma) < 0.01
    expected = distributions.Normal(output.sigmoid(), floored).log_prob(x / 255).sum((1, 2, 3))
    torch.testing.assert_close(gaussian.log_prob(x), expected, rtol=1e-6, atol=0)


def test_continuous_bernoulli_is_torch_s_where_torch_is_exact():
    logits = normal(5, 3, 8, 8, scale=4)
    logits = torch.where(logits.abs() < 0.5, logits.sign(), logits)
    x = greys(5, 3, 8, 8).double()
    expected = distributions.ContinuousBernoulli(logits=logits).log_prob(x / 255).sum((1, 2, 3))
    likelihood = ContinuousBernoulli(logits, 3)
    torch.testing.assert_close(likelihood.log_prob(x), expected)
    torch.testing.assert_close(likelihood.mean, distributions.ContinuousBernoulli(logits=logits).mean)


@pytest.mark.parametrize("logit", [0.0, 1e-12, 1e-6, 1e-3, 0.199, 0.201, -0.2, 3.0, -40.0, 700.0])
def test_continuous_bernoulli_integrates_to_one(logit: float):
    """By Gauss-Legendre quadrature in pieces, finer towards the edges; through λ = 1/2 too."""
    edges = torch.cat([2.0 ** -torch.arange(1, 16, dtype=torch.float64).flip(0)]) * 0.5
    edges = torch.cat([torch.zeros(1), edges, 1 - edges.flip(0), torch.ones(1)]).double().unique()
    inner = torch.linspace(0, 1, 33, dtype=torch.float64)
    points = (edges[:-1, None] + edges.diff()[:, None] * inner).flatten()
    likelihood = ContinuousBernoulli(torch.full((len(points), 1, 1, 1), logit, dtype=torch.float64), 1)
    density = likelihood.log_prob(255 * points.reshape(-1, 1, 1, 1)).exp()
    total = torch.trapezoid(density, points)
    assert abs(total - 1) < 2e-3
    assert abs(torch.trapezoid(density * points, points) - likelihood.mean[0, 0, 0, 0]) < 2e-3


def test_continuous_bernoulli_is_smooth_where_its_branches_meet():
    logits = torch.linspace(-0.5, 0.5, 10_001, dtype=torch.float64).reshape(-1, 1, 1, 1).requires_grad_()
    values = ContinuousBernoulli(logits, 1).log_prob(torch.full_like(logits, 200))
    (slope,) = torch.autograd.grad(values.sum(), logits)
    assert slope.flatten().diff().abs().max() < 1e-4 * 0.1
    torch.testing.assert_close(slope.flatten(), 200 / 255 - ContinuousBernoulli(logits, 1).mean.flatten())


@pytest.mark.parametrize("log_scale", [-30.0, -7.0, -1.0, 0.0, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("mean", [-1e4, -3.0, 0.0, 0.5, 77.3, 254.5, 255.0, 400.0, 1e4])
def test_a_discretised_logistic_sums_to_one(mean: float, log_scale: float):
    log_probs = log_discretized_logistic(
        GREYS, torch.tensor(mean), torch.tensor(log_scale, dtype=torch.float64)
    )
    torch.testing.assert_close(log_probs.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


EIGHT_BIT = ["discretized_logistic", "discretized_logistic_mixture"]


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 30.0])
def test_eight_bit_likelihoods_sum_to_one(name: str, scale: float):
    module = head(name, channels=1)
    output = normal(20, module.channels, 1, 1, scale=scale)
    for row in output:
        total = module(row.expand(256, -1, 1, 1)).log_prob(GREYS).exp().sum()
        torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_channels_are_independent(name: str):
    colour, grey = head(name).eval(), head(name, channels=1).eval()
    output, x = normal(4, colour.channels, 8, 8), greys(4, 3, 8, 8) // 128 * 255
    maps = output.unflatten(1, (-1, 3))
    parts = [grey(maps[:, :, c]).log_prob(x[:, c : c + 1]) for c in range(3)]
    torch.testing.assert_close(colour(output).log_prob(x), sum(parts))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_gradients_are_finite_at_extreme_outputs(name: str, scale: float):
    """In float32, with all pixels at the edges 0 and 255."""
    module = head(name)
    output = normal(4, module.channels, 8, 8, scale=scale).float().requires_grad_()
    log_prob = module(output).log_prob(greys(4, 3, 8, 8) // 128 * 255)
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    assert log_prob.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("log_scale", [-100.0, -20.0, -8.0, 3.0])
def test_a_scale_at_its_floor_still_has_a_gradient(log_scale: float):
    """Of a pixel that its logistic misses: a clamp would leave nothing to widen it by."""
    output = torch.tensor([0.0, log_scale], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
    log_prob = DiscretizedLogistic(output, 1).log_prob(torch.full((1, 1, 1, 1), 200))
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    assert gradient[0, 1].abs() > 0


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_the_mean_of_grey_values_is_their_sum_over_probabilities(name: str):
    """Up to a tenth of a grey level: the closed form integrates where the pixel rounds."""
    module = head(name, channels=1)
    for row in normal(20, module.channels, 1, 1):
        likelihood = module(row.expand(256, -1, 1, 1))
        exact = (likelihood.log_prob(GREYS).exp() * GREYS.flatten()).sum()
        assert abs(255 * likelihood.mean[0, 0, 0, 0] - exact) < 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_means_are_images(name: str, scale: float):
    mean = decoded(name, scale).mean
    assert mean.shape == (4, 3, 8, 8)
    assert (mean >= 0).all()
    assert (mean <= 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_mean_and_the_range_of_the_likelihood(name: str):
    module = head(name).eval()
    output = normal(1, module.channels, 8, 8).expand(4000, -1, -1, -1)
    likelihood = module(output)
    images = likelihood.sample(uniforms(4000, 3, 8, 8))
    error = (images.mean(0) / 255 - likelihood.mean[0]).abs() / (images / 255).std(0)
    assert error.max() < 4.5 / math.sqrt(4000)
    if likelihood.binary:
        assert set(images.unique().tolist()) <= {0.0, 255.0}
    if likelihood.eight_bit:
        assert torch.equal(images, images.round())
        assert images.min() >= 0
        assert images.max() <= 255


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_samples_are_finite_for_every_uniform_number(name: str, scale: float):
    module = head(name)
    output = normal(2, module.channels, 8, 8, scale=scale)
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert module(output).sample(edges).isfinite().all()


def test_mixture_samples_follow_the_mixture():
    """The histogram of 200,000 pixels against the probabilities, by total variation."""
    module = head("discretized_logistic_mixture", channels=1)
    output = normal(1, module.channels, 1, 1)
    drawn = module(output.expand(-1, -1, 400, 500)).sample(uniforms(1, 1, 400, 500))
    counts = torch.bincount(drawn.flatten().long(), minlength=256) / drawn.numel()
    exact = module(output.expand(256, -1, 1, 1)).log_prob(GREYS).exp()
    assert (counts - exact).abs().sum() / 2 < 0.02


def test_a_mixture_of_one_is_the_logistic():
    output, x = normal(4, 2 * 3, 8, 8), greys(4, 3, 8, 8)
    with_weight = torch.cat((torch.zeros(4, 3, 8, 8, dtype=torch.float64), output), 1)
    expected = DiscretizedLogistic(output, 3).log_prob(x)
    torch.testing.assert_close(DiscretizedLogisticMixture(with_weight, 3).log_prob(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_narrow_outputs_are_scored_in_float32(name: str):
    module = head(name).eval()
    log_prob = module(normal(2, module.channels, 8, 8).bfloat16()).log_prob(greys(2, 3, 8, 8))
    assert log_prob.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_tiling_an_image_doubles_its_nats(name: str):
    module = head(name).eval()
    output, x = normal(2, module.channels, 8, 8), greys(2, 3, 8, 8) // 128 * 255
    once = module(output).log_prob(x)
    twice = module(torch.cat((output, output), 3)).log_prob(torch.cat((x, x), 3))
    torch.testing.assert_close(twice, 2 * once)


def test_the_optimal_variance_is_the_best_of_all():
    x, mean = normal(50, seed=1), normal(50, seed=2)
    best = optimal_variance(x, mean)
    assert best == ((x - mean) ** 2).mean()

    def log_prob(variance: torch.Tensor) -> torch.Tensor:
        return distributions.Normal(mean, variance.sqrt()).log_prob(x).sum()

    assert all(log_prob(best) > log_prob(best * factor) for factor in (0.9, 0.99, 1.01, 1.1))


def test_the_optimal_gaussian_learns_its_variance_while_training_only():
    module, x = head("optimal_gaussian").double(), greys(64, 3, 8, 8)
    output = normal(64, 3, 8, 8)
    error = optimal_variance(x / 255, output.sigmoid())
    for _ in range(1000):
        trained = module(output).log_prob(x)
    torch.testing.assert_close(module.variance, error, rtol=1e-3, atol=0)
    module.eval()
    scored = module(output).log_prob(x)
    torch.testing.assert_close(scored, trained, rtol=1e-3, atol=0)
    torch.testing.assert_close(module(output[:7]).log_prob(x[:7]), scored[:7])
    assert module.state_dict().keys() == {"variance"}


def test_the_learned_sigma_has_a_gradient_towards_the_optimum():
    module, x, output = head("gaussian").double(), greys(64, 3, 8, 8), normal(64, 3, 8, 8)
    module(output).log_prob(x).sum().backward()
    assert module.log_sigma.grad < 0  # it starts at 1, wider than the error of any image in [0, 1]
