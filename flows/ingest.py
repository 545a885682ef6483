"""Ingest: a source's images, decoded once into an immutable snapshot."""

from __future__ import annotations

import logging

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.snapshot import ingest as ingest_images
from data.snapshot import open_snapshot
from data.sources import Source, limited, open_source
from data.store import open_store
from flows.config import Images, Ingest
from flows.events import DATASET_UPDATED, dataset, emit
from flows.progress import progress
from flows.results import Ingested, told
from flows.tracking import Run, tracked

logger = logging.getLogger("vae_flows.ingest")


@flow(name="ingest")
def ingest(config: Ingest) -> Ingested:
    """The snapshot of a source: found where nothing changed, else written and logged as the run's input."""
    with tracked(config) as run:
        logger.info("ingest: reading %s", config.source)
        ingested = write_snapshot(config, run)
        state = "written" if ingested.changed else "unchanged"
        logger.info(
            "ingest: snapshot %s %s: %d images %s",
            ingested.fingerprint,
            state,
            ingested.rows,
            ingested.counts,
        )
        if ingested.rejected:
            logger.warning("ingest: %s", told(ingested))
        if run.wants(ingested):
            _log(run, ingested)
            emit(
                DATASET_UPDATED,
                dataset(config.source),
                by=run.command,
                snapshot=ingested.snapshot,
                rows=ingested.rows,
            )
        return run.sign(ingested)


@task(cache_policy=NO_CACHE)
def write_snapshot(config: Ingest, run: Run) -> Ingested:
    """Scan, decode and commit."""
    with progress("ingest", run) as advance:
        snapshot = ingest_images(
            limited(open_images(config), config.limit),
            config.decode,
            open_store(config.root.resolve() / "snapshots"),
            max_reject_share=config.max_reject_share,
            duplicates=config.duplicates,
            progress=lambda at: advance(at.rows_done, at.rows, f"images, {at.rejected} rejected"),
        )
    return Ingested.of(snapshot)


def snapshot_of(config: Ingest) -> Ingested:
    """The snapshot that another flow reads: a source that is one, decoded this way, is taken as it is."""
    if config.source.startswith("snapshot:") and config.limit is None:
        snapshot = open_snapshot(config.source.removeprefix("snapshot:"))
        if snapshot.decode == config.decode.resolved(snapshot.decode.geometry):
            return Ingested.of(snapshot)
    return ingest(config)


def open_images(config: Images) -> Source:
    """The source of a command that reads images; data sets that torchvision downloads go under the root."""
    return open_source(config.source, downloads=config.root.resolve() / "torchvision")


def _log(run: Run, ingested: Ingested) -> None:
    for split in ingested.counts:
        run.log_dataset(ingested.name, ingested.fingerprint, ingested.snapshot, split)
    counts = {f"ingest/{split}": n for split, n in ingested.counts.items()}
    run.log_metrics({**counts, "ingest/rejected": ingested.rejected, "ingest/leaked": ingested.leaked})
