"""The training losses: their values, and that every term alone trains what it should."""

from __future__ import annotations

import math

import pytest
import torch
from linear_vae import LinearVAE, drawn_images
from torch import Tensor

from vae.config import FlatConfig, TrainConfig
from vae.flat import FlatVAE
from vae.model import build
from vae.objective import (
    Terms,
    balancing,
    beta_at,
    dreg_loss,
    elbo_loss,
    importance_bound,
    iwae_loss,
    log_weights,
    terms,
    training_loss,
)

IMAGES = torch.from_numpy(drawn_images(16))


def noise(draws: int, size: int = 3, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(draws * len(IMAGES), size, generator=source, dtype=torch.float64)


def flat(**fields: object) -> FlatVAE:
    geometry = {"height": 8, "width": 8, "channels": 1, "latent_dim": 3, "hidden": (6,), "network": "mlp"}
    model = build(FlatConfig.from_dict(geometry | fields)).double()
    assert isinstance(model, FlatVAE)
    return model


def reached(loss: Tensor, model: torch.nn.Module) -> set[str]:
    """The modules of the model that a loss gives a non-zero gradient to."""
    model.zero_grad()
    loss.backward()
    return {
        name.split(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }


def test_elbo_loss_is_the_negative_mean_elbo() -> None:
    now = Terms(torch.tensor([-10.0, -20.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert now.elbo.tolist() == [-13.0, -27.0]
    assert elbo_loss(now) == 20
    assert elbo_loss(now, beta=2.0) == 25
    assert elbo_loss(now, beta=0.0) == 15


def test_free_bits_are_free_for_each_level_apart() -> None:
    kl = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = elbo_loss(Terms(torch.zeros(2), kl), free_bits=2.5)
    assert loss == 2.5 + 3
    (gradient,) = torch.autograd.grad(loss, kl)
    assert gradient.tolist() == [[0, 0.5], [0, 0.5]]


def test_balancing_charges_the_level_that_carries_more_and_has_no_gradient() -> None:
    kl = torch.tensor([1.0, 3.0], requires_grad=True)
    weights = balancing(kl)
    assert not weights.requires_grad
    assert weights.mean() == 1
    loss = elbo_loss(Terms(torch.zeros(1), kl[None]), balance=True)
    torch.testing.assert_close(loss, torch.tensor(0.5 * 1 + 1.5 * 3))


def test_beta_schedules() -> None:
    warmup = TrainConfig(epochs=4, beta=2.0, beta_schedule="warmup", warmup_epochs=2.0)
    assert [beta_at(warmup, step, 8) for step in range(8)] == [0, 0.5, 1, 1.5, 2, 2, 2, 2]
    assert beta_at(TrainConfig(beta=3.0), 0, 8) == 3


@pytest.mark.parametrize("prior", ["normal", "vamp"])
def test_each_term_alone_trains_what_it_should(prior: str) -> None:
    model = flat(prior=prior, pseudo_inputs=4, likelihood="gaussian")
    encoder = {"encoder", "posterior_head"}
    now = terms(model.infer(IMAGES, noise(1)), IMAGES)
    pseudo = {"prior"} if prior == "vamp" else set()
    assert reached(now.log_likelihood.sum(), model) == encoder | {"decoder", "likelihood"}
    inference = model.infer(IMAGES, noise(1))
    assert reached(inference.kl.sum(), model) == encoder | pseudo
    inference = model.infer(IMAGES, noise(1))
    assert inference.log_prior is not None
    assert reached(inference.log_prior.sum(), model) == encoder | pseudo


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(beta=4.0, beta_schedule="cyclic", free_bits=0.01, kl_balancing=True),
        TrainConfig(objective="iwae", samples=3, gradient="plain"),
        TrainConfig(objective="iwae", samples=3, gradient="dreg"),
    ],
)
@pytest.mark.parametrize("prior", ["normal", "vamp"])
def test_every_objective_trains_every_part(config: TrainConfig, prior: str) -> None:
    model = flat(prior=prior, pseudo_inputs=4)
    with torch.no_grad():
        model.posterior_head.weight *= 300  # so that the KL is well above zero
    loss, now = training_loss(config, 1.0, model.infer(IMAGES, noise(config.samples)), IMAGES)
    assert reached(loss, model) == {name for name, part in model.named_children() if [*part.parameters()]}
    assert now.elbo.shape == (config.samples * len(IMAGES),)


def test_tiling_an_image_doubles_the_reconstruction_nats() -> None:
    assert_tiling_doubles_nats()


def assert_tiling_doubles_nats() -> None:
    for likelihood in ("discretized_logistic", "gaussian", "continuous_bernoulli"):
        model = flat(likelihood=likelihood)
        z = noise(1)
        output = model.decoder(z)
        once = model.likelihood(output).log_prob(IMAGES)
        twice = model.likelihood(torch.cat([output, output], 2)).log_prob(torch.cat([IMAGES, IMAGES], 2))
        torch.testing.assert_close(twice, 2 * once)


def test_one_importance_sample_is_the_elbo() -> None:
    model = LinearVAE()
    inference = model.infer(IMAGES, noise(1))
    now = terms(inference, IMAGES)
    log_w = log_weights(inference, now.log_likelihood)
    one_draw_kl = inference.log_posterior.sum(1) - inference.log_prior.sum(1)  # type: ignore[union-attr]
    torch.testing.assert_close(importance_bound(log_w[None]), now.log_likelihood - one_draw_kl)


def gradients(model: LinearVAE, draws: int, kind: str, repeats: int) -> Tensor:
    """The gradient with respect to phi (and theta) of `repeats` independent estimates."""
    rows = []
    for seed in range(repeats):
        inference = model.infer(IMAGES, noise(draws, seed=seed))
        now = terms(inference, IMAGES)
        log_w = log_weights(inference, now.log_likelihood).unflatten(0, (draws, -1))
        loss = iwae_loss(log_w) if kind == "plain" else dreg_loss(inference, now.log_likelihood, draws)
        parts = (model.encoder, model.logvar, model.weight)
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parts)]))
    return torch.stack(rows)


