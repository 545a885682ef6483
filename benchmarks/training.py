"""What the benchmarks share: idx folders, training for a time, bundles kept aside, the machine."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vae
from data.sources import open_source
from vae import bundle, pixels
from vae.config import ModelConfig, TrainConfig
from vae.model import Model, build
from vae.objective import beta_at, training_loss
from vae.optimizer import Optimizer
from vae.random import StepDraws, permutation

LR_WARMUP = 0.1  # of the time; the learning rate then falls along a cosine to zero
SLICE = 1.0  # CPU seconds of a turn


@dataclass(frozen=True)
class Images:
    """One split of a data set: uint8 (N, 1, H, W), ids and labels in its order."""

    pixels: np.ndarray
    ids: list[str]
    labels: np.ndarray


def read_idx(folder: str) -> dict[str, Images]:
    """The splits 'train' and 'test' of a folder of idx files."""
    source = open_source(f"idx:{folder}")
    found: dict[str, list[Any]] = {}
    for rows in source.listing():
        found.setdefault(rows["split"][0].as_py(), []).append((np.asarray(source.read(rows)), rows))
    return {split: _joined(parts) for split, parts in found.items()}


def _joined(parts: list[Any]) -> Images:
    stack = np.concatenate([images for images, _ in parts]).transpose(0, 3, 1, 2)
    ids = [key for _, rows in parts for key in rows["id"].to_pylist()]
    labels = [int(label) for _, rows in parts for label in rows["label"].to_pylist()]
    return Images(np.ascontiguousarray(stack), ids, np.array(labels))


@dataclass(frozen=True)
class Trained:
    """A model after its time, and what it did in it."""

    model: Model
    cpu_seconds: float
    steps: int
    images_seen: int
    steps_skipped: int


class Training:
    """A training that goes on for a slice of CPU seconds at a time, until it has had all of its own.

    The learning rate warms up and falls to zero over that time, the same for every model, and a schedule of
    beta in epochs is taken as its share of config.epochs. Everything else is `vae.train.fit`'s: Adam and its
    guard, the draws and the order as functions of the seed and the step.
    """

    def __init__(self, cpu_seconds: float, model: ModelConfig, config: TrainConfig, images: np.ndarray):
        self.config, self.cpu_seconds = config, cpu_seconds
        self.data = pixels.tensor(images)
        self.model = build(model, config.seed)
        self.model.initialize(self.data[:1024])
        self.model.train()
        self.optimizer = Optimizer(self.model, config)
        self.step, self.used = 0, 0.0

    @property
    def done(self) -> bool:
        return self.used >= self.cpu_seconds

    def go_on(self, cpu_seconds: float) -> None:
        """Train for so many CPU seconds of this process more, or for what is left."""
        end = min(self.used + cpu_seconds, self.cpu_seconds)
        began, before = time.process_time(), self.used
        while self.used < end:
            self._train_step()
            self.used = before + time.process_time() - began

    def _train_step(self) -> None:
        config, spent = self.config, self.used / self.cpu_seconds
        batch = self._batch()
        draws = StepDraws(config.seed, self.step, len(batch))
        seen, target = self.model.observe(batch, draws)
        noise = draws.normal("posterior", config.samples, self.model.latent_dim)
        inference = self.model.infer(seen, noise.transpose(0, 1).flatten(0, 1))
        loss, _ = training_loss(config, beta_at(config, int(1e6 * spent), 1_000_000), inference, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(config.learning_rate * schedule(spent), self.step)
        self.step += 1

    def _batch(self) -> torch.Tensor:
        """The step's images, (B, C, H, W) uint8, in whole batches of an epoch's order."""
        size = self.config.batch_size
        epoch, position = divmod(self.step, len(self.data) // size)
        if position == 0:
            self.order = permutation(self.config.seed, epoch, len(self.data))
        return self.data[self.order[position * size : (position + 1) * size]]

    def result(self) -> Trained:
        """The trained model, ready to be scored."""
        self.optimizer.settle()
        seen = self.step * self.config.batch_size
        return Trained(self.model.eval(), self.used, self.step, seen, int(self.optimizer.guard.skipped))


def in_turn(trainings: Sequence[Training]) -> list[Trained]:
    """Train all to their ends, a second each in turn: what else the machine does is the same for all."""
    while not all(training.done for training in trainings):
        for training in trainings:
            training.go_on(SLICE)
    return [training.result() for training in trainings]


def train_for(
    cpu_seconds: float, model_config: ModelConfig, config: TrainConfig, images: np.ndarray
) -> Trained:
    """Train one model for CPU seconds of this process, not for epochs."""
    return in_turn([Training(cpu_seconds, model_config, config, images)])[0]


def schedule(spent: float) -> float:
    """The learning rate's factor after a share of the time.

    >>> [round(schedule(share), 2) for share in (0.0, 0.05, 0.1, 0.5, 1.0)]
    [0.0, 0.5, 0.98, 0.5, 0.0]
    """
    return min(1.0, spent / LR_WARMUP) * 0.5 * (1 + math.cos(math.pi * spent))


def keep(model: Model, folder: Path) -> None:
    """Write a model's bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in bundle.to_files(model).items():
        (folder / name).write_bytes(content)


def write_section(page: Path, section: str, command: str, text: str) -> None:
    """Put text between a page's markers of a section, which name the command that writes it."""
    begin, end = f"<!-- {section}: {command} -->", f"<!-- end of {section} -->"
    head, rest = page.read_text().split(begin)
    page.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "vae_flows": getattr(vae, "__version__", "0.1.0"),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
