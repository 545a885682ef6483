"""Looking into a table: some of its rows, the images they are of, the rows that lie closest to a point.

One file of the table is in memory at a time. Shapes: N rows, D latent dimensions, C channels, H W pixels.
"""

from __future__ import annotations

import heapq
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from data.batches import read_rows
from data.commit import Manifest
from data.files import StoredFile, read_file
from data.images import DecodePath
from data.sources import open_source
from data.tables import matrix, open_table

PLAIN = ("id", "split", "label", "width", "height", "kl", "log_likelihood", "elbo", "index", "seed")


class Near(NamedTuple):
    """A row and its Euclidean distance."""

    distance: float
    row: dict[str, Any]


def sample_rows(uri: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a table drawn at random, the same for the same seed: its scalar columns, in its order."""
    manifest = open_table(uri)
    chosen = np.sort(np.random.default_rng(seed).permutation(manifest.rows)[:count])
    starts = np.cumsum([0, *(file.rows for file in manifest.parts)])
    rows: list[dict[str, Any]] = []
    for file, start, stop in zip(manifest.parts, starts[:-1], starts[1:], strict=True):
        here = chosen[(start <= chosen) & (chosen < stop)] - start
        if len(here):
            rows += _plain(manifest, file).take(pa.array(here)).to_pylist()
    return rows


def latent_of(uri: str, id: str) -> np.ndarray | None:
    """The posterior mean (D,) of an image in a latent table, or None where it has no such id."""
    manifest = open_table(uri)
    for file in manifest.parts:
        if pc.any(pc.equal(read_file(manifest.store, file, ["id"])["id"], id)).as_py():
            table = read_file(manifest.store, file, ["id", "mu"])
            return matrix(table.filter(pc.equal(table["id"], id))["mu"])[0]
    return None


def nearest_rows(uri: str, latent: np.ndarray, count: int) -> list[Near]:
    """The rows of a latent table whose posterior means lie closest to a point (D,), the closest first."""
    manifest = open_table(uri)
    best: list[Near] = []
    for file in manifest.parts:
        means = matrix(read_file(manifest.store, file, ["mu"])["mu"]).astype(np.float64)
        if means.shape[1] != len(latent):
            raise ValueError(f"table {uri} has latents of {means.shape[1]} dimensions, not {len(latent)}")
        distances = np.linalg.norm(means - latent, axis=1)
        places = np.argsort(distances, kind="stable")[:count]
        rows = _plain(manifest, file).take(pa.array(places)).to_pylist()
        found = [Near(float(distances[place]), row) for place, row in zip(places, rows, strict=True)]
        best = heapq.nsmallest(count, [*best, *found], key=lambda near: near.distance)
    return best


def images_of(uri: str, ids: Collection[str], downloads: Path) -> dict[str, np.ndarray]:
    """The images (C, H, W) uint8 of rows, by id, decoded as the table's were; without those that are gone.

    A latent table's are read from its source, which is listed as far as the last of them.
    """
    manifest = open_table(uri)
    if manifest.table["job"]["kind"] not in ("latents", "snapshot"):
        return dict(_stored(manifest, ids))
    job, path = manifest.table["job"], DecodePath.from_dict(manifest.table["lineage"]["decode"])
    source = open_source(job.get("source") or f"snapshot:{uri}", downloads=downloads)
    found: dict[str, np.ndarray] = {}
    wanted = pa.array(list(ids), pa.string())
    for rows in source.listing():
        rows = rows.filter(pc.is_in(rows["id"], wanted))
        if rows.num_rows:
            batch = read_rows(source, rows, path)
            found |= dict(zip(batch.ids, batch.images, strict=True))
        if len(found) == len(ids):
            break
    return found


def _stored(manifest: Manifest, ids: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The images that a table of samples holds."""
    for file in manifest.parts:
        table = read_file(manifest.store, file, ["id", "image"])
        table = table.filter(pc.is_in(table["id"], pa.array(list(ids), pa.string())))
        for id, image in zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True):
            yield id, _pixels(image["bytes"])


def _pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def _plain(manifest: Manifest, file: StoredFile) -> pa.Table:
    """A file's scalar columns."""
    job = manifest.table["job"]
    names = {"latents": PLAIN[:8], "snapshot": PLAIN[:5]}.get(job["kind"], (PLAIN[0], *PLAIN[8:]))
    held = job["columns"] if job["kind"] == "latents" else {}
    absent = {
        *([] if held.get("kl") else ["kl"]),
        *([] if held.get("scores") else ["log_likelihood", "elbo"]),
    }
    return read_file(manifest.store, file, [name for name in names if name not in absent])
