"""What every model of the allowlist keeps of the interface, whichever it is."""

from __future__ import annotations

import pytest
import torch

from vae.config import MODELS, model_config
from vae.model import Model, build, repeat_draws
from vae.objective import log_weights, terms
from vae.random import IdDraws

GEOMETRY = {"height": 10, "width": 9, "channels": 3}
IMAGES = torch.randint(0, 256, (5, 3, 10, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
GENERATIVE = [tag for tag in MODELS if tag != "autoencoder"]


def model(tag: str, seed: int = 0) -> Model:
    return build(model_config({"model": tag, **GEOMETRY}), seed).double().eval()


def noise(built: Model, draws: int, seed: int = 1) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(draws * len(IMAGES), built.latent_dim, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("tag", MODELS)
def test_inference_has_its_shapes(tag: str) -> None:
    built = model(tag)
    size, levels = built.latent_dim, len(built.levels)
    for draws in (1, 3) if built.generative else (1,):
        rows = draws * len(IMAGES)
        found = built.infer(IMAGES, noise(built, draws))
        assert found.mean.shape == found.z.shape == (rows, size)
        assert found.kl.shape == (rows, levels)
        now = terms(found, IMAGES)
        assert now.log_likelihood.shape == now.elbo.shape == (rows,)
        assert now.elbo.isfinite().all()
        assert found.likelihood.mean.shape == (rows, 3, 10, 9)
        assert found.likelihood.mean.min() >= 0
        assert found.likelihood.mean.max() <= 1


@pytest.mark.parametrize("tag", MODELS)
def test_without_noise_the_latents_are_the_means(tag: str) -> None:
    built = model(tag)
    found = built.infer(IMAGES, None)
    assert torch.equal(found.z, found.mean)
    torch.testing.assert_close(built.decode(found.z).mean, found.likelihood.mean)


@pytest.mark.parametrize("tag", GENERATIVE)
def test_several_draws_are_as_many_single_ones(tag: str) -> None:
    built = model(tag)
    draws = noise(built, 3)
    together = built.infer(IMAGES, draws)
    apart = [built.infer(IMAGES, part) for part in draws.chunk(3)]
    for name in ("mean", "logvar", "z", "kl", "log_prior", "log_posterior"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(one, name) for one in apart]), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("tag", GENERATIVE)
def test_decoding_the_latents_is_the_likelihood_of_the_inference(tag: str) -> None:
    built = model(tag)
    found = built.infer(IMAGES, noise(built, 1))
    torch.testing.assert_close(built.decode(found.z).log_prob(IMAGES), found.likelihood.log_prob(IMAGES))


@pytest.mark.parametrize("tag", GENERATIVE)
def test_the_closed_form_kl_is_the_mean_of_its_estimates(tag: str) -> None:
    built = model(tag)
    found = built.infer(IMAGES[:1], noise(built, 400)[:2000])
    assert found.log_posterior is not None
    assert found.log_prior is not None
    difference = (found.log_posterior - found.log_prior - found.kl).sum(1)
    assert abs(difference.mean()) < 5 * difference.std() / 2000**0.5


@pytest.mark.parametrize("tag", MODELS)
def test_an_image_does_not_see_its_batch(tag: str) -> None:
    built = model(tag)
    alone = torch.cat([built.infer(row, None).mean for row in IMAGES.split(1)])
    torch.testing.assert_close(built.infer(IMAGES, None).mean, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tag", GENERATIVE)
def test_draws_from_the_prior_decode(tag: str) -> None:
    built = model(tag)
    z = built.prior_sample(torch.randn(4, built.prior_noise_dim, dtype=torch.float64), 0.7)
    assert z.shape == (4, built.latent_dim)
    assert built.decode(z).mean.shape == (4, 3, 10, 9)


@pytest.mark.parametrize("tag", GENERATIVE)
def test_importance_weights_are_finite_and_reach_every_parameter(tag: str) -> None:
    built = model(tag, seed=3)
    for parameter in built.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    found = built.infer(IMAGES, noise(built, 2))
    log_w = log_weights(found, terms(found, IMAGES).log_likelihood)
    assert log_w.shape == (10,)
    log_w.sum().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_building_is_a_function_of_the_seed_and_leaves_torch_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (model("flat", seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_draws_are_repeated_draw_major_and_must_divide() -> None:
    x = torch.arange(6).reshape(3, 2)
    assert torch.equal(repeat_draws(x, torch.zeros(6, 9)), torch.cat([x, x]))
    assert repeat_draws(x, torch.zeros(3, 9)) is x
    with pytest.raises(AssertionError, match="4 rows of noise for 3 images"):
        repeat_draws(x, torch.zeros(4, 9))


def test_observation_binarizes_where_stated() -> None:
    stated = {"model": "flat", "likelihood": "bernoulli", "binarize": "threshold"}
    seen, target = build(model_config(stated | GEOMETRY)).observe(IMAGES, IdDraws(0, range(5)))
    assert seen is target
    assert set(target.unique().tolist()) == {0, 255}
