"""Edit: an image with an attribute added, or taken away, by degree."""

from __future__ import annotations

import numpy as np

from data.tables import read_latents
from flows.config import Edit
from flows.pictures import Studio
from flows.results import Drawn

NAMED = 5  # attributes that a note names


def edit(config: Edit) -> Drawn:
    """Draw the image at degrees from 0 to the given one, along the direction that the table's rows show."""
    from vae.edit import attribute_direction, move, movement

    studio = Studio(config)
    _, latents = read_latents(config.table)
    names, attributes = attributes_of(config.table)
    wanted, rows = chosen(config, names, attributes)
    direction = attribute_direction(latents[rows], wanted[rows])
    before = studio.latent(config.image)[None]
    edited = move(before, direction, np.linspace(0, config.degree, config.steps).tolist())[0]
    moved = movement(latents, attributes, before, edited[-1:])
    return studio.draw(edited, notes=_notes(names, moved))


def attributes_of(table: str) -> tuple[list[str], np.ndarray]:
    """The labels of a table and whether each row has each, float (N, A)."""
    _, labels = read_latents(table, "label")
    names = sorted({label for label in labels if label is not None})
    if len(names) < 2:
        raise ValueError(f"table {table} has {len(names)} labels: an attribute needs two or more")
    return names, np.stack([labels == name for name in names], axis=1).astype(np.float64)


def chosen(config: Edit, names: list[str], attributes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The attribute's value in each row (N,), and which rows the direction is taken from."""
    everything = np.ones(len(attributes), bool)
    if config.attribute not in names:
        return numeric_column(config, names), everything
    wanted = attributes[:, names.index(config.attribute)]
    if not config.instead_of:
        return wanted, everything
    if config.instead_of not in names:
        raise ValueError(
            f"--instead-of {config.instead_of!r} is no label of {config.table}: {', '.join(names)}"
        )
    return wanted, (wanted + attributes[:, names.index(config.instead_of)]) > 0


def numeric_column(config: Edit, names: list[str]) -> np.ndarray:
    """A column of the table as numbers; ValueError where the attribute is neither column nor label."""
    try:
        _, values = read_latents(config.table, config.attribute)
        return np.asarray(values, np.float64)
    except (KeyError, ValueError) as error:
        known = ", ".join(names)
        raise ValueError(
            f"--attribute {config.attribute!r} is no numeric column and no label ({known})"
        ) from error


def _notes(names: list[str], moved: np.ndarray) -> list[str]:
    largest = np.argsort(-np.abs(moved))[:NAMED]
    told = ", ".join(f"{names[i]} {moved[i]:+.2f}" for i in largest)
    return [f"  moved, in standard deviations of a linear probe: {told}"]
