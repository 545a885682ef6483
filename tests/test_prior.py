"""Priors: densities that integrate to one, against quadrature and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vae import gaussian
from vae.config import FlatConfig
from vae.flat import FlatVAE
from vae.model import build
from vae.objective import importance_bound, log_weights, terms
from vae.prior import StandardNormal, VampPrior, mixture_log_prob

# z on a fine grid: the rectangle rule is exact to rounding for smooth functions that vanish at its ends
GRID = torch.linspace(-12, 12, 8001, dtype=torch.float64)[:, None]
STEP = float(GRID[1] - GRID[0])


def mixture(components: int, size: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(components)
    mean = 2 * torch.randn(components, size, generator=source, dtype=torch.float64)
    return mean, 0.5 * torch.randn(components, size, generator=source, dtype=torch.float64)


def vamp_vae(latent_dim: int, pseudo_inputs: int) -> FlatVAE:
    """A small VampPrior VAE in float64, its weights large enough that components differ."""
    config = FlatConfig(
        height=8,
        width=8,
        channels=1,
        latent_dim=latent_dim,
        network="mlp",
        hidden=(8,),
        prior="vamp",
        pseudo_inputs=pseudo_inputs,
    )
    model = build(config).double()
    assert isinstance(model, FlatVAE)
    with torch.no_grad():
        model.posterior_head.weight.mul_(20)
    return model


@pytest.mark.parametrize(("components", "size"), [(1, 1), (5, 3), (40, 16)])
def test_mixture_density_is_that_of_torch_distributions(components: int, size: int) -> None:
    mean, logvar = mixture(components, size)
    z = 3 * torch.randn(50, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = Independent(Normal(mean, torch.exp(logvar / 2)), 1)
    expected = MixtureSameFamily(Categorical(torch.ones(components).double()), parts).log_prob(z)
    torch.testing.assert_close(mixture_log_prob(z, mean, logvar), expected, rtol=1e-10, atol=1e-10)


def test_mixture_keeps_its_digits_where_components_are_narrow() -> None:
    """Standard deviations of e^-9 around means of several units, in float32."""
    mean, logvar = (part.float() for part in mixture(10, 8))
    logvar = logvar - 18
    z = gaussian.sample(mean, logvar, torch.randn(10, 8, generator=torch.Generator().manual_seed(0)))
    parts = Independent(Normal(mean.double(), torch.exp(logvar.double() / 2)), 1)
    exact = MixtureSameFamily(Categorical(torch.ones(10).double()), parts).log_prob(z.double())
    single = mixture_log_prob(z, mean, logvar)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-4)


def test_vamp_prior_integrates_to_one() -> None:
    prior = vamp_vae(latent_dim=1, pseudo_inputs=4).prior
    assert torch.exp(prior.log_prob(GRID)).sum().item() * STEP == pytest.approx(1, abs=1e-9)


def test_vamp_prior_with_one_component_is_that_gaussian() -> None:
    model = vamp_vae(latent_dim=3, pseudo_inputs=1)
    assert isinstance(model.prior, VampPrior)
    mean, logvar = model.prior.components()
    z = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.prior.log_prob(z), gaussian.log_prob(z, mean, logvar).sum(1))


def test_one_draw_kl_averages_to_the_integral() -> None:
    model = vamp_vae(latent_dim=1, pseudo_inputs=4)
    x = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    noise = torch.randn(40_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        inference = model.infer(x, noise)
        assert inference.logvar is not None
        log_q = gaussian.log_prob(GRID, inference.mean[0], inference.logvar[0])[:, 0]
        exact = (log_q.exp() * (log_q - model.prior.log_prob(GRID))).sum() * STEP
    estimates = inference.kl[:, 0]
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(len(noise))


@pytest.mark.parametrize("prior", ["vamp", "normal"])
def test_importance_bound_reaches_log_p_of_x_by_quadrature(prior: str) -> None:
    """log p(x) = log integral of p(x|z) p(z) over a one-dimensional z."""
    model = vamp_vae(latent_dim=1, pseudo_inputs=4)
    if prior == "normal":
        model.prior = StandardNormal(1)
    x = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for row in x.split(1):
            log_joint = model.decode(GRID).log_prob(row.expand(len(GRID), -1, -1, -1))
            log_joint = log_joint + model.prior.log_prob(GRID)
            exact = torch.logsumexp(log_joint, 0) + math.log(STEP)
            noise = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
            inference = model.infer(row, noise)
            log_w = log_weights(inference, terms(inference, row).log_likelihood)
            assert importance_bound(log_w[:, None]).item() == pytest.approx(exact.item(), abs=0.1)


def test_draws_from_the_vamp_prior_have_its_moments() -> None:
    model = vamp_vae(latent_dim=2, pseudo_inputs=3)
    assert isinstance(model.prior, VampPrior)
    noise = torch.randn(40_000, model.prior_noise_dim, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        z = model.prior_sample(noise)
        mean, logvar = model.prior.components()
    variance = logvar.exp().mean(0) + mean.var(0, correction=0)
    torch.testing.assert_close(z.mean(0), mean.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(0), variance, atol=0, rtol=0.05)


def test_temperature_scales_deviations_and_zero_gives_the_means() -> None:
    noise = torch.randn(5, 3)
    assert torch.equal(StandardNormal(3).sample(noise, 0.5), 0.5 * noise)
    model = vamp_vae(latent_dim=2, pseudo_inputs=3)
    assert isinstance(model.prior, VampPrior)
    cold = model.prior_sample(torch.randn(9, 3).double(), 0.0)
    distance = (cold[:, None] - model.prior.components()[0]).abs().sum(2).min(1).values
    assert distance.max() == 0


def test_pseudo_inputs_start_as_images_of_the_data() -> None:
    model = vamp_vae(latent_dim=2, pseudo_inputs=3)
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    model.initialize(images)
    assert isinstance(model.prior, VampPrior)
    start = torch.sigmoid(model.prior.logits)
    wanted = (images[[0, 1, 0]].double() / 255).clamp(0.02, 0.98)
    torch.testing.assert_close(start, wanted)
