"""Retrain: images in; a registered champion, its latent table and samples out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from data.snapshot import Snapshot
from flows import registry
from flows.config import Encode, Evaluate, Ingest, Retrain, Sample, Train, narrow
from flows.encode import Table, encode
from flows.evaluate import Scores, evaluate
from flows.gate import Verdict, gate
from flows.ingest import ingest
from flows.sample import sample
from flows.tracking import Run, tracked
from flows.train import Trained, train

logger = logging.getLogger("vae_flows.retrain")


class Retrained(BaseModel):
    """Everything a retrain leaves behind."""

    run_id: str | None
    model_name: str
    version: str
    model_uri: str
    champion_uri: str
    verdict: Verdict
    snapshot: str
    fingerprint: str
    images: int
    rejected: int
    scores: dict[str, Any]
    latents: Table | None
    samples: Table | None
    changed: bool


@flow(name="retrain")
def retrain(config: Retrain) -> Retrained:
    """Ingest, train, evaluate, register, gate; then encode and sample with the champion."""
    with tracked(config) as run:
        snapshot = ingest(narrow(Ingest, config))
        source = f"snapshot:{snapshot.uri}"
        trained = train(narrow(Train, config, source=source))
        scores = evaluate(narrow(Evaluate, config, model=str(trained.bundle), source=source))
        version = register(config, run, trained, scores)
        holder = score_champion(config, source, version)
        verdict = gate(config.root, config.model_name, version, scores, holder)
        champion = registry.champion_uri(config.model_name)
        latents = encode(narrow(Encode, config, model=champion, source=source, scores=True)) if champion else None
        samples = sample(narrow(Sample, config, model=champion)) if champion else None
        return report(config, run, snapshot, version, verdict, scores, latents, samples)


@task(cache_policy=NO_CACHE)
def register(config: Retrain, run: Run, trained: Trained, scores: Scores) -> str:
    """The registry's version of this training, with where it came from as tags."""
    logger.info("register: %s as %s", trained.job, config.model_name)
    tags = {"dataset_digest": trained.fingerprint, "weights_sha256": trained.weights, "evaluation": scores.job}
    found = registry.register(run, config.root, config.model_name, trained.job, trained.bundle, tags)
    return str(found.version)


def score_champion(config: Retrain, source: str, version: str) -> Scores | None:
    """The reigning champion's scores on the challenger's images; None where there is no other."""
    champion = registry.champion_uri(config.model_name)
    if champion is None or champion.endswith(f"/{version}"):
        return None
    return evaluate(narrow(Evaluate, config, model=champion, source=source))


def report(
    config: Retrain,
    run: Run,
    snapshot: Snapshot,
    version: str,
    verdict: Verdict,
    scores: Scores,
    latents: Table | None,
    samples: Table | None,
) -> Retrained:
    """The result, and in the run's artifacts the gate's record."""
    parts = (snapshot, scores, verdict, latents, samples)
    changed = any(part.changed for part in parts if part is not None)
    if verdict.changed:
        run.log_json("gate.json", verdict.model_dump())
    return Retrained(
        run_id=run.id if run.started else None,
        model_name=config.model_name,
        version=version,
        model_uri=f"models:/{config.model_name}/{version}",
        champion_uri=registry.champion_uri(config.model_name) or "",
        verdict=verdict,
        snapshot=snapshot.uri,
        fingerprint=snapshot.fingerprint,
        images=snapshot.rows,
        rejected=snapshot.rejected,
        scores=scores.scores,
        latents=latents,
        samples=samples,
        changed=changed,
    )
