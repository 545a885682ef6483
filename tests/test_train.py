"""fit(): exact resume, exact figures, nothing non-finite kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from vae import checkpoint, train
from vae.activity import activity
from vae.config import AutoencoderConfig, FlatConfig, ModelConfig, TrainConfig, model_config
from vae.evaluate import evaluate
from vae.model import Model
from vae.train import FitResult, Interrupted, NonFiniteLoss, Progress, fit

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 1, 9, 8), dtype=np.uint8)
HELD_OUT = RNG.integers(0, 256, (13, 1, 9, 8), dtype=np.uint8)
GEOMETRY = {"height": 9, "width": 8, "channels": 1, "latent_dim": 3, "hidden": (4, 4)}
FLAT = FlatConfig.from_dict(GEOMETRY)
SHORT = TrainConfig(epochs=3, batch_size=16, log_every=3, checkpoint_every=1)  # 12 steps, tails of 2

CASES: dict[str, tuple[ModelConfig, TrainConfig]] = {
    "conv": (FLAT, SHORT),
    "vamp": (FlatConfig.from_dict(GEOMETRY | {"prior": "vamp", "pseudo_inputs": 3}), SHORT),
    "binarized": (
        FlatConfig.from_dict(GEOMETRY | {"likelihood": "bernoulli", "binarize": "sampled"}),
        SHORT,
    ),
    "optimal": (FlatConfig.from_dict(GEOMETRY | {"likelihood": "optimal_gaussian"}), SHORT),
    "iwae": (FLAT, dataclasses.replace(SHORT, objective="iwae", samples=4)),
    "warm": (FLAT, dataclasses.replace(SHORT, beta_schedule="warmup", warmup_epochs=2.0, free_bits=0.1)),
    "cosine": (FLAT, dataclasses.replace(SHORT, learning_rate_schedule="cosine")),
    "averaged": (FLAT, dataclasses.replace(SHORT, ema_decay=0.9, learning_rate_warmup_epochs=0.5)),
    "skipping": (FLAT, dataclasses.replace(SHORT, gradient_skip=1.0)),
    "denoising": (
        AutoencoderConfig.from_dict(GEOMETRY | {"corruption": "noise", "corruption_strength": 0.3}),
        SHORT,
    ),
}


class Checkpoints(dict[int, bytes]):
    """A store of checkpoints, as fit's two callbacks."""

    def save(self, step: int, blob: bytes) -> None:
        self[step] = blob

    def restore(self) -> Iterator[bytes]:
        return (self[step] for step in sorted(self, reverse=True))

    def up_to(self, step: int) -> Checkpoints:
        return Checkpoints({at: blob for at, blob in self.items() if at <= step})


def assert_same(first: FitResult, second: FitResult) -> None:
    assert first.history == second.history
    assert (first.steps, first.images_seen) == (second.steps, second.images_seen)
    assert_same_tensors(first.model.state_dict(), second.model.state_dict())


def assert_same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bitwise_exact_from_every_step(case: str) -> None:
    model_config, config = CASES[case]
    saved = Checkpoints()
    whole = fit(model_config, config, IMAGES, validation=HELD_OUT, save=saved.save)
    assert sorted(saved) == list(range(1, 13))
    for step in saved:
        again = Checkpoints()
        restore = saved.up_to(step).restore
        resumed = fit(model_config, config, IMAGES, validation=HELD_OUT, save=again.save, restore=restore)
        assert resumed.resumed_at == step
        assert_same(whole, resumed)
        if step < 12:
            assert_same_tensors(checkpoint.unpack(saved[12])[0], checkpoint.unpack(again[12])[0])


