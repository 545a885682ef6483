"""fit(): train any model of the allowlist on resident images, and resume it to the bit.

Every draw is a function of (seed, step), the order of an epoch of (seed, epoch), and a checkpoint holds the
weights, the optimizer and the running sums. So a run that is stopped and resumed at any step, mid-epoch
too, ends with the weights and the history of one that was not.

Legend: N images, B batch, K draws an image, C channels, H W pixels, D latent dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae import checkpoint, pixels
from vae.config import ModelConfig, TrainConfig
from vae.model import Model, build
from vae.objective import Terms, beta_at, terms, training_loss
from vae.optimizer import Optimizer, learning_rate_at
from vae.random import StepDraws, permutation

logger = logging.getLogger("vae")

INITIAL_IMAGES = 1024
"""How many training images a model's data-dependent initialisation sees."""


@dataclass(frozen=True)
class Progress:
    """One line of a run's history: means over the images since the line before, or over a whole split.

    split: 'train' (every log_every steps), 'epoch' (the training images of a finished epoch, as they were
    met), 'validation' (the whole split, after an epoch). elbo, log_likelihood, kl in nats an image,
    unweighted; loss is what training minimises, with beta as it stood. images counts all seen so far,
    skipped the steps so far that were left out for their gradient (in no mean, if their loss is not finite).
    images_per_second is of this process and does not count in comparisons.
    """

    split: str
    epoch: int
    epochs: int
    step: int
    steps: int
    images: int
    skipped: int
    elbo: float
    log_likelihood: float
    kl: float
    loss: float | None
    beta: float
    images_per_second: float = field(compare=False)


@dataclass(frozen=True)
class FitResult:
    """The trained model (in evaluation mode) and how it came about."""

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


class Meter:
    """Sums over images in float64: an interval's on the device, read when it ends; an epoch's on the host."""

    def __init__(self, device: torch.device | str):
        self.interval = torch.zeros(4, dtype=torch.float64, device=device)
        self.epoch = torch.zeros(4, dtype=torch.float64)

    def add(self, now: Terms, loss: Tensor, images: int, left_out: Tensor) -> None:
        """Add a batch, without waiting for the device; rows beyond one an image are draws, and averaged.

        A batch without finite figures is not added where its step was left out: then it did no harm.
        """
        with torch.no_grad():
            log_likelihood, kl = now.log_likelihood.mean(), now.kl.sum(1).mean()
            batch = images * torch.stack([torch.ones_like(kl), log_likelihood, kl, loss])
            self.interval += batch.where(batch.isfinite().all() | (left_out == 0), 0.0)

    def read_interval(self) -> tuple[float, ...]:
        """(log_likelihood, kl, loss), means over the images since the last reading."""
        sums = self.interval.cpu().clone()
        self.epoch += sums
        self.interval.zero_()
        return tuple((sums[1:] / sums[0]).tolist())

    def read_epoch(self) -> tuple[float, ...]:
        """The same over the intervals read since the last epoch."""
        means = tuple((self.epoch[1:] / self.epoch[0]).tolist())
        self.epoch.zero_()
        return means


def _ignore(_: Progress) -> None:
    """The default progress callback."""


def _look_away(epoch: int, step: int, model: Model) -> None:
    """The default of `watch`."""


