"""Watching a training: after each epoch what its latents carry, and now and then what it draws.

The record of an epoch is committed before the next is trained, so a resumed training keeps the history of one
that was not stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data.blocks import Split
from data.snapshot import open_snapshot
from data.store import Store, seal, unseal
from flows.figures import grid
from flows.jobs import put_record, read_record
from flows.results import Ingested

if TYPE_CHECKING:
    from vae.model import Model
    from vae.train import FitResult

IMAGES = 1000  # held-out images that the latents are measured on
SHOWN = 8  # of them, drawn over their reconstructions; and twice as many samples
LOOKS = 12  # epochs of a training, at most, whose pictures are logged
WIDEST = 1024  # latent dimensions up to which the KL of each is kept for each epoch


class Log(Protocol):
    """A run, or what brings to one."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...

    def log_image(self, name: str, png: bytes, step: int) -> None: ...


def held_out(ingested: Ingested) -> np.ndarray:
    """Some validation images, or where there are none some of training."""
    from vae.feed import first_images

    snapshot = open_snapshot(ingested.snapshot)
    return first_images(
        Split(snapshot, "validation" if snapshot.counts.get("validation") else "train"), IMAGES
    )


class Watch:
    """What `fit` calls after each epoch, with the epoch, the step and the model."""

    def __init__(self, store: Store, run: Log, images: np.ndarray, epochs: int):
        self.store, self.run, self.images = store, run, images
        self.looks = set(np.linspace(1, epochs, min(epochs, LOOKS)).round().astype(int).tolist())

    def __call__(self, epoch: int, step: int, model: Model) -> None:
        place = f"history/{step:010d}.json"
        if self.store.exists(place):  # an epoch that an attempt before this one finished
            return
        measured = self._measure(step, model)
        if epoch in self.looks:
            self._picture(step, model)
        self.store.put_if_absent(place, seal(measured))

    def _measure(self, step: int, model: Model) -> dict[str, Any]:
        from vae.activity import activity

        found = activity(model, self.images)
        if found is None:
            return {"step": step}
        levels = found.kl_per_level if len(found.kl_per_level) > 1 else ()
        metrics = {f"validation/kl_level_{level}": kl for level, kl in enumerate(levels)}
        self.run.log_metrics({"validation/active_units": found.active_units, **metrics}, step)
        dims = found.kl_per_dim if found.kl_per_dim and len(found.kl_per_dim) <= WIDEST else None
        return {"step": step, **asdict(found), "kl_per_dim": dims}

    def _picture(self, step: int, model: Model) -> None:
        """MLflow's own viewer shows a picture's steps with a slider."""
        from vae.edit import reconstruct
        from vae.sample import sample

        shown = self.images[:SHOWN]
        pairs = np.concatenate([shown, reconstruct(model, shown, range(len(shown)))])
        self.run.log_image("reconstructions", grid(pairs, columns=len(shown)), step)
        if model.generative:
            drawn = sample(model, range(2 * SHOWN))[1]
            self.run.log_image("samples", grid(drawn, columns=SHOWN), step)


def put_history(store: Store, result: FitResult) -> None:
    """Commit the whole of a training's history as one file, and remove its pieces.

    `lines` are fit's own, `epochs` what was watched after each epoch.
    """
    pieces = sorted(store.entries("history"))
    epochs = [unseal(store.get(piece.path), store.uri(piece.path)) for piece in pieces]
    lines = [asdict(line) for line in result.history]
    put_record(store, "history.json", {"lines": lines, "epochs": epochs})
    for piece in pieces:
        store.delete(piece.path)


def read_history(store: Store) -> dict[str, Any]:
    """A finished training's history; without a line where it was trained before one was kept."""
    return read_record(store, "history.json") or {"lines": [], "epochs": []}
