"""Known mistakes of popular code, each put in on purpose: the test that guards against it must turn red."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import test_evaluate
import test_objective
import test_pixels
import test_train
import torch
from _pytest.outcomes import Failed
from torch import Tensor

from vae import evaluate, gaussian, likelihood, objective, pixels, train, validation
from vae.model import Inference

Break = Callable[[pytest.MonkeyPatch], None]


def mean_over_pixels(patch: pytest.MonkeyPatch) -> None:
    """A mean over pixels beside a sum over latents: a hidden beta of C*H*W."""
    patch.setattr(likelihood, "sum_pixels", lambda values: values.flatten(1).mean(1))


def another_kl_weight_in_validation(patch: pytest.MonkeyPatch) -> None:
    """The training's beta in the reported validation."""

    def weighted(inference: Inference, x: Tensor) -> objective.Terms:
        now = objective.terms(inference, x)
        return objective.Terms(now.log_likelihood, 0.5 * now.kl)

    patch.setattr(validation, "terms", weighted)


def cross_entropy_on_grey_values(patch: pytest.MonkeyPatch) -> None:
    """Binary cross-entropy on grey values, called an ELBO."""
    patch.setattr(pixels, "check", lambda config, images: None)
    patch.setattr(test_pixels, "check", pixels.check)


def closed_form_kl_in_the_bound(patch: pytest.MonkeyPatch) -> None:
    """The analytic KL in place of each draw's own log q - log p."""
    patch.setattr(evaluate, "log_weights", lambda inference, ll: ll - inference.kl.sum(1))


def weights_of_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    """log q - log p where log p - log q belongs."""
    patch.setattr(
        evaluate,
        "log_weights",
        lambda inference, ll: ll - inference.log_prior.sum(1) + inference.log_posterior.sum(1),
    )


def clamped_log_variance(patch: pytest.MonkeyPatch) -> None:
    """A clamp that kills the gradient outside [-10, 2]."""
    true_sample = gaussian.sample
    patch.setattr(
        gaussian, "sample", lambda mean, logvar, noise: true_sample(mean, logvar.clamp(-10, 2), noise)
    )


def dropped_last_batch_in_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Only whole batches, where there is one."""
    true_slices = evaluate.slices
    patch.setattr(evaluate, "slices", lambda count, size: true_slices(count // size * size or count, size))


def dropped_last_batch_in_training(patch: pytest.MonkeyPatch) -> None:
    """DataLoader(drop_last=True)."""

    class Floor:
        ceil, isfinite = math.floor, math.isfinite

    patch.setattr(train, "math", Floor)


def mean_of_batch_means(patch: pytest.MonkeyPatch) -> None:
    """Each batch counts the same, however many images it has."""
    true_merge = evaluate.merge

    def of_means(parts: Sequence[evaluate.Measurements]) -> evaluate.Measurements:
        means = [{name: c.mean(0, keepdims=True) for name, c in part.columns.items()} for part in parts]
        return true_merge(
            [evaluate.Measurements(m, p.sums, p.latents) for m, p in zip(means, parts, strict=True)]
        )

    patch.setattr(evaluate, "merge", of_means)


def assert_log_variance_always_has_a_gradient() -> None:
    for logvar in (-30.0, -12.0, 5.0, 20.0):
        value = torch.tensor(logvar, requires_grad=True)
        gaussian.sample(torch.zeros(()), value, torch.ones(())).backward()
        assert value.grad != 0


def assert_scores_do_not_depend_on_the_batch() -> None:
    test_evaluate.assert_scores_do_not_depend_on_the_batch(test_evaluate.CONFIGS[0])


MISTAKES: list[tuple[Break, Callable[[], None]]] = [
    (mean_over_pixels, test_objective.assert_tiling_doubles_nats),
    (another_kl_weight_in_validation, test_train.assert_validation_agrees_with_evaluation),
    (cross_entropy_on_grey_values, test_pixels.assert_grey_is_refused),
    (closed_form_kl_in_the_bound, test_evaluate.assert_exact_posterior_has_equal_weights),
    (weights_of_the_wrong_sign, test_evaluate.assert_exact_posterior_has_equal_weights),
    (weights_of_the_wrong_sign, test_evaluate.assert_bounds_rise_to_log_p),
    (clamped_log_variance, assert_log_variance_always_has_a_gradient),
    (dropped_last_batch_in_evaluation, assert_scores_do_not_depend_on_the_batch),
    (dropped_last_batch_in_training, test_train.assert_no_image_is_dropped),
    (mean_of_batch_means, assert_scores_do_not_depend_on_the_batch),
]


@pytest.mark.parametrize(
    ("mistake", "guard"), MISTAKES, ids=[f"{m.__name__}-{g.__name__}" for m, g in MISTAKES]
)
def test_a_mistake_turns_its_guard_red(
    mistake: Break, guard: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard()  # green as the code is
    mistake(monkeypatch)
    with pytest.raises((AssertionError, Failed)):
        guard()
