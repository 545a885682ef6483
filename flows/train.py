"""Train: a snapshot's training split to a model bundle, checkpointed on the way."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from data.batches import resident
from data.snapshot import Snapshot, open_snapshot
from data.store import Store
from flows.config import Ingest, Train, narrow
from flows.devices import pick_device
from flows.ingest import ingest
from flows.jobs import digest, job_store, lock, put_record, read_record
from flows.progress import Advance, progress
from flows.tracking import Run, tracked

if TYPE_CHECKING:
    import vae.train

logger = logging.getLogger("vae_flows.train")
KEEP_CHECKPOINTS = 2  # the newest may be damaged, so the one before it stays


class Trained(BaseModel):
    """A finished training: its job, the folder of the bundle, and how it went."""

    job: str
    bundle: Path
    snapshot: str
    fingerprint: str
    weights: str
    seconds: float
    images_per_second: float
    changed: bool = False


@flow(name="train")
def train(config: Train) -> Trained:
    """The model of this configuration and snapshot: found if it was trained before, else trained now."""
    with tracked(config) as run:
        snapshot = ingest(narrow(Ingest, config))
        job = training_job(config, snapshot)
        with lock(config.root, f"train-{job}"):
            if (record := read_record(job_store(config.root, job), "trained.json")) is not None:
                logger.info("train: unchanged, job %s is trained", job)
                return Trained(**record)
            return fit_model(config, snapshot.uri, job, run)


def training_job(config: Train, snapshot: Snapshot) -> str:
    """The key of a training: the images, the model, the training. The device may differ."""
    model = config.model_of(*geometry(snapshot)).to_dict()
    return f"train-{digest(snapshot.fingerprint, model, config.training.to_dict())}"


def geometry(snapshot: Snapshot) -> tuple[int, int, int]:
    """(height, width, channels) of a snapshot's images."""
    channels, height, width = snapshot.decode.geometry
    return height, width, channels


@task(cache_policy=NO_CACHE)
def fit_model(config: Train, snapshot_uri: str, job: str, run: Run) -> Trained:
    """Fit, commit the bundle, then the record that says so."""
    from vae.train import fit

    snapshot = open_snapshot(snapshot_uri)
    store = job_store(config.root, job)
    images = {split: resident(snapshot, split).images for split in ("train", "validation")}
    started = time.monotonic()
    with stop_signal() as stop, progress("train") as advance:
        result = fit(
            config.model_of(*geometry(snapshot)),
            config.training,
            images["train"],
            validation=images["validation"],
            device=pick_device(config.device),
            save=lambda step, blob: save_checkpoint(store, step, blob),
            restore=lambda: read_checkpoints(store),
            progress=lambda event: report_progress(event, run, advance),
            stop=stop,
        )
    seconds = time.monotonic() - started
    return commit(store, job, snapshot, result, seconds)


def commit(store: Store, job: str, snapshot: Snapshot, result: vae.train.FitResult, seconds: float) -> Trained:
    """The bundle's files, its manifest last, then the job's record; the checkpoints have served."""
    from vae.bundle import to_files, weights_digest

    extra = {"decode": snapshot.decode.to_dict(), "dataset": snapshot.fingerprint, "source": snapshot.source}
    files = to_files(result.model, extra)
    bundle = store.child("bundle")
    for name in sorted(files, key=lambda name: name == "manifest.json"):
        bundle.put_if_absent(name, files[name])
    assert bundle.local is not None
    record = Trained(
        job=job,
        bundle=bundle.local,
        snapshot=snapshot.uri,
        fingerprint=snapshot.fingerprint,
        weights=weights_digest(files),
        seconds=seconds,
        images_per_second=result.images_seen / seconds,
    )
    put_record(store, "trained.json", record.model_dump(mode="json"))
    for entry in list(store.list("checkpoints")):
        store.delete(entry.path)
    return record.model_copy(update={"changed": True})


def save_checkpoint(store: Store, step: int, blob: bytes) -> None:
    """Commit a checkpoint, then remove all but the newest ones."""
    store.put_if_absent(f"checkpoints/{step:010d}.safetensors", blob)
    logger.info("train: checkpoint at step %d", step)
    for entry in sorted(store.list("checkpoints"))[:-KEEP_CHECKPOINTS]:
        store.delete(entry.path)


def read_checkpoints(store: Store) -> Iterator[bytes]:
    """The checkpoints, newest first."""
    for entry in sorted(store.list("checkpoints"), reverse=True):
        yield store.get(entry.path)


def report_progress(event: vae.train.Progress, run: Run, advance: Advance) -> None:
    """One line of fit's history to MLflow and to the terminal."""
    names = ("elbo", "log_likelihood", "kl", "loss", "beta") if event.split == "train" else ("elbo", "log_likelihood", "kl")
    split = "train/epoch_" if event.split == "epoch" else f"{event.split}/"
    run.log_metrics({split + name: getattr(event, name) for name in names}, event.step)
    words = f"ELBO {event.elbo:.2f} KL {event.kl:.2f} nats, {event.images_per_second:,.0f} images/s"
    if event.split == "validation":
        logger.info("train: epoch %d/%d, validation %s", event.epoch, event.epochs, words.rsplit(",", 1)[0])
    else:
        advance(event.step, event.steps, f"epoch {event.epoch}/{event.epochs} {words}")


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM as a question that `fit` asks between steps, so that it stops with a checkpoint."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        logger.info("train: %s, stopping with a checkpoint", signal.Signals(number).name)
        stopped.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
