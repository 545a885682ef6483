"""What a model shows of itself: reconstructions, samples, ways through its latent space, the map of it.

Everything is a function of the model, its images and a seed.

Legend: N images, S steps, D latent dimensions, C channels, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from data.batches import Resident

if TYPE_CHECKING:
    from vae.model import Model

PAIRS = 14  # images shown with their reconstructions, of each kind
SAMPLES = 64
TEMPERATURES = (0.4, 0.55, 0.7, 0.85, 1.0, 1.15)
OWN = TEMPERATURES.index(1.0)
STEPS = 17  # of a way through the latent space
WAYS = 6  # interpolations, and edits
DEGREES = np.linspace(-0.5, 1.5, STEPS)
DIMENSIONS = 32  # traversed at most, those of the largest KL
DEVIATIONS = np.linspace(-3, 3, 11)
OUTLIERS = 24
FITTED = 5000  # training images that the mixture and the attributes' directions are taken from, at most
COMPONENTS = 20
COMPARED = 50  # labels, the most frequent ones, whose means are compared


@dataclass(frozen=True)
class Film:
    """Frames (S, C, H, W) with a caption each, to move along; between `ends` where it has some."""

    title: str
    frames: np.ndarray
    captions: list[str]
    ends: np.ndarray | None = None
    start: int = 0


@dataclass(frozen=True)
class Samples:
    """Sheets of images (N, C, H, W), one a temperature, the same draws on each."""

    name: str
    title: str
    note: str
    sheets: list[np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """Images of the split, by their places in it, and their reconstructions (N, C, H, W)."""

    title: str
    places: np.ndarray
    images: np.ndarray
    reconstructions: np.ndarray


@dataclass(frozen=True)
class Traversal:
    """One latent dimension from low to high: frames (S, C, H, W), its level and its mean KL in nats."""

    dimension: int
    level: int
    kl: float | None
    frames: np.ndarray


@dataclass(frozen=True)
class Map:
    """Places (M,) of images in the split, and their points (M, 2) in each projection, by its name."""

    places: np.ndarray
    points: dict[str, np.ndarray]
    explained: float


class Sitter:
    """A model, the images it is shown on with the score of each (N,), and training images for statistics."""

    def __init__(self, model: Model, shown: Resident, scores: np.ndarray, fitted: Resident, seed: int):
        self.model, self.shown, self.scores, self.fitted, self.seed = model, shown, scores, fitted, seed

    @cached_property
    def latents(self) -> np.ndarray:
        """Posterior means (N, D) of the images shown."""
        return encode(self.model, self.shown)[0]

    @cached_property
    def fit(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Posterior means and log-variances of the images for statistics."""
        return encode(self.model, self.fitted)

    @cached_property
    def order(self) -> np.ndarray:
        """Places of the images shown, from the worst score to the best."""
        return np.argsort(self.scores, kind="stable")

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images of latents (N, D)."""
        from vae.edit import decode

        return decode(self.model, latents)

    def pairs(self) -> list[Pairs]:
        """Typical, best and worst by score; of a few images each is shown once."""
        size = min(PAIRS, max(1, len(self.order) // 3))
        middle = (len(self.order) - size) // 2
        chosen = {
            "Typical": self.order[middle : middle + size],
            "Best": self.order[::-1][:size],
            "Worst": self.order[:size],
        }
        return [
            Pairs(title, places, self.shown.images[places], self.decode(self.latents[places]))
            for title, places in chosen.items()
        ]

    def samples(self) -> list[Samples]:
        """From the prior and from what the latents of training images are like, where there are such."""
        return [one for one in (self.prior_samples(), self.posterior_samples()) if one]

    def prior_samples(self) -> Samples | None:
        """From the prior, at each temperature; None where the model has none."""
        from vae.sample import sample

        if not self.model.generative:
            return None
        sheets = [sample(self.model, range(SAMPLES), self.seed, t)[1] for t in TEMPERATURES]
        return Samples("prior", "From the prior", "p(z)", sheets)

    def posterior_samples(self) -> Samples | None:
        """From a Gaussian mixture fitted to latents of training images; None where those are too few."""
        from flows.mixture import fit_mixture
        from vae.sample import sample_mixture

        mu, logvar = self.fit
        z = mu.astype(np.float64)
        if logvar is not None:
            noise = np.random.default_rng(self.seed).standard_normal(z.shape)
            z += np.exp(logvar.astype(np.float64) / 2) * noise
        components = min(COMPONENTS, len(z) // (2 * z.shape[1] + 2))
        if not components:
            return None
        weights, means, spread = fit_mixture(z, components)
        sheets = [
            sample_mixture(self.model, weights, means, spread * t**2, range(SAMPLES), self.seed)[1]
            for t in TEMPERATURES
        ]
        note = f"{components} Gaussians fitted to the latents of {len(z):,} training images"
        return Samples("posterior", "From the aggregate posterior", note, sheets)

    def interpolations(self) -> list[Film]:
        """Between images of different labels, where there are labels."""
        from vae.edit import interpolate

        films = []
        for a, b in self._couples():
            way = interpolate(self.latents[a], self.latents[b], np.linspace(0, 1, STEPS).tolist())
            captions = [f"{100 * share:.0f} % of the way" for share in np.linspace(0, 1, STEPS)]
            names = [self.name(place) for place in (a, b)]
            ends = self.shown.images[[a, b]]
            films.append(Film(f"{names[0]} → {names[1]}", self.decode(way), captions, ends))
        return films

    def name(self, place: int) -> str:
        """An image's label, or its id where it has none."""
        return self.shown.labels[place] or self.shown.ids[place]

    def _couples(self) -> list[tuple[int, int]]:
        """Pairs of well-reconstructed images, no image twice, of two labels where there are two."""
        better = self.order[len(self.order) // 4 :]
        queue = np.random.default_rng(self.seed).permutation(better).tolist()
        couples: list[tuple[int, int]] = []
        while len(queue) > 1 and len(couples) < WAYS:
            a = queue.pop(0)
            other = [place for place in queue if self.shown.labels[place] != self.shown.labels[a]]
            b = (other or queue)[0]
            queue.remove(b)
            couples.append((a, b))
        return couples

    def edits(self) -> list[Film]:
        """Labels that lie close turned into one another; and brightness, which all images have."""
        from vae.edit import attribute_direction

        mu, labels = self.fit[0], np.array([label or "" for label in self.fitted.labels])
        films = []
        for a, b in close_labels(mu, labels)[: WAYS - 1]:
            rows = (labels == a) | (labels == b)
            direction = attribute_direction(mu[rows], labels[rows] == b)
            films.append(self._edit(f"{a} → {b}", self._of_label(a), direction))
        light = self.fitted.images.reshape(len(mu), -1).mean(1)
        if np.ptp(light):
            direction = attribute_direction(mu, light / light.std())
            films.append(
                self._edit("Brightness, in standard deviations", int(self.order[-1]), 2 * direction, 2.0)
            )
        return films

    def _edit(self, title: str, place: int, direction: np.ndarray, unit: float = 1.0) -> Film:
        from vae.edit import move

        way = move(self.latents[place][None], direction, DEGREES.tolist())[0]
        captions = [f"degree {unit * degree:+.2f}" for degree in DEGREES]
        ends = self.shown.images[[place]]
        return Film(title, self.decode(way), captions, ends, start=int(np.abs(DEGREES).argmin()))

    def _of_label(self, label: str) -> int:
        """The image of a label that stands in the middle of its scores; of all, where none has it."""
        own = [place for place in self.order if self.shown.labels[place] == label]
        return int((own or self.order)[len(own or self.order) // 2])

    def traversals(self, kl_per_dim: list[float] | None) -> list[Traversal]:
        """Each active dimension of a typical latent, three deviations of all latents to either side."""
        from vae.edit import traverse
        from vae.evaluate import ACTIVE_VARIANCE

        mean, spread = self.latents.mean(0), self.latents.std(0)
        weight = spread if kl_per_dim is None else np.asarray(kl_per_dim)
        active = [int(d) for d in np.argsort(-weight)[:DIMENSIONS] if spread[d] ** 2 > ACTIVE_VARIANCE]
        base = self.latents[self.order[len(self.order) // 2]]
        ways = [traverse(base, d, (mean[d] + DEVIATIONS * spread[d]).tolist()) for d in active]
        if not ways:
            return []
        frames = self.decode(np.concatenate(ways)).reshape(len(ways), -1, *self.model.config.image_shape)
        ends = np.cumsum([int(np.prod(level)) for level in self.model.levels])
        return [
            Traversal(
                d,
                int(np.searchsorted(ends, d, side="right")),
                None if kl_per_dim is None else kl_per_dim[d],
                row,
            )
            for d, row in zip(active, frames, strict=True)
        ]

    def map(self, most: int) -> Map:
        """Every image shown, or `most` drawn at random, as points: by PCA, and UMAP where it is installed."""
        from sklearn.decomposition import PCA

        places = np.arange(len(self.latents))
        if len(places) > most:
            places = np.sort(np.random.default_rng(self.seed).permutation(places)[:most])
        z = self.latents[places]
        flat = np.pad(z, ((0, 0), (0, max(0, 2 - z.shape[1]))))
        pca = PCA(2, svd_solver="covariance_eigh" if z.shape[1] <= 1024 else "auto", random_state=0)
        points = {"PCA": pca.fit_transform(flat) if len(flat) > 1 else np.zeros((len(flat), 2))}
        explained = float(pca.explained_variance_ratio_.sum()) if len(flat) > 1 else 0.0
        return Map(places, points | umap(flat), explained)


def encode(model: Model, images: Resident) -> tuple[np.ndarray, np.ndarray | None]:
    """Posterior means and log-variances (N, D), a batch at a time."""
    from vae.encode import Encoder
    from vae.evaluate import slices
    from vae.pixels import rows_at_once

    encoder, mu, logvar = Encoder(model), [], []
    for rows in slices(len(images.images), rows_at_once(model.config)):
        found = encoder.encode(images.images[rows], images.ids[rows])
        mu.append(found.mu)
        logvar += [] if found.logvar is None else [found.logvar]
    return np.concatenate(mu), np.concatenate(logvar) if logvar else None


def close_labels(latents: np.ndarray, labels: np.ndarray) -> list[tuple[str, str]]:
    """Pairs of labels by the distance of their means, the closest first, each label once.

    >>> close_labels(np.array([[0.0], [9.0], [1.0], [5.0]]), np.array(["a", "d", "b", "c"]))
    [('a', 'b'), ('c', 'd')]
    """
    names = [name for name, _ in Counter(labels.tolist()).most_common(COMPARED) if name]
    means = {name: latents[labels == name].mean(0) for name in names}
    names.sort()
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    pairs.sort(key=lambda pair: float(np.linalg.norm(means[pair[0]] - means[pair[1]])))
    chosen: list[tuple[str, str]] = []
    for pair in pairs:
        if not any(name in other for other in chosen for name in pair):
            chosen.append(pair)
    return chosen


def projections() -> list[str]:
    """Those of the map, by what is installed."""
    found = find_spec("umap")
    return ["PCA", "UMAP"] if found and found.origin else ["PCA"]  # without origin: a mere folder named so


def umap(latents: np.ndarray) -> dict[str, np.ndarray]:
    """The points (N, 2) by UMAP, where it is installed and there are neighbours enough."""
    if "UMAP" not in projections() or len(latents) <= 15:  # its own number of neighbours
        return {}
    from umap import UMAP

    return {"UMAP": np.asarray(UMAP(random_state=0).fit_transform(latents))}
