"""Training that starts from a model's weights: which model, kept beside the job; and what that saved."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from data.store import Store
from flows import registry
from flows.config import Train
from flows.fitting import START, model_of, starting_model
from flows.jobs import put_record, read_record
from flows.results import Ingested, WarmStart

if TYPE_CHECKING:
    from vae.train import FitResult

logger = logging.getLogger("vae_flows.train")


def pin_start(config: Train, ingested: Ingested, store: Store) -> None:
    """Put the model that this job starts from beside it, once: a resumed job starts from the same.

    Where there is no champion yet, training starts from scratch. ValueError for a model of other settings.
    """
    if not config.warm_start or read_record(store, START) is not None:
        return
    if not _is_there(config.warm_start):
        logger.info("train: there is no %s yet: from scratch", config.warm_start)
        put_record(store, START, {"model": None})
        return
    found = registry.locate(config.warm_start)
    facts, files = found.facts(), found.files()
    _refuse_other(config.warm_start, facts["model"], model_of(config, ingested).to_dict())
    folder = f"start-{facts['weights'][:16]}"
    for name, content in files.items():
        store.child(folder).put_if_absent(name, content)
    put_record(store, START, {"model": found.uri, "folder": folder, "files": sorted(files)})
    logger.info("train: starting from %s", found.uri)


def _is_there(uri: str) -> bool:
    """Whether a champion that is asked for exists; any other model has to."""
    if not uri.startswith("models:/"):
        return True
    name, alias, _ = registry.parse(uri)
    return alias != registry.CHAMPION or registry.champion(name) is not None


def _refuse_other(uri: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        other = theirs.get(name)
        other = tuple(other) if isinstance(other, list) else other
        if other != value:
            raise ValueError(
                f"--warm-start {uri}: that model has {name}={other!r}, this one {name}={value!r}"
            )


def saved_by(store: Store, result: FitResult) -> WarmStart | None:
    """What starting from a model saved: how many images that one took to become as good, if known."""
    record = read_record(store, START) or {}
    start = starting_model(store)
    if start is None:
        return None
    first = result.history[0]
    curve = start.extra.get("validation") or []  # (images, ELBO) after each of its epochs
    reached = [images for images, elbo in curve if elbo >= first.elbo]
    images = (reached or [images for images, _ in curve][-1:] or [None])[0]
    return WarmStart(model=record["model"], elbo=first.elbo, images=images)


def validation_curve(result: FitResult) -> list[tuple[int, float]]:
    """(images seen, validation ELBO) after each epoch, which goes with the model for a later warm start."""
    return [(line.images, line.elbo) for line in result.history if line.split == "validation"]
