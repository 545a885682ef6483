"""What a training's own process and each of its ranks do alike: images, starting weights, checkpoints."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from data.blocks import Split
from data.heap import keep_freed_memory
from data.snapshot import Snapshot, open_snapshot
from data.store import Store
from flows.config import Train
from flows.jobs import digest, read_record
from flows.results import Ingested

if TYPE_CHECKING:
    from vae.config import ModelConfig
    from vae.model import Model
    from vae.progress import Progress
    from vae.train import FitResult

logger = logging.getLogger("vae_flows.train")
START = "start.json"  # the record of the model that a job starts from
KEEP_CHECKPOINTS = 2  # the newest may be damaged, so the one before it stays


def training_job(config: Train, ingested: Ingested) -> str:
    """The key of a training: the images, the model, the training. The device may differ.

    Where training starts from a model, that one counts as the user named it: so a training from the champion
    is found again, whoever is champion by then.
    """
    model, training = model_of(config, ingested).to_dict(), config.training.to_dict()
    start = [config.warm_start] if config.warm_start else []
    return f"train-{digest(ingested.fingerprint, model, training, *start)}"


def model_of(config: Train, ingested: Ingested) -> ModelConfig:
    """The model's configuration at the snapshot's geometry."""
    channels, height, width = ingested.geometry
    return config.model_of(height, width, channels)


def fit_split(
    config: Train,
    ingested: Ingested,
    store: Store,
    device: str,
    stop: Callable[[], bool],
    *,
    before_save: Callable[[], None] = lambda: None,
    progress: Callable[[Progress], None] = lambda event: None,
    watch: Callable[[int, int, Model], None] = lambda epoch, step, model: None,
) -> FitResult:
    """Fit on a snapshot's training split, with checkpoints in the job's store, newest first when resumed."""
    from vae.train import fit

    keep_freed_memory()
    snapshot = open_snapshot(ingested.snapshot)

    def save(step: int, blob: bytes) -> None:
        before_save()
        save_checkpoint(store, step, blob)

    return fit(
        model_of(config, ingested),
        config.training,
        training_images(snapshot),
        validation=Split(snapshot, "validation"),
        device=device,
        budget=config.resident_mib * 2**20,
        initial=None if (start := starting_model(store)) is None else start.state_dict(),
        save=save,
        restore=lambda: read_checkpoints(store),
        progress=progress,
        watch=watch,
        stop=stop,
    )


def starting_model(store: Store) -> Model | None:
    """The model that this job starts from, if any, which `flows.warm_start` has put beside it."""
    from vae.bundle import from_files

    record = read_record(store, START) or {}
    if not record.get("model"):
        return None
    folder = store.child(record["folder"])
    return from_files({name: folder.get(name) for name in record["files"]})


def training_images(snapshot: Snapshot) -> Split:
    """The training split; ValueError where it is empty."""
    split = Split(snapshot, "train")
    if not split.sizes:
        raise ValueError(f"no images in split 'train' of {snapshot.uri}: it has {snapshot.counts}")
    return split


def save_checkpoint(store: Store, step: int, blob: bytes) -> None:
    """Commit a checkpoint, then remove all but the newest ones."""
    store.put_if_absent(f"checkpoints/{step:010d}.safetensors", blob)
    logger.info("train: checkpoint at step %d", step)
    for entry in sorted(store.entries("checkpoints"))[:-KEEP_CHECKPOINTS]:
        store.delete(entry.path)


def read_checkpoints(store: Store) -> Iterator[bytes]:
    """The checkpoints, newest first; one that did not serve is removed."""
    for entry in sorted(store.entries("checkpoints"), reverse=True):
        logger.info("train: resuming from %s", entry.path)
        yield store.get(entry.path)
        # Asked for another: this one is damaged, and would stand in the way of a new one of its step.
        store.delete(entry.path)


def remove_checkpoints(store: Store) -> None:
    """The job is done: its checkpoints have served, and those that a kill left half-written are nobody's."""
    checkpoints = store.child("checkpoints")
    for entry in [*checkpoints.entries(), *checkpoints.leftovers()]:
        checkpoints.delete(entry.path)


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM as a question that `fit` asks between steps, so that it stops with a checkpoint.

    The signal is raised again afterwards, for whoever else has to know. One that is ignored (Ctrl-C, by a
    job in the background) stays ignored.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)  # and no more: a log's lock may be held by what the signal interrupts

    def stop() -> bool:
        if received:
            logger.info("train: %s, stopping with a checkpoint", signal.Signals(received[0]).name)
        return bool(received)

    if threading.current_thread() is not threading.main_thread():  # the only one that may handle signals
        yield lambda: False
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
