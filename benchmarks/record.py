"""The record of benchmarks/record.md: a negative log-likelihood a row, for the training that the row allows.

    python benchmarks/record.py --row mnist-cpu --data DIR --seed 0

A call works for at most --minutes, then stops with its checkpoint; the same command goes on from there: first
the training, by `vae.train.fit` on all training images, then the score of every test image by importance
weighting, a block of images at a time. What it works with is under build/record; what it has found so far,
with the whole configuration and the history by epochs, is benchmarks/records/ROW-seedS.json, from which
benchmarks/record.md is written. --miniature runs all of it on a few images and records nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import BINARY, ROOT, SHAPE, read
from training import Images, keep, machine, read_idx, write_section

import vae
from data.heap import keep_freed_memory
from vae.config import LadderConfig, TrainConfig
from vae.evaluate import evaluate
from vae.train import Interrupted, Progress, fit

RECORDS = ROOT / "benchmarks/records"
BUILD = ROOT / "build/record"
PAGE = ROOT / "benchmarks/record.md"
EVALUATION_SEED = 0
BLOCK = 100  # test images scored at a time
SCORES = ("elbo", "iw_bound", "effective_samples")


@dataclass(frozen=True)
class Row:
    """What is trained, on what, and the NLL it is to reach."""

    data: str
    title: str
    target: float
    model: LadderConfig
    train: TrainConfig
    k: int = 1000


def ladder(**fields: Any) -> LadderConfig:
    """A ladder of dynamically binarised images of 28 x 28."""
    return LadderConfig(**SHAPE, **BINARY, overlap=True, **fields)


SMALL = ladder(strides=(4, 7), hidden=(64, 256), levels=(1, 2), latents=(4, 32), blocks=1)
DEEP = ladder(
    strides=(2, 2, 2, 4), hidden=(64, 128, 192, 256), levels=(0, 3, 3, 2), latents=(1, 8, 16, 32), blocks=2
)
ANNEALED: dict[str, Any] = {
    "learning_rate_schedule": "cosine",
    "beta_schedule": "warmup",
    "ema_decay": 0.999,
    "gradient_skip": 5.0,
    "gradient_clip": 2.0,
}
ON_CPU = TrainConfig(
    **ANNEALED,
    epochs=50,
    batch_size=128,
    learning_rate=2e-3,
    learning_rate_warmup_epochs=1.0,
    warmup_epochs=5.0,
)
ON_GPU = TrainConfig(
    **ANNEALED,
    epochs=400,
    batch_size=256,
    learning_rate=2e-3,
    learning_rate_warmup_epochs=2.0,
    warmup_epochs=40.0,
)
ROWS = {
    "mnist-cpu": Row("mnist", "MNIST, 3 million images, one CPU thread", 84.0, SMALL, ON_CPU),
    "mnist-30min": Row("mnist", "MNIST, 30 minutes of an H200", 78.5, DEEP, ON_GPU),
    "mnist-2h": Row("mnist", "MNIST, 2 hours of an H200", 78.0, DEEP, replace(ON_GPU, epochs=1600)),
    "fashion": Row(
        "fashion_mnist", "Fashion-MNIST, 2 hours of an H200", 223.0, DEEP, replace(ON_GPU, epochs=1600)
    ),
}


class Attempt:
    """A row under a training seed: its files, and what of it can be done before the deadline."""

    def __init__(self, name: str, row: Row, splits: dict[str, Images], device: str, deadline: float):
        self.name, self.row, self.splits, self.device, self.deadline = name, row, splits, device, deadline
        self.folder = BUILD / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def train(self) -> bool:
        """Go on training; whether it has ended."""
        if (self.folder / "config.json").exists():
            return True
        with self.timed("train"):
            try:
                found = fit(
                    self.row.model,
                    self.row.train,
                    self.splits["train"].pixels,
                    device=self.device,
                    save=self.save,
                    restore=self.restore,
                    progress=self.note,
                    stop=self.late,
                )
            except Interrupted:
                return False
        keep(found.model.cpu(), self.folder)
        return True

    def save(self, step: int, blob: bytes) -> None:
        """Put a checkpoint whole in the place of the one before."""
        write_whole(self.folder / "checkpoint", blob)

    def restore(self) -> Iterator[bytes]:
        if (self.folder / "checkpoint").exists():
            yield (self.folder / "checkpoint").read_bytes()

    def note(self, line: Progress) -> None:
        """Keep the line of an epoch, and how far training is."""
        if line.split == "epoch":
            print(f"epoch {line.epoch} of {line.epochs}: ELBO {line.elbo:.2f}, KL {line.kl:.2f}", flush=True)
            lines = read(self.folder / "history.json") | {str(line.epoch): dataclasses.asdict(line)}
            write_whole(self.folder / "history.json", json.dumps(lines).encode())

    def score(self) -> bool:
        """Go on scoring, block by block; whether every test image is scored."""
        model, test = vae.load(self.folder).to(self.device), self.splits["test"]
        with self.timed("score"):
            for start in range(0, len(test.ids), BLOCK):
                file = self.folder / f"scores-k{self.row.k}-{start}.json"
                if file.exists():
                    continue
                if self.late():
                    return False
                rows = slice(start, start + BLOCK)
                found = evaluate(
                    model,
                    test.pixels[rows],
                    test.ids[rows],
                    seed=EVALUATION_SEED,
                    k=self.row.k,
                    batch_size=BLOCK,
                )
                columns = {name: found.per_image[name].tolist() for name in SCORES}
                write_whole(file, json.dumps(columns).encode())
        return True

    def timed(self, what: str) -> Timer:
        return Timer(self.folder / f"time-{what}.json")

    def record(self) -> dict[str, Any]:
        """All that is known of it so far."""
        history = list(read(self.folder / "history.json").values())
        blocks = [read(file) for file in self.folder.glob(f"scores-k{self.row.k}-*.json")]
        columns = {name: np.array([v for block in blocks for v in block[name]]) for name in SCORES}
        bundle = ("config.json", "model.safetensors", "manifest.json")
        return {
            "row": self.name,
            "model": self.row.model.to_dict(),
            "train": self.row.train.to_dict(),
            "parameters": sum(p.numel() for p in vae.build(self.row.model).parameters()),
            "images_seen": history[-1]["images"] if history else 0,
            "training": read(self.folder / "time-train.json"),
            "scoring": read(self.folder / "time-score.json"),
            "scored_images": len(columns["elbo"]),
            "test_images": len(self.splits["test"].ids),
            "scores": {name: mean(column) for name, column in columns.items() if len(column)},
            "protocol": {"split": "test", "k": self.row.k, "seed": EVALUATION_SEED, "binarize": "sampled"},
            "bundle_sha256": {
                name: sha256(self.folder / name) for name in bundle if (self.folder / name).exists()
            },
            "commit": commit(),
            "machine": machine() | {"device": device_name(self.device)},
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "history": history,
        }


class Timer:
    """Adds the seconds of a block, by the clock and of CPU, to a file: the calls of a row add up."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> None:
        self.began = time.monotonic(), time.process_time()

    def __exit__(self, *_: object) -> None:
        before = read(self.file) or {"wall_seconds": 0.0, "cpu_seconds": 0.0}
        now = (time.monotonic(), time.process_time())
        spent = [round(end - start, 1) for end, start in zip(now, self.began, strict=True)]
        total = {name: before[name] + more for name, more in zip(before, spent, strict=True)}
        write_whole(self.file, json.dumps(total).encode())


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file at once."""
    part = file.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, file)


def mean(column: np.ndarray) -> list[float]:
    """[mean, its standard error]."""
    return [float(column.mean()), float(column.std(ddof=1) / np.sqrt(len(column)))]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def commit() -> str:
    """The checked-out commit, with a + where files differ from it."""
    git: Callable[..., str] = lambda *words: subprocess.run(  # noqa: E731
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "vae") else "")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def table() -> str:
    """The records in Markdown, a row a seed."""
    lines = [
        "| row | seed | parameters | images seen | minutes | −ELBO | NLL | target | commit | machine |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    return "\n".join([*lines, *(line(read(file)) for file in sorted(RECORDS.glob("*.json")))])


def line(record: dict[str, Any]) -> str:
    name, where = record["row"].rsplit("-seed", 1)[0], record["machine"]
    whole = record["scored_images"] == record["test_images"]
    elbo, nll = (_nats(record["scores"][s]) if whole else "to come" for s in ("elbo", "iw_bound"))
    minutes = record["training"].get("cpu_seconds" if where["device"] == "cpu" else "wall_seconds", 0) / 60
    asked = record["train"]["epochs"] * 60_000
    seen = f"{record['images_seen']:,}" + ("" if record["images_seen"] == asked else f" of {asked:,}")
    place = where["cpu"] if where["device"] == "cpu" else where["device"]
    return (
        f"| {name} | {record['train']['seed']} | {record['parameters']:,} | {seen} | {minutes:.1f} | {elbo} "
        f"| {nll} | {ROWS[name].target} | {record['commit']} | {place}, {record['written'][:10]} |"
    )


def _nats(score: list[float]) -> str:
    return f"{-score[0]:.2f} ± {score[1]:.2f}"


def miniature(row: Row, splits: dict[str, Images]) -> tuple[Row, dict[str, Images]]:
    """The row with 256 training images, two epochs, 20 test images and K = 10."""
    cut = {
        name: Images(splits[name].pixels[:count], splits[name].ids[:count], splits[name].labels[:count])
        for name, count in (("train", 256), ("test", 20))
    }
    short = replace(row.train, epochs=2, batch_size=64, warmup_epochs=1.0, learning_rate_warmup_epochs=0.5)
    return replace(row, train=short, k=10), cut


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--data", required=True, metavar="DIR", help="the idx folder of the row's set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=9.0, help="the most that this call takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--miniature", action="store_true", help="run all of it on a few images")
    chosen = parser.parse_args()
    deadline = time.monotonic() + 60 * chosen.minutes
    torch.set_num_threads(1)
    keep_freed_memory()  # as the commands do: scoring is 1.6 times as fast
    row, splits = ROWS[chosen.row], read_idx(chosen.data)
    row = replace(row, train=replace(row.train, seed=chosen.seed))
    if chosen.miniature:
        row, splits = miniature(row, splits)
    name = f"{chosen.row}-seed{chosen.seed}"
    folder = f"miniature-{name}" if chosen.miniature else name
    attempt = Attempt(folder, row, splits, chosen.device, deadline)
    done = attempt.train() and attempt.score()
    record = attempt.record() | {"row": name}
    print({key: record[key] for key in ("images_seen", "training", "scored_images", "scores")}, flush=True)
    if not chosen.miniature:
        RECORDS.mkdir(exist_ok=True)
        (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        write_section(PAGE, "records", "make record", table())
    print("done" if done else "stopped at its time: the same command goes on")


if __name__ == "__main__":
    main()
