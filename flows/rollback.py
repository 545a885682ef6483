"""Roll back: the champion before this one is champion again, and the tables that follow are its own."""

from __future__ import annotations

import logging

from prefect import flow

from flows import promotion
from flows.config import Follow, Rollback, narrow
from flows.follow import follow
from flows.results import Moved
from flows.tracking import tracked

logger = logging.getLogger("vae_flows.promotion")


@flow(name="rollback")
def rollback(config: Rollback) -> Moved:
    """Take back the last promotion; one that was stopped halfway is finished, not followed by another."""
    with tracked(config) as run:
        root, name = config.root, config.name
        moves = promotion.reconcile(root, name)
        last = moves[-1] if moves else None
        if last is None or last.kind != "rollback" or promotion.settled(root, name, last):
            version = promotion.previous(name, moves)
            reason = config.reason or f"version {moves[-1].version} was rolled back"
            last = promotion.move(root, name, version, reason, "rollback", after=len(moves))
        result = Moved(
            changed=True,
            model_uri=f"models:/{name}/{last.version}",
            before=moves[last.number - 2].version,
            reason=last.reason,
            tables=follow(narrow(Follow, config)).tables,
        )
        run.log_json("promotion.json", result.model_dump())
        return run.sign(result)