def fit(
    model_config: ModelConfig,
    train_config: TrainConfig,
    images: np.ndarray,
    *,
    validation: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    save: Callable[[int, bytes], None] | None = None,
    restore: Callable[[], Iterator[bytes]] | None = None,
    progress: Callable[[Progress], None] = _ignore,
    watch: Callable[[int, int, Model], None] = _look_away,
    stop: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train a model on images (N, C, H, W) uint8, with an exact ELBO of `validation` after each epoch.

    Args:
        save: commits one checkpoint, called with the step and the blob: every checkpoint_every steps, at
            the end, and when stopped.
        restore: yields checkpoints of this very run, newest first; a damaged one is logged and skipped.
        progress: called with each line of the history.
        watch: called after each epoch with it, the step and the model in evaluation mode, to look at only.
        stop: asked between steps; when true, a checkpoint is saved and `Interrupted` raised.

    Raises:
        ValueError: images that do not fit the model, or a checkpoint of another run.
        NonFiniteLoss: the loss or a weight is not finite; nothing later than the last good state is saved.
    """
    _check_images(model_config, images, validation)
    run = _Run(model_config, train_config, images, validation, torch.device(device), progress, watch)
    run.resume(restore() if restore else iter(()))
    resumed_at = run.step
    run.train(save or (lambda step, blob: None), stop)
    run.optimizer.settle()
    history = tuple(run.history)
    return FitResult(run.model.eval(), history, run.step, run.images_seen, resumed_at)


def _check_images(config: ModelConfig, images: np.ndarray, validation: np.ndarray | None) -> None:
    if not len(images):
        raise ValueError("there are no training images")
    for split in (images, validation):
        if split is not None:
            pixels.check(config, split)


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


class _Run:
    """The state of one training run, and the steps that move it."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        images: np.ndarray,
        validation: np.ndarray | None,
        device: torch.device,
        progress: Callable[[Progress], None],
        watch: Callable[[int, int, Model], None] = _look_away,
    ):
        self.config, self.device, self.progress, self.watch = config, device, progress, watch
        self.images = pixels.tensor(images).to(device)
        self.validation = self.images[:0] if validation is None else pixels.tensor(validation)
        self.model = build(model_config, config.seed).to(device)
        _check_objective(self.model, config)
        self.model.initialize(self.images[:INITIAL_IMAGES])
        self.optimizer = Optimizer(self.model, config)
        self.steps_per_epoch = math.ceil(len(images) / config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.step = self.images_seen = 0
        self.meter = Meter(device)
        self.history: list[Progress] = []
        self.identity = {
            "model": model_config.to_dict(),
            "train": config.to_dict(),
            "images": _digest(images),
        }
        self._timed_from = (time.perf_counter(), 0)

    # -- training

    def train(self, save: Callable[[int, bytes], None], stop: Callable[[], bool]) -> None:
        """Go on from the present step to the last."""
        self.model.train()
        self._timed_from = (time.perf_counter(), self.images_seen)
        order = self._order()
        while self.step < self.steps:
            if stop():
                save(self.step, self.checkpoint())
                raise Interrupted(self.step)
            position = self.step % self.steps_per_epoch
            if position == 0:
                order = self._order()
            size = self.config.batch_size
            self.train_step(self.images[order[position * size : (position + 1) * size]])
            self._report()
            if self.step % self.config.checkpoint_every == 0 or self.step == self.steps:
                save(self.step, self.checkpoint())

    def _order(self) -> Tensor:
        epoch = self.step // self.steps_per_epoch
        return permutation(self.config.seed, epoch, len(self.images)).to(self.device)

    def train_step(self, batch: Tensor) -> None:
        """One step on a batch (B, C, H, W) uint8; nothing here waits for the device."""
        config = self.config
        draws = StepDraws(config.seed, self.step, len(batch), self.device)
        seen, target = self.model.observe(batch, draws)
        noise = draws.normal("posterior", config.samples, self.model.latent_dim)
        inference = self.model.infer(seen, noise.transpose(0, 1).flatten(0, 1))
        loss, now = training_loss(config, beta_at(config, self.step, self.steps), inference, target)
        self.optimizer.zero_grad()
        loss.backward()
        left_out = self.optimizer.step(learning_rate_at(config, self.step, self.steps), self.step)
        self.meter.add(now, loss, len(batch), left_out)
        self.step += 1
        self.images_seen += len(batch)

    # -- reporting

    def _report(self) -> None:
        """Read the meters when a logging interval or an epoch ends."""
        epoch_ends = self.step % self.steps_per_epoch == 0
        if self.step % self.config.log_every == 0 or epoch_ends:
            self._record("train", *self.meter.read_interval())
        if epoch_ends:
            self._record("epoch", *self.meter.read_epoch())
            with self.optimizer.averaged():  # the weights that this training would end with now
                if len(self.validation):
                    self._record("validation", *self._validate(self.validation))
                self.watch(self.step // self.steps_per_epoch, self.step, self.model.eval())
                self.model.train()
            self._timed_from = (time.perf_counter(), self.images_seen)

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
            beta=beta_at(self.config, self.step - 1, self.steps),
            images_per_second=(self.images_seen - before) / (time.perf_counter() - since),
        )
        self._require_finite(line)
        self.history.append(line)
        self.progress(line)

    @torch.no_grad()
    def _validate(self, images: Tensor) -> tuple[float, float]:
        """(log_likelihood, kl), means over the whole split; the same draws after every epoch."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        size = pixels.rows_at_once(self.model.config)
        for start in range(0, len(images), size):
            batch = images[start : start + size].to(self.device)
            draws = StepDraws(self.config.seed, f"validation/{start}", len(batch), self.device)
            seen, target = self.model.observe(batch, draws)
            now = terms(self.model.infer(seen, draws.normal("posterior", self.model.latent_dim)), target)
            sums += torch.stack([now.log_likelihood.sum(), now.kl.sum()])
        self.model.train()
        log_likelihood, kl = (sums / len(images)).tolist()
        return log_likelihood, kl

    def _require_finite(self, line: Progress) -> None:
        if not math.isfinite(line.elbo + (line.loss or 0.0)):
            raise NonFiniteLoss(
                f"{line.split} loss is not finite by step {self.step}: log_likelihood={line.log_likelihood}, "
                f"kl={line.kl}; a lower learning_rate than {self.config.learning_rate:g} may help"
            )

    # -- checkpoints

    def checkpoint(self) -> bytes:
        """The whole state as one blob, after making sure that it is finite."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors |= {"meter.interval": self.meter.interval, "meter.epoch": self.meter.epoch}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise NonFiniteLoss(f"{name} is not finite after step {self.step}: no checkpoint was taken")
        history = [dataclasses.asdict(line) for line in self.history]
        facts = {"step": self.step, "images_seen": self.images_seen, "history": history}
        return checkpoint.pack(tensors, {"run": self.identity} | facts)

    def resume(self, candidates: Iterator[bytes]) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        for number, blob in enumerate(candidates, start=1):
            try:
                tensors, facts = checkpoint.unpack(blob)
            except ValueError as error:
                logger.warning("checkpoint %d, counted from the newest, is skipped: %s", number, error)
                continue
            self._check_identity(facts["run"])
            self._restore(tensors, facts)
            return

    def _check_identity(self, saved: dict[str, Any]) -> None:
        for part, mine in self.identity.items():
            if saved[part] != _json(mine):
                raise ValueError(f"the checkpoint is of another run: its {part} is {saved[part]}, not {mine}")

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.model.load_state_dict(_under("model.", tensors))
        self.optimizer.restore(_under("optimizer.", tensors))
        self.meter.interval.copy_(tensors["meter.interval"])
        self.meter.epoch.copy_(tensors["meter.epoch"])
        self.step, self.images_seen = facts["step"], facts["images_seen"]
        self.history = [Progress(**line) for line in facts["history"]]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _digest(images: np.ndarray) -> str:
    """Of the pixels and their shape, so that a resumed run is known to see the same data."""
    state = hashlib.blake2b(repr(images.shape).encode(), digest_size=16)
    state.update(np.ascontiguousarray(images).data)
    return state.hexdigest()


def _json(value: Any) -> Any:
    """As it comes back from JSON: lists for tuples."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value
