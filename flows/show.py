"""Show: some rows of a table, with the paths of thumbnails of their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.browse import images_of, sample_rows
from flows.config import Browse, Show
from flows.figures import grid
from flows.jobs import digest
from flows.results import Browsed


def show(config: Show) -> Browsed:
    """Rows drawn at random, the same for the same seed."""
    rows = sample_rows(config.table, config.count, config.seed)
    shown, _ = with_thumbnails(config, rows)
    return Browsed(table=config.table, rows=shown, changed=True)


def with_thumbnails(
    config: Browse, rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The rows with the path of a PNG of each image (None where it is gone), and the images by id."""
    images = images_of(config.table, {row["id"] for row in rows}, config.root.resolve() / "torchvision")
    folder = config.root.resolve() / "thumbnails" / digest(config.table)
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for id, image in images.items():
        paths[id] = folder / f"{digest(id)}.png"  # an id may be too long for a name, or hold anything
        paths[id].write_bytes(grid(image[None]))
    return [
        {**row, "thumbnail": str(paths[row["id"]]) if row["id"] in paths else None} for row in rows
    ], images
