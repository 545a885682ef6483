"""fit(): train any model of the allowlist, at the speed of its device, and resume it to the bit.

Every draw is a function of (seed, step), the order of an epoch of (seed, epoch), and a checkpoint holds the
weights, the optimizer and the running sums. So a run that is stopped and resumed at any step, mid-epoch
too, ends with the weights and the history of one that was not.

The parts: `vae.feed` brings the images, `vae.augment` varies them, `vae.step` takes a step with
`vae.optimizer`, on one device or on `vae.ranks`, and `vae.progress` sums up. Here is the loop around them:
what it reports, when it saves, when it stops, and what it does when a loss is no number.

Legend: N images, B batch, C channels, H W pixels.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae import checkpoint, pixels, ranks
from vae.augment import augment, numbers
from vae.beside import Beside
from vae.config import ModelConfig, TrainConfig
from vae.feed import MIB, Array, Batch, Blocks, Feed, first_images
from vae.model import Model, build
from vae.objective import beta_at
from vae.optimizer import Optimizer, learning_rate_at
from vae.progress import Meter, Progress
from vae.step import Stepper
from vae.validation import mean_terms

logger = logging.getLogger("vae")

INITIAL_IMAGES = 1024
"""How many training images a model's data-dependent initialisation sees."""
BUDGET = 4 * 2**30
"""Bytes of training images that stay on the device, where nothing else is said."""
ASK_EVERY = 10
"""Steps after which several ranks ask each other whether to stop."""
ROLL_BACK_FACTOR = 0.5
"""What the learning rate is multiplied by when training goes back to its last good state."""


@dataclass(frozen=True)
class FitResult:
    """The trained model (in evaluation mode) and how it came about.

    steps were taken, fewer than planned after an early stop; resumed_at is the step this process began at.
    """

    model: Model
    history: tuple[Progress, ...]
    steps: int
    images_seen: int
    resumed_at: int


class Interrupted(Exception):
    """Training was asked to stop, and did so after `step` steps with its checkpoint saved."""

    def __init__(self, step: int):
        super().__init__(f"training was stopped after step {step}; its checkpoint is saved")
        self.step = step


class NonFiniteLoss(ArithmeticError):
    """The loss or a weight became NaN or infinite; no checkpoint holds it."""


def _ignore(_: Progress) -> None:
    """The default progress callback."""


def _look_away(epoch: int, step: int, model: Model) -> None:
    """The default of `watch`."""


def _discard(step: int, blob: bytes) -> None:
    """The default store of checkpoints."""


