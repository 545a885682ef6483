"""The diagonal Gaussian against torch.distributions in float64, over log-variances from -30 to 20."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vae import gaussian

LOGVARS = torch.linspace(-30, 20, 11, dtype=torch.float64)


def grid() -> tuple[torch.Tensor, ...]:
    """Every pair of log-variances, with means near and far."""
    q, p, mean = torch.meshgrid(LOGVARS, LOGVARS, torch.tensor([-3.0, 0.0, 1e-3]).double(), indexing="ij")
    return mean, q, torch.full_like(mean, 0.5), p


def test_kl_is_that_of_torch_distributions() -> None:
    mean, logvar, prior_mean, prior_logvar = grid()
    q = Normal(mean, torch.exp(logvar / 2))
    p = Normal(prior_mean, torch.exp(prior_logvar / 2))
    torch.testing.assert_close(gaussian.kl(*grid()), kl_divergence(q, p), rtol=1e-12, atol=1e-12)


def test_standard_kl_is_kl_to_the_standard_normal() -> None:
    mean, logvar, *_ = grid()
    zero = torch.zeros_like(mean)
    torch.testing.assert_close(gaussian.standard_kl(mean, logvar), gaussian.kl(mean, logvar, zero, zero))


def test_log_prob_is_that_of_torch_distributions() -> None:
    x, logvar, mean, _ = grid()
    expected = Normal(mean, torch.exp(logvar / 2)).log_prob(x)
    torch.testing.assert_close(gaussian.log_prob(x, mean, logvar), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gaussian.standard_log_prob(x), Normal(0.0, 1.0).log_prob(x))


@pytest.mark.parametrize("logvar", LOGVARS.tolist())
def test_gradients_are_the_closed_form_ones_and_never_vanish(logvar: float) -> None:
    """dKL/dlogvar = (e^logvar - 1)/2 and dz/dlogvar = eps e^(logvar/2)/2."""
    value = torch.tensor(logvar, requires_grad=True)
    (slope,) = torch.autograd.grad(gaussian.standard_kl(torch.tensor(0.7), value), value)
    torch.testing.assert_close(slope, torch.expm1(value.detach()) / 2)
    (move,) = torch.autograd.grad(gaussian.sample(torch.tensor(0.7), value, torch.tensor(1.3)), value)
    torch.testing.assert_close(move, 0.65 * torch.exp(value.detach() / 2))
    assert move != 0


def test_small_kl_keeps_its_digits_in_float32() -> None:
    mean, logvar = torch.tensor(0.0), torch.tensor(1e-3)
    exact = gaussian.standard_kl(mean.double(), logvar.double())
    torch.testing.assert_close(gaussian.standard_kl(mean, logvar).double(), exact, rtol=1e-3, atol=0)


def test_narrow_types_are_computed_in_float32() -> None:
    half = torch.zeros(3, dtype=torch.bfloat16)
    assert gaussian.standard_kl(half, half).dtype == torch.float32
    assert gaussian.standard_kl(half.double(), half.double()).dtype == torch.float64


def test_draws_have_the_mean_and_the_deviation_asked_for() -> None:
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = gaussian.sample(torch.tensor(2.0).double(), torch.tensor(4.0).double().log(), noise)
    assert abs(z.mean() - 2) < 0.03
    assert abs(z.std() - 2) < 0.03