def test_a_stopped_run_resumes_where_it_stopped() -> None:
    saved, asked = Checkpoints(), iter(range(100))
    rare = dataclasses.replace(SHORT, checkpoint_every=1000)
    with pytest.raises(Interrupted, match="after step 5") as stopped:
        fit(FLAT, rare, IMAGES, save=saved.save, stop=lambda: next(asked) == 5)
    assert stopped.value.step == 5
    assert list(saved) == [5]
    resumed = fit(FLAT, rare, IMAGES, save=saved.save, restore=saved.restore)
    assert resumed.resumed_at == 5
    assert_same(resumed, fit(FLAT, rare, IMAGES))


def test_a_finished_run_only_restores() -> None:
    saved = Checkpoints()
    whole = fit(FLAT, SHORT, IMAGES, save=saved.save)
    again = fit(FLAT, SHORT, IMAGES, restore=saved.restore, progress=lambda _: pytest.fail("trained again"))
    assert again.resumed_at == again.steps == 12
    assert_same(whole, again)


def test_a_damaged_checkpoint_is_skipped_by_name(caplog: pytest.LogCaptureFixture) -> None:
    saved = Checkpoints()
    whole = fit(FLAT, SHORT, IMAGES, save=saved.save)
    saved[12] = saved[12][:-1] + b"?"
    with caplog.at_level(logging.WARNING, "vae"):
        resumed = fit(FLAT, SHORT, IMAGES, restore=saved.restore)
    assert resumed.resumed_at == 11
    assert "checkpoint 1, counted from the newest, is skipped: checkpoint is damaged" in caplog.text
    assert_same(whole, resumed)


