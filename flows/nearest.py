"""Nearest: the images whose latents lie closest to that of an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.browse import images_of, latent_of, nearest_rows
from data.tables import open_table
from flows.config import Nearest, Picture, narrow
from flows.figures import grid
from flows.pictures import Studio
from flows.results import Browsed
from flows.show import with_thumbnails


def nearest(config: Nearest) -> Browsed:
    """The closest by Euclidean distance of posterior means, without the image itself, and a picture."""
    job = open_table(config.table).table["job"]
    if job["kind"] != "latents":
        raise ValueError(f"{config.table} is a table of {job['kind']}: give one of latents")
    latent, pixels = query(config)
    found = nearest_rows(config.table, latent, config.count + 1)
    found = [near for near in found if near.row["id"] != config.image][: config.count]
    rows = [{"distance": near.distance, **near.row} for near in found]
    shown, images = with_thumbnails(config, rows)
    own = [] if pixels is None else [pixels]
    pictures = own + [images[row["id"]] for row in rows if row["id"] in images]
    if pictures:
        config.picture.parent.mkdir(parents=True, exist_ok=True)
        config.picture.write_bytes(grid(np.stack(pictures), columns=len(pictures)))
    picture = str(config.picture) if pictures else None
    return Browsed(table=config.table, rows=shown, picture=picture, changed=True)


def query(config: Nearest) -> tuple[np.ndarray, np.ndarray | None]:
    """The posterior mean (D,) of the image, and its pixels (C, H, W) where they are still to be had."""
    if (latent := latent_of(config.table, config.image)) is not None:
        downloads = config.root.resolve() / "torchvision"
        return latent, images_of(config.table, [config.image], downloads).get(config.image)
    if not Path(config.image).is_file():
        raise ValueError(f"{config.image!r} is neither an id in {config.table} nor an image file")
    table = open_table(config.table).table
    model = config.model or table["lineage"]["model"]
    studio = Studio(narrow(Picture, config, model=model, table=""))
    if studio.facts["weights"] != table["job"]["weights_sha256"]:
        raise ValueError(f"{model} did not make {config.table}: its latents mean nothing there")
    if table["job"]["columns"]["dimensions"]:
        raise ValueError(
            f"{config.table} holds some of the model's dimensions (--min-kl): give an id, not a file"
        )
    pixels = studio.pixels(config.image)
    return studio.encoder.encode(pixels[None], [config.image]).mu[0], pixels
