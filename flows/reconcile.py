"""Reconcile: what a kill has left open, closed: MLflow runs without a process, promotions half-done."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from uuid import UUID

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.store import open_store
from flows.config import Follow, Reconcile
from flows.environment import make_root, prepare
from flows.follow import follow
from flows.results import Reconciled
from flows.tracking import close, open_runs

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

logger = logging.getLogger("vae_flows.reconcile")
# Prefect's final state -> MLflow's status. One that was stopped can be resumed, and is by the same command.
STATUS = {"COMPLETED": "FINISHED", "FAILED": "FAILED", "CRASHED": "KILLED", "CANCELLED": "KILLED"}


@flow(name="reconcile")
def reconcile(config: Reconcile) -> Reconciled:
    """Close MLflow runs whose Prefect run is over, and finish promotions; makes no MLflow run of its own."""
    prepare(config.root)
    make_root(config.root)
    closed = close_runs()
    models = finish_promotions(config)
    return Reconciled(closed=closed, models=models, changed=bool(closed) or any(models.values()))


@task(cache_policy=NO_CACHE)
def close_runs() -> dict[str, str]:
    """Each run that MLflow holds for running and Prefect does not, and the status it gets."""
    closed = {}
    for run_id, flow_run in open_runs().items():
        state = state_of(flow_run)
        status = STATUS.get(state.type.value) if state else None
        if state and status:
            logger.info("reconcile: MLflow run %s is %s, as Prefect's was %s", run_id, status, state.name)
            close(run_id, status, state.message or state.name or "")
            closed[run_id] = status
    return closed


def state_of(flow_run: str) -> State | None:
    """The state of a Prefect run; None where this server knows no such run, as another may."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return client.read_flow_run(UUID(flow_run)).state
        except ObjectNotFound:
            return None


def finish_promotions(config: Reconcile) -> dict[str, int]:
    """Alias, history and the tables that follow agree again; the tables encoded for that, by model."""
    names = open_store(config.root.resolve() / "registry").folders()
    return {name: len(follow(Follow(root=config.root, name=name, drop="")).tables) for name in names}