@pytest.mark.parametrize(
    ("model_config", "config", "images", "part"),
    [
        (dataclasses.replace(FLAT, latent_dim=4), SHORT, IMAGES, "model"),
        (FLAT, dataclasses.replace(SHORT, seed=1), IMAGES, "train"),
        (FLAT, SHORT, IMAGES[::-1], "images"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    model_config: ModelConfig, config: TrainConfig, images: np.ndarray, part: str
) -> None:
    saved = Checkpoints()
    fit(FLAT, SHORT, IMAGES, save=saved.save)
    with pytest.raises(ValueError, match=f"the checkpoint is of another run: its {part} is"):
        fit(model_config, config, images, restore=saved.restore)


def test_every_image_of_every_epoch_is_seen_once() -> None:
    assert_no_image_is_dropped()


def assert_no_image_is_dropped() -> None:
    result = fit(FLAT, SHORT, IMAGES)
    assert result.images_seen == 3 * len(IMAGES)
    assert [line.images for line in result.history if line.split == "epoch"] == [50, 100, 150]


def test_figures_are_means_over_images_and_free_of_training_weights() -> None:
    config = dataclasses.replace(SHORT, beta=3.0)
    lines = fit(FLAT, config, IMAGES, validation=HELD_OUT).history
    for line in lines:
        assert line.elbo == pytest.approx(line.log_likelihood - line.kl)
    train_lines = [line for line in lines if line.split == "train" and line.epoch == 1]
    before = [0, *(line.images for line in train_lines)]
    counts = np.diff(before)
    (epoch,) = [line for line in lines if line.split == "epoch" and line.epoch == 1]
    assert epoch.elbo == pytest.approx(np.average([line.elbo for line in train_lines], weights=counts))
    assert epoch.loss == pytest.approx(3 * epoch.kl - epoch.log_likelihood)


def test_validation_is_the_score_of_evaluation() -> None:
    assert_validation_agrees_with_evaluation()


def assert_validation_agrees_with_evaluation() -> None:
    """The KL is in closed form, so it is the same number whatever the draws."""
    result = fit(FLAT, dataclasses.replace(SHORT, beta=0.5), IMAGES, validation=HELD_OUT)
    score = evaluate(result.model, HELD_OUT, range(len(HELD_OUT)), k=1).scores["kl"].value
    assert result.history[-1].split == "validation"
    assert result.history[-1].kl == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("poisoned", ["loss", "weights"])
def test_nothing_non_finite_reaches_a_checkpoint(monkeypatch: pytest.MonkeyPatch, poisoned: str) -> None:
    original = train._Run.train_step

    def poison(run: train._Run, batch: torch.Tensor) -> None:
        original(run, batch)
        if run.step == 7:
            target = run.meter.interval if poisoned == "loss" else next(run.model.parameters()).data
            target[...] = float("nan")

    monkeypatch.setattr(train._Run, "train_step", poison)
    saved = Checkpoints()
    with pytest.raises(NonFiniteLoss):
        fit(FLAT, SHORT, IMAGES, save=saved.save)
    assert max(saved) == 6


def test_the_learning_rate_falls_along_half_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = train._Run.train_step

    def spy(run: train._Run, batch: torch.Tensor) -> None:
        original(run, batch)
        rates.append(run.optimizer.adam.param_groups[0]["lr"])

    monkeypatch.setattr(train._Run, "train_step", spy)
    fit(FLAT, dataclasses.replace(SHORT, learning_rate_schedule="cosine"), IMAGES)
    np.testing.assert_allclose(rates, 2e-3 * (1 + np.cos(np.pi * np.arange(12) / 12)) / 2)


def test_training_improves_the_elbo_and_returns_an_evaluated_model() -> None:
    steady = np.repeat(IMAGES[:2], 32, axis=0)
    config = TrainConfig(epochs=30, batch_size=16, learning_rate=1e-2)
    result = fit(FLAT, config, steady)
    epochs = [line.elbo for line in result.history if line.split == "epoch"]
    assert epochs[-1] > epochs[0] + 10
    assert isinstance(result.model, Model)
    assert not result.model.training


def test_an_empty_validation_split_is_none() -> None:
    lines = fit(FLAT, SHORT, IMAGES, validation=HELD_OUT[:0]).history
    assert {line.split for line in lines} == {"train", "epoch"}


def test_images_that_do_not_fit_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"images of shape \(50, 1, 9, 8\) do not fit the model"):
        fit(FlatConfig(height=8, width=8, channels=1), SHORT, IMAGES)
    with pytest.raises(ValueError, match="dtype float32"):
        fit(FLAT, SHORT, IMAGES.astype(np.float32))
    with pytest.raises(ValueError, match="no training images"):
        fit(FLAT, SHORT, IMAGES[:0])


def test_the_bound_is_refused_where_it_cannot_be() -> None:
    config = TrainConfig(objective="iwae", samples=2)
    with pytest.raises(ValueError, match="objective='iwae' needs a posterior and a prior"):
        fit(AutoencoderConfig.from_dict(GEOMETRY), config, IMAGES)
    with pytest.raises(ValueError, match=r"gradient='dreg' is for one latent level, .* set gradient='plain'"):
        fit(model_config({"model": "ladder", "height": 9, "width": 8, "channels": 1}), config, IMAGES)


def test_read_only_and_strided_arrays_train_alike() -> None:
    frozen = IMAGES.copy()
    frozen.flags.writeable = False
    strided = np.repeat(IMAGES, 2, axis=0)[::2]
    assert_same(fit(FLAT, SHORT, frozen), fit(FLAT, SHORT, strided))


def test_progress_tells_what_history_keeps() -> None:
    told: list[Progress] = []
    result = fit(FLAT, SHORT, IMAGES, validation=HELD_OUT, progress=told.append)
    assert tuple(told) == result.history
    assert [line.split for line in told if line.epoch == 1] == ["train", "train", "epoch", "validation"]
    assert told[-1].step == told[-1].steps == 12
    assert all(line.images_per_second > 0 for line in told)


def test_who_watches_sees_each_epoch_and_changes_nothing() -> None:
    seen: list[tuple[int, int, bool]] = []

    def watch(epoch: int, step: int, model: Model) -> None:
        seen.append((epoch, step, model.training))
        assert activity(model, HELD_OUT) is not None

    watched = fit(FLAT, SHORT, IMAGES, watch=watch)
    assert seen == [(1, 4, False), (2, 8, False), (3, 12, False)]
    assert_same(watched, fit(FLAT, SHORT, IMAGES))
