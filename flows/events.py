"""Events that other systems, and our own deployments, react to; Prefect's server keeps and routes them."""

from __future__ import annotations

from typing import Any

DATASET_UPDATED = "vae.dataset.updated"
DRIFT_DETECTED = "vae.drift.detected"
MODEL_PROMOTED = "vae.model.promoted"
BY = "vae.by"  # label of an event's resource: the command that changed it


def emit(event: str, resource: str, *, by: str = "", **payload: Any) -> None:
    """Emit an event about a resource (`vae.model.NAME`, `vae.dataset.NAME`), its facts as payload.

    Prefect sends it from a thread of its own; it is sent when this process ends at the latest.
    """
    from prefect.events import emit_event

    emit_event(event, {"prefect.resource.id": resource, BY: by}, payload=payload)
