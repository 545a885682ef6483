"""Drift: do new images still look, to the model, like those it was trained on?

Latents and scores of the new images are held against those of images the model never trained on but that
came with its training set: on its training images themselves every model scores better than on any others.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import cached_property

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.store import open_store
from data.tables import open_table, read_latents, write_columns
from flows import events
from flows.config import Drift, Encode, narrow
from flows.encode import encode
from flows.jobs import digest, job_store, put_record, read_record
from flows.registry import Located, locate
from flows.results import Drifted
from flows.tracking import Run, tracked
from flows.two_samples import Finding, differences, smallest, verdict

logger = logging.getLogger("vae_flows.drift")
FEWEST = 20  # images on either side, below which no test could tell
HELD_OUT = ("validation", "test")
SCORES = ("kl", "log_likelihood", "elbo")


@flow(name="drift")
def drift(config: Drift) -> Drifted:
    """Test new images against the model's own; on drift, a table of what changed and an event."""
    with tracked(config) as run:
        model = locate(config.model)
        reference = Rows(config.reference or own_table(config, model), model)
        new = Rows(config.table or encoded(config, model, config.source), model)
        job = f"drift-{digest(reference.identity, new.identity, settings(config))}"
        if (record := read_record(job_store(config.root, job), "drift.json")) is not None:
            logger.info("drift: unchanged, %s was compared before", new.uri)
            drifted = Drifted(**record)
        else:
            drifted = compare(config, model, reference, new, job)
        if run.wants(drifted):
            _log(run, config, drifted)
        return run.sign(drifted)


def settings(config: Drift) -> dict[str, object]:
    """What the verdict depends on beside the model and the images."""
    return {"split": config.split, "rows": config.rows, "level": config.level, "seed": config.seed}


def own_table(config: Drift, model: Located) -> str:
    """The latent table of the snapshot that the model was trained on; retrain has written it already."""
    fingerprint = model.facts()["extra"]["dataset"]
    snapshots = open_store(config.root.resolve() / "snapshots")
    found = [name for name in snapshots.folders() if name.endswith(f"-{fingerprint}")]
    if not found:
        raise ValueError(
            f"no snapshot {fingerprint}, which {model.uri} was trained on, under {snapshots.url}: "
            "give --reference TABLE, a latent table of this model"
        )
    return encoded(config, model, f"snapshot:{snapshots.uri(found[0])}", limit=None)


def encoded(config: Drift, model: Located, source: str, **changes: object) -> str:
    """The latent table of a source, with scores; found where it is complete."""
    return encode(narrow(Encode, config, model=model.uri, source=source, scores=True, **changes)).uri


class Rows:
    """A latent table of the model, read a column at a time."""

    def __init__(self, uri: str, model: Located):
        self.uri = uri
        self.manifest = open_table(uri)
        made_by = self.manifest.table["job"].get("weights_sha256")
        if made_by != model.facts()["weights"]:
            raise ValueError(f"table {uri} was not encoded by {model.uri}: its latents are of another model")
        self.columns = self.manifest.table["job"]["columns"]
        if self.columns["kl"] and not self.columns["scores"]:
            raise ValueError(f"table {uri} has no scores: encode it with --scores")

    @property
    def identity(self) -> list[str]:
        """The digests of its files, which make the job's key."""
        return [file.sha256 for file in self.manifest.parts]

    @cached_property
    def hashes(self) -> np.ndarray:
        """Of each image's stored bytes."""
        return read_latents(self.uri, "content_hash")[1]

    def of_split(self, split: str) -> np.ndarray:
        """Places of the rows of a split, or of the held-out ones."""
        splits = read_latents(self.uri, "split")[1]
        wanted = HELD_OUT if split == "held-out" else (split,)
        return np.flatnonzero(np.isin(splits.astype(str), wanted))

    def not_in(self, other: Rows) -> np.ndarray:
        """Places of the rows whose image the other table does not have."""
        known = set(other.hashes)
        return np.flatnonzero([digest not in known for digest in self.hashes])

    def read(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """mu (N, D) and the scores (N,) at these places; an autoencoder's rows have no scores."""
        names = ("mu", *(SCORES if self.columns["scores"] else ()))
        return {name: read_latents(self.uri, name)[1][places] for name in names}


@task(cache_policy=NO_CACHE)
def compare(config: Drift, model: Located, reference: Rows, new: Rows, job: str) -> Drifted:
    """Test, write the table of the tests, tell on drift, then the record that it is done."""
    ours, theirs = reference.of_split(config.split), new.not_in(reference)
    logger.info("drift: %d new images against %d of %s", len(theirs), len(ours), reference.uri)
    if len(ours) < FEWEST:
        raise ValueError(
            f"{len(ours)} {config.split} images in {reference.uri}: a test takes {FEWEST} or more; "
            "choose another --split or --reference"
        )
    ours, theirs = (chosen(places, config.rows, config.seed) for places in (ours, theirs))
    drifted = Drifted(
        job=job,
        model=model.uri,
        reference=reference.uri,
        new=new.uri,
        reference_rows=len(ours),
        new_rows=len(theirs),
        drift=False,
        reason=f"{len(theirs)} new images: a test takes {FEWEST} or more",
    )
    if len(theirs) < FEWEST:  # tomorrow there may be more: nothing is on record
        return drifted
    tests = differences(reference.read(ours), new.read(theirs), seed=config.seed)
    found, reason = verdict(tests, config.level)
    drifted = drifted.model_copy(update={"drift": found, "reason": reason, "p": smallest(tests)})
    drifted = drifted.model_copy(update={"table": write_table(config, model, drifted, tests)})
    if found:  # before the record: a kill in between tells twice, never not at all
        resource = events.model(model.name or "unregistered")
        events.emit(events.DRIFT_DETECTED, resource, **drifted.model_dump(mode="json"))
    record = drifted.model_dump(mode="json", exclude={"run_id", "changed"})
    return Drifted(**put_record(job_store(config.root, job), "drift.json", record), changed=True)


def write_table(config: Drift, model: Located, drifted: Drifted, tests: list[Finding]) -> str:
    """A row a test, in Parquet; the table's URI."""
    return write_columns(
        open_store(config.out or config.root.resolve() / "drift"),
        {name: [getattr(test, name) for test in tests] for name in asdict(tests[0])},
        name=model.name or "drift",
        key={"job": drifted.job},
        lineage={**drifted.model_dump(mode="json"), "settings": settings(config)},
    ).uri


def chosen(places: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """At most so many of the places, drawn without replacement."""
    return np.random.default_rng(seed).permutation(places)[:rows]


def _log(run: Run, config: Drift, drifted: Drifted) -> None:
    logger.log(logging.WARNING if drifted.drift else logging.INFO, "drift: %s", drifted.reason)
    run.log_metrics({"drift/alarm": drifted.drift, **{f"drift/p_{kind}": p for kind, p in drifted.p.items()}})
    run.log_json("drift.json", drifted.model_dump(mode="json"))
