"""The ladder against a two-level linear-Gaussian chain, where log p(x) and the posterior are known."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, distributions, nn

from vae import gaussian
from vae.config import LadderConfig, TrainConfig
from vae.evaluate import evaluate
from vae.ladder import LadderVAE, Level, SeparableResidual, Up, bounded, informative, kernel_for
from vae.likelihood import Likelihood, sum_pixels
from vae.model import build
from vae.objective import importance_bound, log_weights, terms
from vae.train import fit

SIZES = [(8, 8), (8, 31), (28, 28), (33, 9), (64, 48), (256, 256)]


def ladder(height: int = 28, width: int = 28, channels: int = 1, **fields: object) -> LadderVAE:
    config = LadderConfig.from_dict({"height": height, "width": width, "channels": channels, **fields})
    model = build(config, seed=1)
    assert isinstance(model, LadderVAE)
    return model


def images(count: int, *shape: int) -> Tensor:
    return torch.randint(
        0, 256, (count, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class LinearGaussian(Likelihood):
    """N(x / 255; output, variance): a Gaussian whose mean is the decoder's output itself."""

    parameters = 1
    variance = 0.3

    def log_prob(self, x: Tensor) -> Tensor:
        logvar = torch.tensor(math.log(self.variance))
        return sum_pixels(gaussian.log_prob(x / 255, self.mean, logvar))

    @property
    def mean(self) -> Tensor:
        return self.output[:, 0]

    def sample(self, uniform: Tensor) -> Tensor:
        return 255 * distributions.Normal(self.mean, self.variance**0.5).icdf(uniform)


class LinearHead(nn.Module):
    def forward(self, output: Tensor) -> Likelihood:
        return LinearGaussian(output, 1)


class Bare(nn.Module):
    """An `Up` without its nonlinearity."""

    def __init__(self, up: Up):
        super().__init__()
        self.up = up

    def forward(self, h: Tensor) -> Tensor:
        return F.pixel_shuffle(self.up.patches(h), self.up.stride)


def linear_chain() -> LadderVAE:
    """A ladder of two levels of one dimension on 8 x 8 images, in which everything but the gates is left.

    The residual branches are zero and one stage holds both levels on a single position, so
    z_1 ~ N(m, s), z_2 | z_1 and x | z_1, z_2 are Gaussians with linear means.
    """
    model = ladder(
        8, 8, likelihood="bernoulli", strides=(8,), hidden=(6,), levels=(2,), latents=(1,)
    ).double()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            parameter.copy_(0.0 if ".last." in name else 0.3 * normal(*parameter.shape, seed=index))
        for level in model.top_down.levels:
            level.prior.weight[1].zero_()  # the variance of z_2 does not depend on z_1
    model.likelihood = LinearHead()
    model.top_down.image[-1] = Bare(model.top_down.image[-1])
    return model


@dataclass
class Exact:
    """p(x), and the posterior N(start + gain (x - E[x]), rest) of z = (z_1, z_2), x in units of 255."""

    evidence: distributions.MultivariateNormal
    start: Tensor
    gain: Tensor
    rest: Tensor


