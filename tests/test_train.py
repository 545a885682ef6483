"""fit(): exact resume, exact figures, nothing non-finite kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from vae import checkpoint, train
from vae.activity import activity
from vae.config import AutoencoderConfig, FlatConfig, ModelConfig, TrainConfig, model_config
from vae.evaluate import evaluate
from vae.feed import Batch
from vae.flat import FlatVAE
from vae.model import Inference, Model
from vae.optimizer import Optimizer
from vae.progress import Progress
from vae.train import FitResult, Interrupted, NonFiniteLoss, fit

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
    "patient": (FLAT, dataclasses.replace(SHORT, patience=3, ema_decay=0.5)),
    "augmented": (FLAT, dataclasses.replace(SHORT, flip=True, shift=2, micro_batch=5)),
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
    original = train._Run.advance

    def poison(run: train._Run, batch: Batch) -> None:
        original(run, batch)
        if run.step == 7:
            target = run.meter.interval if poisoned == "loss" else next(run.model.parameters()).data
            target[...] = float("nan")

    monkeypatch.setattr(train._Run, "advance", poison)
    saved = Checkpoints()
    with pytest.raises(NonFiniteLoss, match="gone back 3 times"):
        fit(FLAT, SHORT, IMAGES, save=saved.save)
    assert max(saved) == 6


def test_the_learning_rate_falls_along_half_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = Optimizer.follow

    def spy(optimizer: Optimizer, rate: float) -> Tensor:
        rates.append(rate)
        return original(optimizer, rate)

    monkeypatch.setattr(Optimizer, "follow", spy)
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


class Files:
    """The images as blocks of a few, which fit no budget."""

    digest = "files"

    def __init__(self, images: np.ndarray, size: int):
        self.images, self.size = images, size
        self.sizes = [min(size, len(images) - start) for start in range(0, len(images), size)]

    def read(self, block: int) -> np.ndarray:
        return self.images[block * self.size :][: self.size]


def test_streamed_images_train_the_same_model() -> None:
    data, held_out = Files(IMAGES, 7), Files(HELD_OUT, 5)
    resident = fit(FLAT, SHORT, data, validation=held_out)
    assert_same(resident, fit(FLAT, SHORT, data, validation=held_out, budget=0))
    lines = zip(resident.history, fit(FLAT, SHORT, IMAGES, validation=HELD_OUT).history, strict=True)
    assert all(ours.elbo == pytest.approx(theirs.elbo, rel=1e-6) for ours, theirs in lines)


def test_a_streamed_run_resumes_in_the_midst_of_an_epoch() -> None:
    data, saved = Files(IMAGES, 7), Checkpoints()
    whole = fit(FLAT, SHORT, data, save=saved.save, budget=0)
    assert_same(whole, fit(FLAT, SHORT, data, restore=saved.up_to(6).restore, budget=0))


@pytest.mark.parametrize("case", ["conv", "iwae", "binarized", "denoising", "augmented"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(case: str) -> None:
    model_config, config = CASES[case]
    whole = fit(model_config, dataclasses.replace(config, micro_batch=0), IMAGES)
    for micro_batch in (1, 5, 16):
        parts = fit(model_config, dataclasses.replace(config, micro_batch=micro_batch), IMAGES)
        for ours, theirs in zip(whole.history, parts.history, strict=True):
            assert ours.elbo == pytest.approx(theirs.elbo, rel=1e-4)


def test_out_of_memory_halves_the_parts_and_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The network refuses more than 4 images at once, as an allocator would."""
    expected = fit(FLAT, dataclasses.replace(SHORT, micro_batch=4), IMAGES)
    original = FlatVAE.infer

    def small(self: FlatVAE, x: torch.Tensor, noise: torch.Tensor | None) -> Inference:
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x, noise)

    monkeypatch.setattr(FlatVAE, "infer", small)
    saved = Checkpoints()
    with caplog.at_level(logging.WARNING, "vae"):
        found = fit(FLAT, SHORT, IMAGES, save=saved.save)
    assert [r.message for r in caplog.records] == [
        f"train: out of memory: batches of 16 in parts of {size}" for size in (8, 4)
    ]
    assert_same(found, expected)
    caplog.clear()
    assert_same(found, fit(FLAT, SHORT, IMAGES, restore=saved.up_to(6).restore))
    assert not caplog.records


