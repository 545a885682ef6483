"""What the benchmarks share: idx folders, training for a time, bundles kept aside, the machine."""

from __future__ import annotations

import math
import os
import platform
import time
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
from vae.random import StepDraws, permutation

LR_WARMUP = 0.02  # of the time; the learning rate then falls along a cosine to zero


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


def train_for(
    cpu_seconds: float, model_config: ModelConfig, config: TrainConfig, images: np.ndarray
) -> Trained:
    """Train for CPU seconds of this process, not for epochs: what a step costs is part of the comparison.

    The learning rate warms up and falls to zero over that time, the same for every model, and a schedule of
    beta in epochs is taken as its share of config.epochs. Everything else is `vae.train.fit`'s: Adam, the
    draws and the order as functions of the seed and the step.
    """
    data = pixels.tensor(images)
    model = build(model_config, config.seed)
    model.initialize(data[:1024])
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    started, step, spent = time.process_time(), 0, 0.0
    a_pass = len(data) // config.batch_size
    while spent < 1:
        if step % a_pass == 0:
            order = permutation(config.seed, step // a_pass, len(data))
        start = step % a_pass * config.batch_size
        optimizer.param_groups[0]["lr"] = config.learning_rate * schedule(spent)
        beta = beta_at(config, int(1e6 * spent), 1_000_000)
        train_step(model, optimizer, config, beta, data[order[start : start + config.batch_size]], step)
        step += 1
        spent = (time.process_time() - started) / cpu_seconds
    return Trained(model.eval(), time.process_time() - started, step, step * config.batch_size)


def train_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    beta: float,
    batch: torch.Tensor,
    step: int,
) -> None:
    """One step on uint8 images (B, C, H, W)."""
    draws = StepDraws(config.seed, step, len(batch))
    seen, target = model.observe(batch, draws)
    noise = draws.normal("posterior", config.samples, model.latent_dim).transpose(0, 1).flatten(0, 1)
    loss, _ = training_loss(config, beta, model.infer(seen, noise), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def schedule(spent: float) -> float:
    """The learning rate's factor after a share of the time.

    >>> [round(schedule(share), 2) for share in (0.0, 0.01, 0.02, 0.5, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return min(1.0, spent / LR_WARMUP) * 0.5 * (1 + math.cos(math.pi * spent))


def keep(model: Model, folder: Path) -> None:
    """Write a model's bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in bundle.to_files(model).items():
        (folder / name).write_bytes(content)


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
