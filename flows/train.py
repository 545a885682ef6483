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

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.snapshot import open_snapshot, resident
from data.store import Store
from flows.config import Ingest, Train, narrow
from flows.devices import gpu_slot, pick_device
from flows.ingest import snapshot_of
from flows.jobs import digest, job_store, lock, put_record, read_record
from flows.progress import Advance, progress
from flows.results import Ingested, Trained
from flows.tracking import Run, tracked
from flows.watch import Watch, put_history, read_history

if TYPE_CHECKING:
    from vae.config import ModelConfig
    from vae.model import Model
    from vae.train import FitResult, Progress

logger = logging.getLogger("vae_flows.train")
KL_IMAGES = 1000  # validation images that the KL of each dimension is measured on
KEEP_CHECKPOINTS = 2  # the newest may be damaged, so the one before it stays


@flow(name="train")
def train(config: Train) -> Trained:
    """The model of this configuration and snapshot: found if it was trained before, else trained now."""
    with tracked(config) as run:
        ingested = snapshot_of(narrow(Ingest, config))
        job = training_job(config, ingested)
        with lock(config.root, job):
            if (record := read_record(job_store(config.root, job), "trained.json")) is not None:
                logger.info("train: unchanged, job %s is trained", job)
                trained = Trained(**record)
            else:
                trained = fit_model(config, ingested, job, run)
        if run.wants(trained):
            run.log_json("history.json", read_history(job_store(config.root, job)))
            rate = trained.images_per_second
            run.log_metrics({"time/train_seconds": trained.seconds, "time/train_per_second": rate})
        return run.sign(trained)


def training_job(config: Train, ingested: Ingested) -> str:
    """The key of a training: the images, the model, the training. The device may differ."""
    model, training = model_of(config, ingested).to_dict(), config.training.to_dict()
    return f"train-{digest(ingested.fingerprint, model, training)}"


def model_of(config: Train, ingested: Ingested) -> ModelConfig:
    """The model's configuration at the snapshot's geometry."""
    channels, height, width = ingested.geometry
    return config.model_of(height, width, channels)


@task(cache_policy=NO_CACHE)
def fit_model(config: Train, ingested: Ingested, job: str, run: Run) -> Trained:
    """Fit, commit the bundle, then the record that says so."""
    from vae.train import fit

    run.begin()
    store = job_store(config.root, job)
    snapshot = open_snapshot(ingested.snapshot)
    images = {split: resident(snapshot, split).images for split in ("train", "validation")}
    logger.info("train: %d images, job %s", len(images["train"]), job)
    device = pick_device(config.device)
    with gpu_slot(device), stop_signal() as stop, progress("train") as advance:
        started = time.monotonic()
        result = fit(
            model_of(config, ingested),
            config.training,
            images["train"],
            validation=images["validation"],
            device=device,
            save=lambda step, blob: save_checkpoint(store, step, blob, run),
            restore=lambda: read_checkpoints(store),
            progress=lambda event: report_progress(event, run, advance),
            watch=Watch(store, run, held(images), config.training.epochs),
            stop=stop,
        )
    seconds = time.monotonic() - started
    put_history(store, result)
    return commit(store, job, ingested, result, kl_per_dim(result.model, held(images)[:KL_IMAGES]), seconds)


def held(images: dict[str, np.ndarray]) -> np.ndarray:
    """The validation images, or where there are none those of training."""
    return images["validation"] if len(images["validation"]) else images["train"]


def kl_per_dim(model: Model, images: np.ndarray) -> list[float] | None:
    """The mean KL of each latent dimension, in nats, which `encode --min-kl` chooses by; None without one."""
    from vae.evaluate import evaluate

    found = evaluate(model, images, range(len(images)), k=1).scores.get("kl_per_dim")
    return None if found is None else [round(value, 6) for value in found.value]  # type: ignore[union-attr]


def commit(
    store: Store,
    job: str,
    ingested: Ingested,
    result: FitResult,
    kl_per_dim: list[float] | None,
    seconds: float,
) -> Trained:
    """The bundle's files, its manifest last, then the job's record; the checkpoints have served."""
    from vae.bundle import to_files, weights_digest

    extra = {
        "decode": ingested.decode,
        "dataset": ingested.fingerprint,
        "source": ingested.source,
        "generative": result.model.generative,
        "kl_per_dim": kl_per_dim,
    }
    files = to_files(result.model, extra)
    bundle = store.child("bundle")
    for name in sorted(files, key=lambda name: name == "manifest.json"):
        bundle.put_if_absent(name, files[name])
    record = Trained(
        job=job,
        bundle=Path(bundle.url),
        snapshot=ingested.snapshot,
        fingerprint=ingested.fingerprint,
        weights=weights_digest(files),
        seconds=seconds,
        images_per_second=(result.images_seen - result.resumed_at * result.images_seen / result.steps)
        / seconds,
    )
    put_record(store, "trained.json", record.model_dump(mode="json", exclude={"run_id", "changed"}))
    for entry in list(store.entries("checkpoints")):
        store.delete(entry.path)
    return record.model_copy(update={"changed": True})


def save_checkpoint(store: Store, step: int, blob: bytes, run: Run) -> None:
    """Commit a checkpoint, then remove all but the newest ones."""
    run.flush()  # metrics of steps that will not be taken again must not be lost with this process
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


def report_progress(event: Progress, run: Run, advance: Advance) -> None:
    """One line of fit's history to MLflow and to the terminal."""
    names = ("elbo", "log_likelihood", "kl", "loss", "beta")[: 5 if event.split == "train" else 3]
    prefix = "train/epoch_" if event.split == "epoch" else f"{event.split}/"
    run.log_metrics({prefix + name: getattr(event, name) for name in names}, event.step)
    words = f"epoch {event.epoch}/{event.epochs} ELBO {event.elbo:.2f} KL {event.kl:.2f} nats"
    if event.split == "validation":
        logger.info("train: validation, %s", words)
    else:
        advance(event.step, event.steps, f"{words}, {event.images_per_second:,.0f} images/s")


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