def test_an_error_that_is_not_of_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FlatVAE, x: torch.Tensor, noise: torch.Tensor | None) -> Inference:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(FlatVAE, "infer", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(FLAT, SHORT, IMAGES)


def poisoned_once(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Training whose weights become NaN after a step, the first time it is taken."""
    original, left = train._Run.advance, [1]

    def poison(run: train._Run, batch: Batch) -> None:
        original(run, batch)
        if run.step == step and left:
            left.clear()
            next(run.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(train._Run, "advance", poison)


def test_a_run_that_went_bad_goes_back_and_on_with_half_the_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(SHORT, checkpoint_every=5)
    saved = Checkpoints()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "vae"):
        poisoned_once(patch, step=7)
        mended = fit(FLAT, config, IMAGES, validation=HELD_OUT, save=saved.save)
    (message,) = (record.message for record in caplog.records)
    assert message.endswith("back to step 5, learning rate times 0.5")
    assert mended.steps == 12
    assert sorted(saved) == [5, 10, 12]
    assert all(np.isfinite(line.elbo) for line in mended.history)
    # killed after that, it goes on with the lower rate, to the bit
    again = fit(FLAT, config, IMAGES, validation=HELD_OUT, restore=saved.up_to(10).restore)
    assert_same(mended, again)
    assert_other(mended, fit(FLAT, config, IMAGES, validation=HELD_OUT))


def assert_other(first: FitResult, second: FitResult) -> None:
    assert first.history[-1].elbo != second.history[-1].elbo


def test_training_stops_when_validation_no_longer_improves() -> None:
    """Images of noise: the model learns the 50 by heart, and the others get worse."""
    config = TrainConfig(epochs=200, batch_size=16, learning_rate=1e-2, patience=2, checkpoint_every=7)
    saved = Checkpoints()
    stopped = fit(FLAT, config, IMAGES, validation=HELD_OUT, save=saved.save)
    scores = [line.elbo for line in stopped.history if line.split == "validation"]
    assert stopped.steps < 800
    assert max(scores) == scores[-3]
    kept = evaluate(stopped.model, HELD_OUT, range(len(HELD_OUT)), k=1).scores["kl"].value
    best = next(line for line in stopped.history if line.split == "validation" and line.elbo == max(scores))
    assert kept == pytest.approx(best.kl, rel=1e-5)
    assert max(saved) == stopped.steps
    assert_same(stopped, fit(FLAT, config, IMAGES, validation=HELD_OUT, restore=saved.up_to(14).restore))
    assert_same(stopped, fit(FLAT, config, IMAGES, validation=HELD_OUT, restore=saved.restore))


def test_patience_needs_validation_images() -> None:
    with pytest.raises(ValueError, match="patience=2 needs validation images, and there are none"):
        fit(FLAT, dataclasses.replace(SHORT, patience=2), IMAGES)


def test_a_warm_start_begins_with_the_given_weights_and_says_how_good_they_are() -> None:
    donor = fit(FLAT, SHORT, IMAGES, validation=HELD_OUT)
    weights = donor.model.state_dict()
    saved = Checkpoints()
    config = dataclasses.replace(SHORT, seed=5)
    warm = fit(FLAT, config, IMAGES, validation=HELD_OUT, initial=weights, save=saved.save)
    assert (warm.history[0].split, warm.history[0].step) == ("validation", 0)
    assert warm.history[0].kl == pytest.approx(donor.history[-1].kl, rel=1e-5)
    restored = fit(FLAT, config, IMAGES, validation=HELD_OUT, initial=weights, restore=saved.up_to(3).restore)
    assert_same(warm, restored)
    with pytest.raises(ValueError, match="its initial is"):
        fit(FLAT, config, IMAGES, validation=HELD_OUT, restore=saved.restore)
    other = dataclasses.replace(FLAT, latent_dim=4)
    with pytest.raises(
        ValueError, match=r"of another model: decoder.layers.0.weight is \(8, 3\)|another model"
    ):
        fit(other, config, IMAGES, initial=weights)


def test_an_average_of_weights_is_validated_and_kept() -> None:
    config = dataclasses.replace(SHORT, ema_decay=0.8)
    averaged = fit(FLAT, config, IMAGES, validation=HELD_OUT)
    score = evaluate(averaged.model, HELD_OUT, range(len(HELD_OUT)), k=1).scores["kl"].value
    assert averaged.history[-1].kl == pytest.approx(score, rel=1e-5)
    plain = fit(FLAT, SHORT, IMAGES, validation=HELD_OUT)
    assert averaged.history[0] == plain.history[0]  # training itself is the same
    assert averaged.history[-1].kl != plain.history[-1].kl


def test_bfloat16_is_for_products_alone() -> None:
    config = dataclasses.replace(SHORT, precision="bfloat16")
    found = fit(FLAT, config, IMAGES, validation=HELD_OUT)
    exact = fit(FLAT, SHORT, IMAGES, validation=HELD_OUT)
    assert all(tensor.dtype == torch.float32 for tensor in found.model.state_dict().values())
    assert found.history[0].elbo != exact.history[0].elbo
    for ours, theirs in zip(found.history, exact.history, strict=True):
        assert ours.elbo == pytest.approx(theirs.elbo, rel=0.02)


def test_a_failed_save_ends_training() -> None:
    def full(step: int, blob: bytes) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        fit(FLAT, SHORT, IMAGES, save=full)
