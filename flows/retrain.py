"""Retrain: images in; a registered champion, its latent table and samples out."""

from __future__ import annotations

import logging

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import registry
from flows.config import Encode, Evaluate, Follow, Ingest, Report, Retrain, Sample, Train, narrow
from flows.encode import encode
from flows.evaluate import evaluate
from flows.follow import follow
from flows.followers import subscribe
from flows.gate import gate
from flows.ingest import ingest
from flows.report import report
from flows.results import Retrained, Scores, Table, Trained, Verdict
from flows.sample import sample
from flows.tracking import Run, tracked
from flows.train import train

logger = logging.getLogger("vae_flows.retrain")


@flow(name="retrain")
def retrain(config: Retrain) -> Retrained:
    """Ingest, train, evaluate, register, gate; then encode and sample with the champion."""
    with tracked(config) as run:
        ingested = ingest(narrow(Ingest, config))
        source = f"snapshot:{ingested.snapshot}"
        trained = train(narrow(Train, config, source=source, limit=None))
        scores = evaluate(scoring(config, str(trained.bundle), source))
        version = register(config, run, trained, scores)
        verdict = contest(config, source, version, scores)
        champion = registry.champion_uri(config.model_name)
        latents = encode_with_champion(config, champion, source)
        followed = follow(narrow(Follow, config, name=config.model_name)).tables
        samples = sample_champion(config, champion)
        model_uri = f"models:/{config.model_name}/{version}"
        drawn = report(narrow(Report, config, model=model_uri, source=source, out=None))
        if run.wants(verdict):
            run.log_json("gate.json", verdict.model_dump())
        result = Retrained(
            model_name=config.model_name,
            version=version,
            model_uri=model_uri,
            champion_uri=champion or "",
            verdict=verdict,
            ingested=ingested,
            trained=trained,
            scores=scores,
            latents=latents,
            followed=followed,
            samples=samples,
            report=drawn,
        )
        return run.sign(result)


@task(cache_policy=NO_CACHE)
def register(config: Retrain, run: Run, trained: Trained, scores: Scores) -> str:
    """The registry's version of this training, with where it came from as tags."""
    logger.info("register: %s as %s", trained.job, config.model_name)
    tags = {
        "dataset_digest": trained.fingerprint,
        "weights_sha256": trained.weights,
        "evaluation": scores.job,
    }
    found = registry.register(run, config.root, config.model_name, trained.job, trained.bundle, tags)
    return str(found.version)


def contest(config: Retrain, source: str, version: str, scores: Scores) -> Verdict:
    """The gate's verdict against whoever is champion by then; a promotion meanwhile means another look."""
    while True:
        champion = registry.champion(config.model_name) or ""
        holder = score_champion(config, source, champion) if champion not in ("", version) else None
        verdict = gate(config.root, config.model_name, version, scores, champion, holder, config.margin)
        if verdict is not None:
            return verdict
        logger.info("gate: another version became champion meanwhile: scoring that one")


def encode_with_champion(config: Retrain, champion: str | None, source: str) -> Table | None:
    """The champion's latents of today's images, a table that follows the alias; None without a champion."""
    if champion is None:
        return None
    settings = narrow(Encode, config, model=champion, source=source, limit=None, scores=True)
    subscribe(config.model_name, settings, f"retrain {config.source}")
    return encode(settings)


def sample_champion(config: Retrain, champion: str | None) -> Table | None:
    """Images from the champion's prior; None without a champion, or where it has no prior."""
    if champion is None or not registry.locate(champion).facts()["extra"]["generative"]:
        logger.info(
            "sample: none, the champion is no generative model" if champion else "sample: no champion"
        )
        return None
    return sample(narrow(Sample, config, model=champion))


def scoring(config: Retrain, model: str, source: str) -> Evaluate:
    """How every version of a retrain is scored: on the snapshot's test split, with the same noise."""
    return narrow(Evaluate, config, model=model, source=source, limit=None)


def score_champion(config: Retrain, source: str, champion: str) -> Scores:
    """The reigning champion's scores on the challenger's images."""
    return evaluate(scoring(config, f"models:/{config.model_name}/{champion}", source))
