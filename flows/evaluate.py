"""Evaluate: a model's scores on a split, exact over every image, each with its standard error."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from data.batches import resident
from data.images import DecodePath
from data.snapshot import Snapshot
from data.store import Store
from flows.config import Evaluate, Ingest, narrow
from flows.devices import pick_device
from flows.ingest import ingest
from flows.jobs import digest, job_store, put_record, read_record
from flows.registry import Located, locate
from flows.tracking import tracked

logger = logging.getLogger("vae_flows.evaluate")


class Scores(BaseModel):
    """What an evaluation found: each score with its standard error, and how it was made."""

    job: str
    model: str
    snapshot: str
    scores: dict[str, Any]
    protocol: dict[str, Any]
    changed: bool = False


@flow(name="evaluate")
def evaluate(config: Evaluate) -> Scores:
    """Score a model on a split of a source, decoded as the model's own images were."""
    with tracked(config) as run:
        model = locate(config.model)
        decode = DecodePath.from_dict(read_config(model)["extra"]["decode"])
        snapshot = ingest(narrow(Ingest, config, decode=decode))
        store = job_store(config.root, evaluation_job(config, model, snapshot))
        if (record := read_record(store, "scores.json")) is not None:
            logger.info("evaluate: unchanged, %s is scored", model.uri)
            return Scores(**record)
        scores = score(config, model, snapshot, store)
        means = {f"{config.split}/{name}": s["value"] for name, s in scalars(scores.scores).items()}
        errors = {f"{config.split}/{name}_stderr": s["stderr"] for name, s in scalars(scores.scores).items()}
        run.log_metrics({**means, **errors})
        run.log_json(f"evaluation-{config.split}.json", scores.model_dump(mode="json"))
        return scores


@task(cache_policy=NO_CACHE)
def score(config: Evaluate, model: Located, snapshot: Snapshot, store: Store) -> Scores:
    """Score every image; commit the per-image terms, then the record."""
    import vae
    from vae.evaluate import evaluate as evaluate_model

    split = resident(snapshot, config.split)
    if not len(split.images):
        raise ValueError(f"snapshot {snapshot.uri} has no image in split {config.split!r}: choose another --split")
    logger.info("evaluate: %d %s images", len(split.images), config.split)
    network = vae.load(model.folder)
    found = evaluate_model(
        network,
        split.images,
        split.ids,
        seed=config.seed,
        k=config.importance_samples,
        device=pick_device(config.device),
    )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, id=np.array(split.ids), **found.per_image)
    store.put_if_absent("per_image.npz", buffer.getvalue())
    record = Scores(
        job=store.url.rsplit("/", 1)[-1],
        model=model.uri,
        snapshot=snapshot.uri,
        scores={name: dataclasses.asdict(value) for name, value in found.scores.items()},
        protocol={**found.protocol, "split": config.split, "dataset": snapshot.fingerprint},
    )
    put_record(store, "scores.json", record.model_dump(mode="json"))
    for name, one in scalars(record.scores).items():
        logger.info("evaluate: %s %.4f +- %.4f", name, one["value"], one["stderr"])
    return record.model_copy(update={"changed": True})


def evaluation_job(config: Evaluate, weights: str, snapshot: Snapshot) -> str:
    """The key of an evaluation: the weights, the images, the protocol."""
    protocol = [config.split, config.importance_samples, config.seed]
    return f"evaluate-{digest(weights, snapshot.fingerprint, protocol)}"


def scalars(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores that are one number."""
    return {name: one for name, one in scores.items() if isinstance(one["value"], float | int)}
