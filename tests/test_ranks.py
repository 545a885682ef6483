"""Two processes are one: the same history for the same effective batch, resumed to the bit."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from vae import ranks
from vae.config import AutoencoderConfig, FlatConfig, ModelConfig, TrainConfig, model_config
from vae.progress import Progress
from vae.ranks import Ranks
from vae.train import fit

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (49, 1, 9, 8), dtype=np.uint8)  # the last batch of an epoch has one image
HELD_OUT = RNG.integers(0, 256, (13, 1, 9, 8), dtype=np.uint8)
GEOMETRY = {"height": 9, "width": 8, "channels": 1}
FLAT = FlatConfig(**GEOMETRY, latent_dim=3, hidden=(4, 4))
SHORT = TrainConfig(epochs=2, batch_size=16, log_every=3, checkpoint_every=3)  # 8 steps

CASES: dict[str, tuple[ModelConfig, TrainConfig]] = {
    "flat": (FLAT, SHORT),
    "sampled": (dataclasses.replace(FLAT, likelihood="bernoulli", binarize="sampled"), SHORT),
    "iwae": (FLAT, dataclasses.replace(SHORT, objective="iwae", samples=3)),
    "parts": (FLAT, dataclasses.replace(SHORT, micro_batch=3, ema_decay=0.5, flip=True)),
    "autoencoder": (AutoencoderConfig(**GEOMETRY, latent_dim=3, hidden=(4, 4)), SHORT),
    "ladder": (model_config({"model": "ladder", **GEOMETRY}), SHORT),
}


def train(case: str, folder: str) -> None:
    """A rank of a run that keeps its checkpoints in the folder, and its result beside them."""
    model, config = CASES[case]

    def restore() -> Any:
        return (path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"), reverse=True))

    def save(step: int, blob: bytes) -> None:
        Path(folder, f"{step:03d}.safetensors").write_bytes(blob)

    result = fit(model, config, IMAGES, validation=HELD_OUT, save=save, restore=restore)
    lines = [dataclasses.asdict(line) for line in result.history]
    torch.save(
        {"model": result.model.state_dict(), "lines": lines}, Path(folder, f"rank-{ranks.here().rank}.pt")
    )


def rank(number: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with ranks.group(torch.device("cpu")):
        work(*arguments)


def in_two(work: Callable[..., None], *arguments: Any) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(rank, (port, work, *arguments), nprocs=2)


def every(folder: str) -> None:
    for case in CASES:
        place = Path(folder, case)
        place.mkdir(exist_ok=True)
        train(case, str(place))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    in_two(every, str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(case: str, two: Path) -> None:
    model, config = CASES[case]
    one = fit(model, config, IMAGES, validation=HELD_OUT)
    found = [torch.load(two / case / f"rank-{number}.pt") for number in (0, 1)]
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(found[0]["model"][name], found[1]["model"][name]), name
        torch.testing.assert_close(found[0]["model"][name], tensor, rtol=1e-3, atol=1e-4)
    assert len(found[0]["lines"]) == len(one.history)
    for line, expected in zip(found[0]["lines"], one.history, strict=True):
        ours = Progress(**line)
        assert (ours.split, ours.step, ours.images) == (expected.split, expected.step, expected.images)
        assert ours.elbo == pytest.approx(expected.elbo, rel=1e-4)


def test_two_processes_resume_to_the_bit(two: Path, tmp_path: Path) -> None:
    (tmp_path / "003.safetensors").write_bytes((two / "flat" / "003.safetensors").read_bytes())
    in_two(train, "flat", str(tmp_path))
    for name in ("006.safetensors", "008.safetensors"):
        resumed, whole = (torch.load(f / "rank-0.pt")["model"] for f in (tmp_path, two / "flat"))
        assert all(torch.equal(resumed[key], whole[key]) for key in whole), name


@pytest.mark.parametrize(("rows", "world"), [(0, 2), (1, 2), (2, 2), (7, 3), (128, 5)])
def test_shares_are_all_rows_once(rows: int, world: int) -> None:
    shares = [Ranks(number, world).share(rows) for number in range(world)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