def near_exact() -> LinearVAE:
    """A linear VAE whose posterior is off the exact one by a little."""
    model = LinearVAE().use_exact_posterior()
    with torch.no_grad():
        model.logvar += 0.3
        model.encoder *= 0.97
    return model


def test_dreg_has_the_value_and_the_expected_gradient_of_the_plain_bound() -> None:
    model = near_exact()
    inference = model.infer(IMAGES, noise(4))
    now = terms(inference, IMAGES)
    log_w = log_weights(inference, now.log_likelihood).unflatten(0, (4, -1))
    torch.testing.assert_close(dreg_loss(inference, now.log_likelihood, 4), iwae_loss(log_w))

    plain, dreg = gradients(model, 4, "plain", 800), gradients(model, 4, "dreg", 800)
    error = torch.sqrt((plain.var(0) + dreg.var(0)) / 800)
    assert ((plain.mean(0) - dreg.mean(0)).abs() < 5 * error + 1e-12).all()


def test_dreg_of_the_decoder_is_the_plain_gradient() -> None:
    model, size = near_exact(), LinearVAE().weight.numel()
    plain, dreg = gradients(model, 4, "plain", 2), gradients(model, 4, "dreg", 2)
    torch.testing.assert_close(plain[:, -size:], dreg[:, -size:])


def test_dreg_has_a_smaller_variance_and_none_at_the_exact_posterior() -> None:
    model, size = near_exact(), LinearVAE().weight.numel()
    plain, dreg = (gradients(model, 8, kind, 100)[:, :-size] for kind in ("plain", "dreg"))
    assert dreg.var(0).sum() < plain.var(0).sum() / 4
    exact = gradients(LinearVAE().use_exact_posterior(), 8, "dreg", 3)[:, :-size]
    assert exact.abs().max() < 1e-9


def test_importance_bound_of_equal_weights_is_the_weight() -> None:
    assert importance_bound(torch.full((7, 2), -3.0)).tolist() == pytest.approx([-3.0, -3.0])
    assert importance_bound(torch.tensor([[0.0], [-math.inf]])).item() == pytest.approx(-math.log(2))