def fit(
    model_config: ModelConfig,
    train_config: TrainConfig,
    images: np.ndarray | Blocks,
    *,
    validation: np.ndarray | Blocks | None = None,
    device: str | torch.device = "cpu",
    budget: int = BUDGET,
    initial: Mapping[str, Tensor] | None = None,
    save: Callable[[int, bytes], None] = _discard,
    restore: Callable[[], Iterator[bytes]] = lambda: iter(()),
    progress: Callable[[Progress], None] = _ignore,
    watch: Callable[[int, int, Model], None] = _look_away,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train a model on images (N, C, H, W) uint8, with an exact ELBO of `validation` after each epoch.

    In a group of processes that torch's launcher began, every rank calls this with the same arguments; the
    first alone saves and reports.

    Args:
        images, validation: an array, or blocks of a set that may be larger than memory.
        budget: bytes of training images that may stay on the device; more are streamed. The result is the
            same either way.
        initial: weights to start from, of a model of this configuration.
        save: commits one checkpoint, called with the step and the blob: every checkpoint_every steps, at
            the end, and when stopped. Made beside training, on a thread of its own, like `progress`.
        restore: yields checkpoints of this very run, newest first; a damaged one is logged and skipped.
        progress: called with each line of the history.
        watch: called after each epoch with it, the step and the model in evaluation mode, to look at only;
            training waits for it, and it for the calls beside training.
        stop: asked between steps; when true, a checkpoint is saved and `Interrupted` raised.

    Raises:
        ValueError: images that do not fit the model, or a checkpoint of another run.
        NonFiniteLoss: the loss or a weight was not finite, and was not either after going back to the last
            good state with a lower learning rate, `rollbacks` times; nothing later than that state is saved.
    """
    data, held_out = _checked(model_config, images), _checked(model_config, validation)
    if data is None:
        raise ValueError("there are no training images")
    if train_config.patience and held_out is None:
        raise ValueError(f"patience={train_config.patience} needs validation images, and there are none")
    train_config = train_config.for_images(sum(data.sizes))
    with Beside() as beside:
        run = _Run(model_config, train_config, data, held_out, torch.device(device), budget, initial)
        run.report = lambda line: beside.submit(progress, line)
        run.watch = lambda *looked_at: _after(beside, watch, *looked_at)
        run.resume(restore())
        resumed_at = run.step
        run.train(lambda step, *state: beside.submit(_commit, save, step, *state), stop, beside)
    return FitResult(run.result(), tuple(run.history), run.step, run.images_seen, resumed_at)


def _after(
    beside: Beside, watch: Callable[[int, int, Model], None], epoch: int, step: int, model: Model
) -> None:
    beside.finish()
    watch(epoch, step, model)


def _commit(
    save: Callable[[int, bytes], None], step: int, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    save(step, checkpoint.pack(tensors, facts))


def _checked(config: ModelConfig, images: np.ndarray | Blocks | None) -> Blocks | None:
    """The images as blocks, refused where they do not fit the model; None where there are none."""
    if images is None or isinstance(images, np.ndarray):
        images = Array(np.empty((0,)) if images is None else images)
    if not sum(images.sizes):
        return None
    pixels.check(config, images.read(0))
    return images


def _check_objective(model: Model, config: TrainConfig) -> None:
    """The importance-weighted bound needs densities, and its DReG gradient a posterior of one level."""
    if config.objective != "iwae":
        return
    if not model.generative:
        raise ValueError(
            f"objective='iwae' needs a posterior and a prior, which model={model.config.model!r} lacks"
        )
    if config.gradient == "dreg" and len(model.levels) > 1:
        raise ValueError(
            f"gradient='dreg' is for one latent level, and model={model.config.model!r} has "
            f"{len(model.levels)}: set gradient='plain'"
        )


State = tuple[dict[str, Tensor], dict[str, Any]]  # named tensors on the host, and facts


class _Run:
    """The state of one training run, and the steps that move it."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        images: Blocks,
        validation: Blocks | None,
        device: torch.device,
        budget: int,
        initial: Mapping[str, Tensor] | None,
    ):
        self.config, self.device, self.validation = config, device, validation
        self.ranks = ranks.here()
        self.report: Callable[[Progress], object] = _ignore
        self.watch: Callable[[int, int, Model], object] = _look_away
        window = config.shuffle_mib * MIB
        self.feed = Feed(images, config.seed, config.batch_size, window, budget, device)
        self.model = _started(model_config, config, images, device, initial)
        self.optimizer = Optimizer(self.model, config)
        self.stepper = Stepper(self.model, config, self.optimizer, self.ranks)
        self.meter = Meter(device, self.ranks)
        self.steps_per_epoch = math.ceil(self.feed.count / config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.step = self.images_seen = self.rollbacks = 0
        self.history: list[Progress] = []
        self.best: dict[str, Tensor] = {}  # the weights of the best validation, where patience may run out
        self.starts_warm = initial is not None
        self.identity = {
            "model": model_config.to_dict(),
            "train": config.to_dict(),
            "images": images.digest,
            "initial": checkpoint.digest(initial),
        }
        self._timed_from = (time.perf_counter(), 0)

    # -- training

    def train(self, save: Callable[..., object], stop: Callable[[], bool], beside: Beside) -> None:
        """Go on from the present step to the last, or until validation has not improved for long enough."""
        self.model.train()
        good = self.state()
        if self.starts_warm and not self.history:
            self._validate()
        while not self.finished:
            try:
                for batch in self._rest_of_epoch():
                    if self._asked(stop):
                        self._save(save)
                        beside.finish()
                        raise Interrupted(self.step)
                    self.advance(batch)
                    if self.step % self.config.checkpoint_every == 0 or self.finished:
                        good = self._save(save)
                assert self.step % self.steps_per_epoch == 0, f"an epoch that ended after step {self.step}"
            except NonFiniteLoss as error:
                self._roll_back(good, error)

    @property
    def finished(self) -> bool:
        """Whether every step was taken, or validation has not become better for `patience` epochs."""
        if not self.config.patience or self.step % self.steps_per_epoch:
            return self.step == self.steps
        return self.step == self.steps or self._stale() >= self.config.patience

    def _stale(self) -> int:
        """Epochs since the best validation."""
        scores = [line.elbo for line in self.history if line.split == "validation"]
        return len(scores) - 1 - max(range(len(scores)), key=scores.__getitem__) if scores else 0

    def _rest_of_epoch(self) -> Iterator[Batch]:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        self._timed_from = (time.perf_counter(), self.images_seen)
        return self.feed.epoch(epoch, position)

    def advance(self, batch: Batch) -> None:
        """One step on a batch, and what is to be reported after it."""
        config = self.config
        images = batch.images
        if config.flip or config.shift:
            epoch = self.step // self.steps_per_epoch
            images = augment(images, numbers(config.seed, epoch, batch.rows), config.flip, config.shift)
        rate = learning_rate_at(config, self.step, self.steps) * ROLL_BACK_FACTOR**self.rollbacks
        self.meter.add(*self.stepper(images, self.step, self.steps, rate))
        self.step += 1
        self.images_seen += len(images)
        self._report()

    def _asked(self, stop: Callable[[], bool]) -> bool:
        """Whether to stop. Ranks ask each other, which waits for the device, and so do it now and then."""
        if self.ranks.world == 1:
            return stop()
        return self.step % ASK_EVERY == 0 and self.ranks.agree(stop(), self.device)

    def _roll_back(self, good: State, error: NonFiniteLoss) -> None:
        """Back to the last good state with a lower rate; or a clear end, when that was tried often enough."""
        if self.rollbacks == self.config.rollbacks:
            raise NonFiniteLoss(f"{error}; gone back {self.rollbacks} times") from error
        rollbacks = self.rollbacks + 1
        self._take_up(*good)
        self.rollbacks = rollbacks
        factor = ROLL_BACK_FACTOR**rollbacks
        logger.warning("train: %s: back to step %d, learning rate times %g", error, self.step, factor)

    def result(self) -> Model:
        """The model with the weights that are kept: the best, the averaged, or the last."""
        self.optimizer.settle()
        if self.best:
            self.model.load_state_dict(self.best)
        return self.model.eval()

    # -- reporting

    def _report(self) -> None:
        """Read the meters when a logging interval or an epoch ends."""
        epoch_ends = self.step % self.steps_per_epoch == 0
        if self.step % self.config.log_every == 0 or epoch_ends:
            self._record("train", *self.meter.read_interval())
        if epoch_ends:
            self._record("epoch", *self.meter.read_epoch())
            with self.optimizer.averaged():  # the weights that this training would end with now
                self._validate()
                if self.ranks.first:
                    self.watch(self.step // self.steps_per_epoch, self.step, self.model.eval())
                    self.model.train()
            self._timed_from = (time.perf_counter(), self.images_seen)

    def _validate(self) -> None:
        if self.validation is None:
            return
        found = mean_terms(self.model, self.validation, self.config.seed, self.ranks)
        self._record("validation", *found)
        if self.config.patience and self._stale() == 0:
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def _record(self, split: str, log_likelihood: float, kl: float, loss: float | None = None) -> None:
        since, before = self._timed_from
        line = Progress(
            split=split,
            epoch=(self.step - 1) // self.steps_per_epoch + 1,
            epochs=self.config.epochs,
            step=self.step,
            steps=self.steps,
            images=self.images_seen,
            skipped=int(self.optimizer.guard.skipped),
            elbo=log_likelihood - kl,
            log_likelihood=log_likelihood,
            kl=kl,
            loss=loss,
            beta=beta_at(self.config, max(self.step - 1, 0), self.steps),
            images_per_second=(self.images_seen - before) / (time.perf_counter() - since),
        )
        self._require_finite(line)
        self.history.append(line)
        if self.ranks.first:
            self.report(line)

    def _require_finite(self, line: Progress) -> None:
        if not math.isfinite(line.elbo + (line.loss or 0.0)):
            raise NonFiniteLoss(
                f"{line.split} loss is not finite by step {self.step}: log_likelihood={line.log_likelihood}, "
                f"kl={line.kl}; a lower learning_rate than {self.config.learning_rate:g} may help"
            )

    # -- checkpoints

    def _save(self, save: Callable[..., object]) -> State:
        state = self.state()
        if self.ranks.first:
            save(self.step, *state)
        return state

    def state(self) -> State:
        """A copy of everything on the host, after making sure that it is finite."""
        self.meter.gather()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {"meter.interval": self.meter.interval, "meter.epoch": self.meter.epoch}
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for name, tensor in copies.items():
            if not _finite(tensor):
                raise NonFiniteLoss(f"{name} is not finite after step {self.step}: no checkpoint was taken")
        return copies, {
            "run": self.identity,
            "step": self.step,
            "images_seen": self.images_seen,
            "rollbacks": self.rollbacks,
            "micro_batch": self.stepper.micro,
            "history": [dataclasses.asdict(line) for line in self.history],
        }

    def resume(self, candidates: Iterator[bytes]) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        for number, blob in enumerate(candidates, start=1):
            try:
                tensors, facts = checkpoint.unpack(blob)
            except ValueError as error:
                logger.warning("checkpoint %d, counted from the newest, is skipped: %s", number, error)
                continue
            self._check_identity(facts["run"])
            self._take_up(tensors, facts)
            return

    def _check_identity(self, saved: dict[str, Any]) -> None:
        for part, mine in self.identity.items():
            if saved.get(part) != _json(mine):
                raise ValueError(
                    f"the checkpoint is of another run: its {part} is {saved.get(part)}, not {mine}"
                )

    def _take_up(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint.under("model.", tensors))
        self.optimizer.restore(checkpoint.under("optimizer.", tensors))
        self.best = {
            name: tensor.to(self.device) for name, tensor in checkpoint.under("best.", tensors).items()
        }
        self.meter.restore(tensors["meter.interval"], tensors["meter.epoch"])
        self.step, self.images_seen, self.rollbacks = facts["step"], facts["images_seen"], facts["rollbacks"]
        self.stepper.micro = facts["micro_batch"]
        self.stepper.forget()
        self.history = [Progress(**line) for line in facts["history"]]


def _started(
    model_config: ModelConfig,
    config: TrainConfig,
    images: Blocks,
    device: torch.device,
    initial: Mapping[str, Tensor] | None,
) -> Model:
    """A new model, with what starts from the data, or with the given weights."""
    model = build(model_config, config.seed).to(device)
    _check_objective(model, config)
    if initial is None:
        model.initialize(pixels.tensor(first_images(images, INITIAL_IMAGES)).to(device))
        return model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    if shapes != given:
        other = sorted(name for name in shapes | given if shapes.get(name) != given.get(name))
        raise ValueError(
            f"the weights to start from are of another model: {other[0]} is {given.get(other[0])}, "
            f"not {shapes.get(other[0])}"
        )
    model.load_state_dict(dict(initial))
    return model


def _finite(tensor: Tensor) -> bool:
    """Whether all of it is: NaN and infinity show in the extremes, which are found in a tenth of the time."""
    return not tensor.numel() or all(extreme.isfinite() for extreme in tensor.aminmax())


def _json(value: Any) -> Any:
    """As it comes back from JSON: lists for tuples."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value
