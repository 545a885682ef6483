"""Ingest: a source's images, decoded once into an immutable snapshot."""

from __future__ import annotations

import logging

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.snapshot import Snapshot
from data.snapshot import ingest as ingest_images
from data.sources import open_source
from data.store import open_store
from flows.config import Ingest
from flows.progress import progress
from flows.tracking import Run, tracked

logger = logging.getLogger("vae_flows.ingest")


@flow(name="ingest")
def ingest(config: Ingest) -> Snapshot:
    """The snapshot of a source: found where nothing changed, else written and logged as the run's input."""
    with tracked(config) as run:
        logger.info("ingest: reading %s", config.source)
        snapshot = write_snapshot(config)
        _tell(snapshot)
        if snapshot.changed:
            _log(run, snapshot)
        return snapshot


@task(cache_policy=NO_CACHE)
def write_snapshot(config: Ingest) -> Snapshot:
    """Scan, decode and commit."""
    with progress("ingest") as advance:
        return ingest_images(
            open_source(config.source),
            config.decode,
            open_store(config.root.resolve() / "snapshots"),
            max_reject_share=config.max_reject_share,
            duplicates=config.duplicates,
            limit=config.limit,
            progress=advance,
        )


def _tell(snapshot: Snapshot) -> None:
    counts = ", ".join(f"{n} {split}" for split, n in snapshot.counts.items())
    state = "written" if snapshot.changed else "unchanged"
    logger.info("ingest: snapshot %s %s: %s images (%s)", snapshot.fingerprint, state, snapshot.rows, counts)
    if snapshot.rejected:
        reasons = ", ".join(f"{n} {reason}" for reason, n in snapshot.reasons.items())
        logger.warning("ingest: %d rejected (%s): %s", snapshot.rejected, reasons, snapshot.rejects_uri)


def _log(run: Run, snapshot: Snapshot) -> None:
    for split in snapshot.counts:
        run.log_dataset(snapshot.name, snapshot.fingerprint, snapshot.uri, split)
    counts = {f"ingest/{split}": n for split, n in snapshot.counts.items()}
    run.log_metrics({**counts, "ingest/rejected": snapshot.rejected, "ingest/leaked": snapshot.leaked})
