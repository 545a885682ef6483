"""Train: a snapshot's training split to a model bundle, checkpointed on the way."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.store import Store
from flows.config import Ingest, Train, narrow
from flows.devices import gpu_slot, pick_device
from flows.fitting import fit_split, remove_checkpoints, stop_signal, training_job
from flows.ingest import snapshot_of
from flows.jobs import job_store, lock, put_record, read_record
from flows.launch import train_on_ranks
from flows.progress import Advance, progress
from flows.results import Ingested, Trained
from flows.tracking import Run, tracked
from flows.warm_start import pin_start, saved_by, validation_curve
from flows.watch import Watch, held_out, put_history, read_history

if TYPE_CHECKING:
    from vae.model import Model
    from vae.progress import Progress
    from vae.train import FitResult

logger = logging.getLogger("vae_flows.train")


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


@task(cache_policy=NO_CACHE)
def fit_model(config: Train, ingested: Ingested, job: str, run: Run) -> Trained:
    """Fit, commit the bundle, then the record that says so."""
    run.begin()
    store = job_store(config.root, job)
    held = held_out(ingested)
    logger.info("train: %d images, job %s", ingested.counts["train"], job)
    pin_start(config, ingested, store)
    device = pick_device(config.device)
    started, begun = time.monotonic(), newest_checkpoint(store)
    with gpu_slot(device), stop_signal() as stop, progress("train") as advance:
        if config.devices > 1:
            train_on_ranks(config, ingested, stop, run, lambda event: report_progress(event, run, advance))
        result = fit_split(
            config,
            ingested,
            store,
            device,
            stop,
            before_save=run.flush,  # metrics of steps that will not be taken again must not be lost with us
            progress=lambda event: report_progress(event, run, advance),
            watch=Watch(store, run, held, config.training.for_images(ingested.counts["train"]).epochs),
        )
    put_history(store, result)
    took = Took(seconds=time.monotonic() - started, share=1 - begun / result.steps)
    return commit(store, job, ingested, result, kl_per_dim(result.model, held), took)


class Took(NamedTuple):
    """How long this command trained, and which share of all steps it took itself."""

    seconds: float
    share: float


def newest_checkpoint(store: Store) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(Path(entry.path).stem) for entry in store.entries("checkpoints")), default=0)


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
    took: Took,
) -> Trained:
    """The bundle's files, its manifest last, then the job's record; the checkpoints have served."""
    from vae.bundle import to_files, weights_digest

    extra = {
        "decode": ingested.decode,
        "dataset": ingested.fingerprint,
        "source": ingested.source,
        "generative": result.model.generative,
        "kl_per_dim": kl_per_dim,
        "validation": validation_curve(result),
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
        seconds=took.seconds,
        images_per_second=result.images_seen * took.share / took.seconds,
        warm_start=saved_by(store, result),
    )
    put_record(store, "trained.json", record.model_dump(mode="json", exclude={"run_id", "changed"}))
    remove_checkpoints(store)
    return record.model_copy(update={"changed": True})


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
