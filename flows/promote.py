"""Promote: a version made champion by hand, by the same transaction that the gate uses."""

from __future__ import annotations

import logging

from prefect import flow

from flows import promotion
from flows.config import Follow, Promote, narrow
from flows.follow import follow
from flows.results import Moved
from flows.tracking import tracked

logger = logging.getLogger("vae_flows.promotion")


@flow(name="promote")
def promote(config: Promote) -> Moved:
    """Check that the version is sound, move the alias on record, encode the tables that follow it."""
    with tracked(config) as run:
        moves = promotion.reconcile(config.root, config.name)
        before = moves[-1].version if moves else ""
        changed = before != config.version
        if changed:
            promotion.require_sound(config.root, config.name, config.version)
            promotion.move(config.root, config.name, config.version, config.reason, after=len(moves))
        tables = follow(narrow(Follow, config)).tables
        result = Moved(
            changed=changed or any(table.changed for table in tables),
            model_uri=f"models:/{config.name}/{config.version}",
            before=before,
            reason=config.reason,
            tables=tables,
        )
        if run.wants(result):
            run.log_json("promotion.json", result.model_dump())
        return run.sign(result)
