"""One process of a training on several, begun by torch's launcher: torchrun ... -m flows.rank train.toml

The file is what `vae-flows train ... --dry-run` prints, with a snapshot as its source. The first rank saves
checkpoints and prints what is to be logged, a JSON object a line: `flows.launch.tell` reads it. When all have
finished, `vae-flows train` with the same settings finds the last checkpoint and commits the model.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.snapshot import open_snapshot
from flows.commands import log_to_stderr
from flows.config import Train
from flows.devices import pick_device
from flows.fitting import fit_split, stop_signal, training_job
from flows.jobs import job_store
from flows.results import Ingested
from flows.watch import Watch, held_out

if TYPE_CHECKING:
    from vae.progress import Progress


def main(file: str) -> None:
    """Take part in the training that the file describes, until it has finished."""
    import torch

    from vae import ranks

    config = Train(**tomllib.loads(Path(file).read_text()))
    if not config.source.startswith("snapshot:"):
        raise ValueError(f"source {config.source!r} is no snapshot, as every rank's must be: ingest it first")
    ingested = Ingested.of(open_snapshot(config.source.removeprefix("snapshot:")))
    store = job_store(config.root, training_job(config, ingested))
    device = torch.device(pick_device(config.device))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with stop_signal() as stop, ranks.group(device) as group:
        if group.first:
            log_to_stderr()
        epochs = config.training.for_images(ingested.counts["train"]).epochs
        watch = Watch(store, Told(), held_out(ingested), epochs)
        fit_split(config, ingested, store, str(device), stop, progress=told, watch=watch)


class Told:
    """What is logged here goes to whoever began this, who has the run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        _print(metrics=metrics, step=step)

    def log_image(self, name: str, png: bytes, step: int) -> None:
        _print(picture=name, png=base64.b64encode(png).decode(), step=step)


def told(event: Progress) -> None:
    """A line of the history."""
    _print(progress=asdict(event))


def _print(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
