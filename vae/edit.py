"""Moving through the latent space: reconstructions, interpolations, attributes added by degree.

Latents here are posterior means, as `Encoder` gives them and as a latent table holds them, so every
function takes numpy rows from either. `decode` turns any of them into pictures.

Legend: N rows, S steps, A attributes, D latent dimensions, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vae import pixels
from vae.encode import Encoder
from vae.model import Model


def decode(model: Model, z: np.ndarray) -> np.ndarray:
    """The images of latents (N, D): the likelihood's mean, rounded, uint8 (N, C, H, W)."""
    if z.ndim != 2 or z.shape[1] != model.latent_dim:
        raise ValueError(
            f"latents of shape {z.shape} do not fit the model, which takes (-1, {model.latent_dim})"
        )
    rows = torch.from_numpy(z.astype(np.float32)).to(model.device)
    model.eval()
    with torch.inference_mode():
        batches = rows.split(pixels.rows_at_once(model.config))
        parts = [pixels.to_uint8(model.decode(batch).mean).cpu() for batch in batches]
    return torch.cat(parts).numpy()


def reconstruct(model: Model, images: np.ndarray, ids: Sequence[str | int]) -> np.ndarray:
    """The images (N, C, H, W) uint8 through the posterior's mean and back (a denoiser cleans them)."""
    return decode(model, Encoder(model).encode(images, ids).mu)


def interpolate(a: np.ndarray, b: np.ndarray, degrees: Sequence[float], how: str = "linear") -> np.ndarray:
    """Latents on the way from a (D,) to b (D,): (S, D), exactly a at degree 0 and b at degree 1.

    Degrees outside 0..1 go beyond the ends. how: 'linear', or 'spherical' along the great circle, which
    keeps the length that draws of a high-dimensional Gaussian have (White 2016, *Sampling generative
    networks*).

    >>> interpolate(np.array([1.0, 0.0]), np.array([0.0, 1.0]), [0, 0.5, 1], "spherical").round(3)
    array([[1.   , 0.   ],
           [0.707, 0.707],
           [0.   , 1.   ]])
    """
    t = np.asarray(degrees, np.float64)[:, None]
    if how == "linear":
        return (1 - t) * a + t * b
    if how != "spherical":
        raise ValueError(f"interpolation {how!r} is neither 'linear' nor 'spherical'")
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    angle = np.arccos(np.clip(a @ b / lengths, -1, 1)) if lengths else 0.0
    if angle < 1e-6:
        return (1 - t) * a + t * b
    if np.pi - angle < 1e-6:
        raise ValueError(
            "the two latents point in opposite directions: no great circle is theirs alone; go 'linear'"
        )
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def attribute_direction(
    latents: np.ndarray, attribute: np.ndarray, others: np.ndarray | None = None
) -> np.ndarray:
    """The direction (D,) that adds one unit of an attribute to latents (N, D).

    attribute (N,): booleans or numbers. Without others, of a boolean, it is the difference of the two
    means (Larsen et al. 2016). With others (N, A) it is what the attribute adds while those stay as they
    are: the coefficient of the attribute in the least-squares fit of the latents on all of them. From one
    class to another: pass the rows of the two and whether each is of the second.

    >>> attribute_direction(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 7.0]]), np.array([False, False, True]))
    array([3., 6.])
    """
    attribute = np.asarray(attribute, np.float64)
    if len(attribute) != len(latents) or np.ptp(attribute) == 0:
        raise ValueError(
            f"{len(attribute)} values of the attribute for {len(latents)} latents, "
            f"{len(np.unique(attribute))} of them distinct: "
            "a direction needs one value each and two distinct ones"
        )
    columns = [np.ones(len(latents)), attribute]
    causes = np.column_stack(columns if others is None else [*columns, np.asarray(others, np.float64)])
    return np.linalg.lstsq(causes, latents.astype(np.float64), rcond=None)[0][1]


def move(latents: np.ndarray, direction: np.ndarray, degrees: Sequence[float]) -> np.ndarray:
    """Latents (N, D) with a direction added to each degree: (N, S, D). Degree -1 takes one unit away."""
    return latents[:, None] + np.asarray(degrees, np.float64)[:, None] * direction


def traverse(latent: np.ndarray, dimension: int, values: Sequence[float]) -> np.ndarray:
    """A latent (D,) with one dimension at each of S values: (S, D).

    >>> traverse(np.array([5.0, 7.0]), 1, [-1, 1])
    array([[ 5., -1.],
           [ 5.,  1.]])
    """
    moved = np.repeat(latent[None], len(values), 0)
    moved[:, dimension] = values
    return moved


def movement(
    latents: np.ndarray, attributes: np.ndarray, before: np.ndarray, after: np.ndarray
) -> np.ndarray:
    """How far an edit moves each attribute, (A,), in that attribute's standard deviations.

    A linear probe of every attribute is fitted to latents (N, D) with attributes (N, A), and read on the
    latents before and after the edit (M, D). The edited attribute should move, the others stay near 0. Give
    `after` as the edited images encoded again, to score what the decoder made of the edit.
    """
    attributes = np.asarray(attributes, np.float64)
    deviations = attributes.std(0)
    if not deviations.all():
        raise ValueError(
            f"attributes {np.flatnonzero(deviations == 0).tolist()} have one value: nothing can move them"
        )
    centered = latents.astype(np.float64) - latents.mean(0)
    probes = np.linalg.lstsq(centered, attributes - attributes.mean(0), rcond=None)[0]
    return (after.astype(np.float64) - before).mean(0) @ probes / deviations
