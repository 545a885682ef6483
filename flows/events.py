"""Events that other systems, and our own deployments, react to; Prefect's server keeps and routes them."""

from __future__ import annotations

from typing import Any

from flows.config import source_name

DATASET_UPDATED = "vae.dataset.updated"
DRIFT_DETECTED = "vae.drift.detected"
MODEL_PROMOTED = "vae.model.promoted"
BY = "vae.by"  # label of an event's resource: the command, or whoever else, that changed it


def dataset(source: str) -> str:
    """The resource that a source's images are, by the source's short name.

    >>> dataset("folder:/data/photos")
    'vae.dataset.photos'
    """
    return f"vae.dataset.{source_name(source)}"


def model(name: str) -> str:
    """The resource that a registered model is, whatever its version."""
    return f"vae.model.{name}"


def emit(event: str, resource: str, *, by: str = "", **payload: Any) -> None:
    """Emit an event about a resource, its facts as payload.

    Prefect sends it from a thread of its own; it is sent when this process ends at the latest.
    """
    from prefect.events import emit_event

    emit_event(event, {"prefect.resource.id": resource, BY: by}, payload=payload)
