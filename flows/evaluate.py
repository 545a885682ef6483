"""Evaluate: a model's scores on a split, exact over every image, each with its standard error."""

from __future__ import annotations

import io
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.images import DecodePath
from data.snapshot import open_snapshot, resident
from flows.config import Evaluate, Ingest, narrow
from flows.devices import pick_device
from flows.ingest import snapshot_of
from flows.jobs import digest, job_store, put_record, read_record
from flows.progress import progress
from flows.registry import Located, locate
from flows.results import Ingested, Scores, number
from flows.tracking import Run, tracked

if TYPE_CHECKING:
    from vae.evaluate import Evaluation

logger = logging.getLogger("vae_flows.evaluate")


@flow(name="evaluate")
def evaluate(config: Evaluate) -> Scores:
    """Score a model on a split of a source, decoded as the model's own images were."""
    with tracked(config) as run:
        model = locate(config.model)
        facts = model.facts()
        decode = DecodePath.from_dict(facts["extra"]["decode"])
        ingested = snapshot_of(narrow(Ingest, config, decode=decode))
        job = f"evaluate-{digest(facts['weights'], ingested.fingerprint, protocol(config))}"
        if (record := read_record(job_store(config.root, job), "scores.json")) is not None:
            logger.info("evaluate: unchanged, %s is scored", model.uri)
            scores = Scores(**record)
        else:
            scores = score(config, model, ingested, job, run)
        if run.wants(scores):
            _log(run, scores)
        return run.sign(scores)


def _log(run: Run, scores: Scores) -> None:
    split = scores.protocol["split"]
    for name, one in scores.scalars().items():
        logger.info("evaluate: %s %s", name, number(one))
        run.log_metrics({f"{split}/{name}": one["value"]})
        if one["stderr"] is not None:
            run.log_metrics({f"{split}/{name}_stderr": one["stderr"]})
    run.log_json(f"evaluation-{split}.json", scores.model_dump(mode="json"))


@task(cache_policy=NO_CACHE)
def score(config: Evaluate, model: Located, ingested: Ingested, job: str, run: Run) -> Scores:
    """Score every image, and put that on record."""
    import vae
    from vae.evaluate import evaluate as evaluate_model

    split = resident(open_snapshot(ingested.snapshot), config.split)
    if not len(split.images):
        raise ValueError(
            f"{ingested.snapshot} has no image in split {config.split!r}: choose another --split"
        )
    logger.info("evaluate: %d %s images", len(split.images), config.split)
    with progress("evaluate", run) as advance:
        found = evaluate_model(
            vae.load(model.folder),
            split.images,
            split.ids,
            seed=config.seed,
            k=config.importance_samples,
            device=pick_device(config.device),
            progress=lambda done, total: advance(done, total, "images"),
        )
    return commit(config, model.uri, ingested, job, split.ids, found)


def commit(
    config: Evaluate, model: str, ingested: Ingested, job: str, ids: list[str], found: Evaluation
) -> Scores:
    """Put an evaluation on record: the terms of each image, then the scores."""
    record = Scores(
        job=job,
        model=model,
        snapshot=ingested.snapshot,
        scores={name: asdict(value) for name, value in found.scores.items()},
        protocol={
            **found.protocol,
            **protocol(config),
            "dataset": ingested.fingerprint,
            "decode": ingested.decode,
        },
    )
    store = job_store(config.root, job)
    store.put_if_absent("per_image.npz", npz(ids, found.per_image))
    put_record(store, "scores.json", record.model_dump(mode="json", exclude={"run_id", "changed"}))
    return record.model_copy(update={"changed": True})


def protocol(config: Evaluate) -> dict[str, Any]:
    """What the scores depend on beside the model and the images."""
    return {"split": config.split, "k": config.importance_samples, "seed": config.seed}


def npz(ids: list[str], columns: dict[str, Any]) -> bytes:
    """The terms of each image, (N,) each, and its id."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, id=np.array(ids), **columns)
    return buffer.getvalue()
