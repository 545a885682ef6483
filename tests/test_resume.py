"""Killed at each of 50 steps, by SIGKILL and by SIGTERM, and begun again: to the bit the same run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from data.store import TEMPORARY, open_store
from flows.fitting import read_checkpoints, remove_checkpoints, save_checkpoint, stop_signal
from vae import checkpoint
from vae.config import FlatConfig, TrainConfig
from vae.train import FitResult, fit

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 1, 9, 8), dtype=np.uint8)
HELD_OUT = RNG.integers(0, 256, (13, 1, 9, 8), dtype=np.uint8)
MODEL = FlatConfig(height=9, width=8, channels=1, latent_dim=3, hidden=(4, 4))
# 10 steps an epoch; everything that has a state is on
TRAIN = TrainConfig(
    epochs=5, batch_size=5, log_every=3, checkpoint_every=7, ema_decay=0.9, patience=50, flip=True
)
STEPS = 50


def train(folder: str, kill_at: int | None = None, number: int = signal.SIGKILL) -> FitResult:
    """Train with checkpoints in the folder, as `vae-flows train` does; sends itself a signal."""
    store = open_store(folder)
    asked = iter(range(STEPS + 1))

    with stop_signal() as stopping:

        def stop() -> bool:
            if next(asked) == kill_at:
                os.kill(os.getpid(), number)
            return stopping()

        return fit(
            MODEL,
            TRAIN,
            IMAGES,
            validation=HELD_OUT,
            save=lambda step, blob: save_checkpoint(store, step, blob),
            restore=lambda: read_checkpoints(store),
            stop=stop,
        )


def killed(folder: Path, kill_at: int, number: int) -> int | None:
    """The exit code of a process of its own that trained until the signal came."""
    context = multiprocessing.get_context("forkserver")  # a process with these modules and without threads
    context.set_forkserver_preload(["data.store", "flows.fitting", "vae.checkpoint", "vae.train", "pytest"])
    process = context.Process(target=train, args=(str(folder), kill_at, number))
    process.start()
    process.join()
    return process.exitcode


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    last = folder / f"checkpoints/{STEPS:010d}.safetensors"
    return checkpoint.unpack(last.read_bytes())[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    return train(str(folder)), state(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step % 7 == 3 else pytest.mark.slow) for step in range(STEPS)]
)
def test_killed_and_begun_again_it_is_the_same_run(
    step: int, number: int, whole: tuple[FitResult, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    result, tensors = whole
    assert killed(tmp_path, step, number) == -number
    found = sorted(int(path.stem) for path in tmp_path.glob("checkpoints/*.safetensors"))
    # asked to stop, it saves where it stands; killed, it has what was committed beside it, or is about to be
    assert found[-1:] == [step] if number == signal.SIGTERM else all(at <= step for at in found)
    again = train(str(tmp_path))
    assert again.resumed_at == (found[-1] if found else 0)
    assert again.history == result.history
    after = state(tmp_path)
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(after[name], tensor), name


def test_what_a_kill_left_half_written_goes_with_the_checkpoints(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save_checkpoint(store, 1, b"whole")
    (tmp_path / f"checkpoints/.0000000002.safetensors.0123456789ab{TEMPORARY}").write_bytes(b"half")
    remove_checkpoints(store)
    assert list(tmp_path.glob("checkpoints/*")) == []
