"""A Gaussian mixture fitted to latents: the aggregated posterior, as a prior to sample from.

Legend: N rows, D latent dimensions, U mixture components.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data.tables import open_table, read_latents
from flows.config import Sample
from flows.registry import Located

ROWS = 20_000  # that the mixture is fitted to, at most
FULL = 64  # dimensions up to which components have full covariances
SEED = 0  # of the rows, their draws and the fit: the samples' own seed is another

Mixture = tuple[np.ndarray, np.ndarray, np.ndarray]


def table_key(config: Sample, model: Located) -> dict[str, Any]:
    """What names a mixture in a sample table's key, once the table is known to be this model's."""
    manifest = open_table(config.table)
    job, facts = manifest.table["job"], model.facts()
    if job.get("weights_sha256") != facts["weights"]:
        raise ValueError(
            f"table {config.table} was not encoded with {model.uri}: its latents mean nothing to it; "
            "encode with this model, and give that --table"
        )
    if job["columns"]["dimensions"]:
        raise ValueError(
            f"table {config.table} holds some of the model's latent dimensions (--min-kl): "
            "a sample needs all; encode without, and give that --table"
        )
    return {
        "prior": "mixture",
        "components": config.mixture_components,
        "table": manifest.table["key"],
        "snapshot": manifest.number,
    }


def mixture_of(table: str, components: int) -> Mixture:
    """The mixture of a latent table's training rows (of all rows where none is of that split)."""
    _, mu = read_latents(table)
    _, split = read_latents(table, "split")
    rng = np.random.default_rng(SEED)
    rows = np.flatnonzero(split == "train") if (split == "train").any() else np.arange(len(mu))
    rows = np.sort(rng.permutation(rows)[:ROWS])
    z = mu[rows].astype(np.float64)
    if open_table(table).table["job"]["columns"]["logvar"]:  # a draw of each posterior, not its mean alone
        _, logvar = read_latents(table, "logvar")
        z += np.exp(logvar[rows].astype(np.float64) / 2) * rng.standard_normal(z.shape)
    return fit_mixture(z, components)


def fit_mixture(z: np.ndarray, components: int) -> Mixture:
    """Weights (U,), means (U, D) and covariances (U, D, D), or (U, D) where D is large, of draws (N, D)."""
    from sklearn.mixture import GaussianMixture

    if len(z) < 2 * components:
        raise ValueError(f"{len(z)} rows are too few to fit {components} components: give fewer")
    kind = "full" if z.shape[1] <= FULL else "diag"
    fitted = GaussianMixture(components, covariance_type=kind, reg_covar=1e-4, random_state=SEED).fit(z)
    return fitted.weights_, fitted.means_, fitted.covariances_