@torch.no_grad()
def exact(model: LadderVAE) -> Exact:
    """By linear algebra on what the model does with a basis."""
    basis, zero = torch.eye(2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    start = model.prior_sample(zero)
    root = model.prior_sample(basis) - start  # z = start + noise root
    bias = model.decode(zero).mean.flatten(1)
    weight = model.decode(basis).mean.flatten(1) - bias  # E[x|z] = z weight + bias
    prior = root.T @ root
    noise = LinearGaussian.variance * torch.eye(64, dtype=torch.float64)
    covariance = weight.T @ prior @ weight + noise
    gain = prior @ weight @ covariance.inverse()
    mean = start[0] @ weight + bias[0]
    evidence = distributions.MultivariateNormal(mean, covariance)
    return Exact(evidence, start[0], gain, prior - gain @ weight.T @ prior)


@torch.no_grad()
def set_posterior(model: LadderVAE, truth: Exact) -> None:
    """Write q(z_1|x) = p(z_1|x) and q(z_2|z_1, x) = p(z_2|z_1, x) into the weights of the two passes.

    Features 0 and 1 carry what x says of z_1 and z_2; feature 2 of the second level carries z_1.
    """
    top, low = model.top_down.levels
    slope = truth.rest[1, 0] / truth.rest[0, 0]
    of_x = torch.stack([truth.gain[0], truth.gain[1] - slope * truth.gain[0]])
    constant = truth.start - truth.gain @ truth.evidence.mean
    down = model.bottom_up.downs[0].patches
    for layer in (down, top.seen, low.seen, top.posterior, low.posterior):
        layer.weight.zero_()
        layer.bias.zero_()
    down.weight[:2], down.bias[:2] = of_x / 2, of_x.sum(1) / 2  # it sees 2x - 1
    for level in (top, low):
        level.seen.weight.copy_(torch.eye(6))
    h1 = model.top_down.start.flatten()
    top.posterior.weight[0, 0] = 1
    top.posterior.bias[0] = constant[0] - h1[0] - top.prior(model.top_down.start)[0, 0, 0, 0]
    by_z1, h2 = low_features(top, h1)
    p2 = low.prior.weight[0]
    low.posterior.weight[0, 1] = 1
    low.posterior.weight[0, 2] = (slope - p2 @ by_z1 - by_z1[1]) / by_z1[2]
    low.posterior.bias[0] = (
        constant[1] - slope * constant[0] - (p2 + low.posterior.weight[0]) @ h2 - low.prior.bias[0]
    )
    variances = torch.stack([truth.rest[0, 0], truth.rest[1, 1] - slope * truth.rest[1, 0]])
    for level, variance in zip((top, low), variances, strict=True):
        change = variance.log() - bounded(level.prior.bias[1])
        level.posterior.bias[1] = change / (1 - change.abs() / 8)  # which `bounded` undoes


def low_features(top: Level, h1: Tensor) -> tuple[Tensor, Tensor]:
    """(d, c) of the second level's h = c + d z_1."""
    return top.drawn.weight[:, 0], h1 + top.drawn.bias


@pytest.fixture
def chain() -> LadderVAE:
    return linear_chain()


@torch.no_grad()
def log_w(model: LadderVAE, x: Tensor, draws: int) -> Tensor:
    """(K, B) importance weights."""
    inference = model.infer(x, normal(draws * len(x), model.latent_dim, seed=draws))
    return log_weights(inference, terms(inference, x).log_likelihood).unflatten(0, (draws, -1))


def test_the_exact_posterior_makes_every_weight_the_evidence(chain: LadderVAE):
    truth, x = exact(chain), images(5, 1, 8, 8).double()
    set_posterior(chain, truth)
    log_evidence = truth.evidence.log_prob(x.flatten(1) / 255)
    torch.testing.assert_close(log_w(chain, x, 7), log_evidence.expand(7, -1))


def test_the_bounds_rise_to_the_evidence(chain: LadderVAE):
    """L_1 <= L_5 <= L_500 <= log p(x) under a posterior that is wrong in mean and width."""
    truth, x = exact(chain), images(20, 1, 8, 8).double()
    set_posterior(chain, truth)
    for level in chain.top_down.levels:
        with torch.no_grad():
            level.posterior.bias += torch.tensor([0.4, 0.5]) * truth.rest.diag().mean().sqrt()
    log_evidence = truth.evidence.log_prob(x.flatten(1) / 255).mean()
    one, few, many = (importance_bound(log_w(chain, x, k)).mean() for k in (1, 5, 500))
    assert one < few < many < log_evidence + 0.01
    torch.testing.assert_close(many, log_evidence, atol=0.02, rtol=0)


def test_the_elbo_falls_short_of_the_evidence_by_the_posteriors_kl(chain: LadderVAE):
    """log p(x) - E_q[log w] = KL(q||p(z|x)), which for a shifted top level is known."""
    truth, x = exact(chain), images(4, 1, 8, 8).double()
    set_posterior(chain, truth)
    low = chain.top_down.levels[1]
    with torch.no_grad():
        low.posterior.bias[0] += 0.5
    variance = (bounded(low.prior.bias[1]) + bounded(low.posterior.bias[1])).exp()
    gap = truth.evidence.log_prob(x.flatten(1) / 255) - log_w(chain, x, 4000).mean(0)
    torch.testing.assert_close(gap, (0.5**2 / (2 * variance)).expand(4), rtol=0.1, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_goes_in_and_comes_out(size: tuple[int, int], channels: int):
    model = ladder(*size, channels)
    x = images(2, channels, *size)
    inference = model.infer(x, torch.randn(4, model.latent_dim))
    assert inference.likelihood.mean.shape == (4, channels, *size)
    assert inference.kl.shape == (4, len(model.levels))
    assert inference.likelihood.log_prob(x.repeat(2, 1, 1, 1)).isfinite().all()


@pytest.fixture(scope="module")
def model() -> LadderVAE:
    """Three levels in two stages, with priors and posteriors far from each other."""
    built = ladder(strides=(4, 2), hidden=(8, 16), levels=(2, 1), latents=(2, 3)).double()
    with torch.no_grad():
        for level in built.top_down.levels:
            level.prior.weight.copy_(0.2 * normal(*level.prior.weight.shape, seed=1))
            level.posterior.weight.copy_(0.2 * normal(*level.posterior.weight.shape, seed=2))
    return built.eval()


def test_a_bounded_log_variance_has_a_gradient_wherever_it_is():
    for value in (-1e3, -30.0, 0.0, 20.0, 1e3):
        logvar = torch.tensor(value, requires_grad=True)
        bounded(logvar).backward()
        assert bounded(logvar).abs() < 8
        assert logvar.grad > 0


@pytest.mark.parametrize(("size", "reached"), [((7, 7), 9), ((7, 1), 3), ((1, 1), 1)])
def test_a_block_reaches_the_neighbours_that_there_are(size: tuple[int, int], reached: int):
    block = SeparableResidual(4, kernel_for(size)).double()
    x = normal(1, 4, *size, seed=2)
    changed = x.clone()
    changed[0, :, size[0] // 2, size[1] // 2] += 1.0
    assert int(((block(changed) - block(x)).abs().sum(1) > 0).sum()) == reached


def test_with_overlap_a_patch_is_made_from_its_neighbours_too():
    """A change at one position of the lower level reaches the pixels of the next patch."""

    def reach(**fields: object) -> int:
        model = ladder(likelihood="bernoulli", strides=(4, 7), hidden=(8, 16), blocks=1, **fields)
        features = torch.zeros(1, 8, 7, 7)
        changed = features.clone()
        changed[0, :, 3, 3] = 1.0
        up = model.top_down.image[-1]
        return int(((up(changed) - up(features)).abs() > 0).sum())

    assert reach() == 4 * 4
    assert reach(overlap=True) == 12 * 12


def test_levels_are_slices_of_the_flat_latents_from_the_top(model: LadderVAE):
    assert model.levels == ((3, 4, 4), (2, 7, 7), (2, 7, 7))
    assert model.latent_dim == 48 + 98 + 98
    z = normal(2, model.latent_dim)
    assert [tuple(part.shape[1:]) for part in model.split(z)] == list(model.levels)
    assert torch.equal(torch.cat([part.flatten(1) for part in model.split(z)], 1), z)


def test_the_kl_of_a_level_is_the_sum_of_its_dimensions_and_torch_s(model: LadderVAE):
    inference = model.infer(images(3, 1, 28, 28), normal(3, model.latent_dim))
    by_level = [part.flatten(1).sum(1) for part in model.split(inference.kl_per_dim)]
    torch.testing.assert_close(inference.kl, torch.stack(by_level, 1))
    top = model.top_down.levels[0]
    prior_mean, prior_logvar = (m[0].flatten() for m in top.p(model.top_down.start))
    q = distributions.Normal(inference.mean[:, :48], (inference.logvar[:, :48] / 2).exp())
    p = distributions.Normal(prior_mean, (prior_logvar / 2).exp())
    torch.testing.assert_close(inference.kl[:, 0], distributions.kl_divergence(q, p).sum(1))


def test_the_mean_of_the_log_ratio_is_the_kl_of_the_lowest_level_given_those_above(model: LadderVAE):
    """log q - log p of the last level, averaged over its own draws alone, is its analytic KL."""
    x, draws = images(1, 1, 28, 28), 3000
    noise = normal(1, model.latent_dim).repeat(draws, 1)
    noise[:, -98:] = normal(draws, 98, seed=3)
    inference = model.infer(x, noise)
    ratio = (inference.log_posterior - inference.log_prior)[:, -1]
    assert (inference.kl[:, -1] - inference.kl[0, -1]).abs().max() < 1e-9
    assert abs(ratio.mean() - inference.kl[0, -1]) < 4 * ratio.std() / math.sqrt(draws)


def test_decoding_the_draws_is_what_inference_decoded(model: LadderVAE):
    inference = model.infer(images(3, 1, 28, 28), normal(3, model.latent_dim))
    torch.testing.assert_close(model.decode(inference.z).mean, inference.likelihood.mean)


def test_without_noise_every_level_is_conditioned_on_the_means_above(model: LadderVAE):
    x = images(3, 1, 28, 28)
    means = model.infer(x, None)
    assert torch.equal(means.z, means.mean)
    at_zero = model.infer(x, torch.zeros(3, model.latent_dim, dtype=torch.float64))
    torch.testing.assert_close(at_zero.mean, means.mean)
    assert not torch.allclose(model.infer(x, normal(3, model.latent_dim)).mean[:, 48:], means.mean[:, 48:])


def test_draws_of_an_image_are_rows_of_one_pass(model: LadderVAE):
    x, noise = images(3, 1, 28, 28), normal(6, model.latent_dim)
    both = model.infer(x, noise)
    for draw in range(2):
        rows = slice(3 * draw, 3 * draw + 3)
        torch.testing.assert_close(model.infer(x, noise[rows]).mean, both.mean[rows])


def test_an_image_does_not_depend_on_its_batch(model: LadderVAE):
    x, noise = images(5, 1, 28, 28), normal(5, model.latent_dim)
    whole = model.infer(x, noise)
    alone = model.infer(x[3:4], noise[3:4])
    torch.testing.assert_close(whole.mean[3:4], alone.mean)
    torch.testing.assert_close(whole.kl[3:4], alone.kl)


def test_prior_samples_have_the_prior_s_density(model: LadderVAE):
    """The top level against its moments; the temperature scales deviations and leaves means."""
    top = model.top_down.levels[0]
    mean, logvar = (m[0].flatten() for m in top.p(model.top_down.start))
    noise = normal(4, model.latent_dim)
    for temperature in (1.0, 0.5, 0.0):
        z = model.prior_sample(noise, temperature)
        expected = mean + temperature * (logvar / 2).exp() * noise[:, :48]
        torch.testing.assert_close(z[:, :48], expected)


def test_a_temperature_per_level_moves_that_level_and_what_hangs_on_it(model: LadderVAE):
    noise = normal(2, model.latent_dim)
    warm, cold_end = (model.prior_sample(noise, t) for t in ([1.0, 1.0, 1.0], [1.0, 1.0, 0.0]))
    torch.testing.assert_close(warm[:, :146], cold_end[:, :146])
    assert (warm[:, 146:] - cold_end[:, 146:]).abs().min() > 0
    still = model.prior_sample(noise, [0.0, 0.0, 0.0])
    torch.testing.assert_close(still[0], still[1])
    with pytest.raises(ValueError, match=r"2 temperatures \[1.0, 1.0\] for 3 levels"):
        model.prior_sample(noise, [1.0, 1.0])


def test_every_parameter_learns_from_the_elbo():
    model = ladder(strides=(4, 7), hidden=(8, 16), levels=(2, 1), latents=(2, 3))
    x = images(8, 1, 28, 28)
    now = terms(model.infer(x, torch.randn(8, model.latent_dim)), x)
    (-now.elbo.mean()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_the_kl_of_each_level_alone_trains_that_level(model: LadderVAE):
    """Prior and posterior of a level; the top one's prior is a constant, which its own KL trains too."""
    for level, part in enumerate(model.top_down.levels):
        model.zero_grad()
        x = images(8, 1, 28, 28)
        model.infer(x, normal(8, model.latent_dim)).kl[:, level].mean().backward()
        for layer in (part.prior, part.posterior, part.seen):
            assert layer.weight.grad.abs().sum() > 0
        for below in model.top_down.levels[level + 1 :]:
            assert below.posterior.weight.grad is None or not below.posterior.weight.grad.any()


def test_balancing_brings_the_levels_of_a_trained_ladder_closer():
    """Without it the level that is used first carries nearly all."""
    digits = (load_digits().images * (255 / 16)).round().astype(np.uint8)[:, None]
    config = LadderConfig.from_dict(
        {"height": 8, "width": 8, "channels": 1, "likelihood": "bernoulli", "binarize": "threshold"}
        | {"strides": (4, 2), "hidden": (16, 32), "levels": (1, 1), "latents": (2, 8)}
    )
    training = TrainConfig(
        epochs=10, batch_size=32, learning_rate=4e-3, beta_schedule="warmup", warmup_epochs=10.0
    )
    least = []
    for balance in (False, True):
        trained = fit(config, replace(training, kl_balancing=balance), digits[:1400]).model
        scores = evaluate(trained, digits[1400:], range(397), k=1).scores
        levels = scores["kl_per_level"].value
        least.append(min(levels) / sum(levels))
    assert least[1] > 2 * least[0]


def test_the_informative_dimensions_are_those_above_the_threshold():
    assert informative([0.5, 0.0, 0.011, 0.01], 0.01) == [0, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": (0, 0)}, "needs a stochastic level"),
        ({"hidden": (8,)}, "has 1 stages"),
        ({"strides": (4, 0)}, "strides="),
        ({"blocks": 0}, "blocks=0"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LadderConfig.from_dict({"height": 28, "width": 28, "channels": 1, **fields})
