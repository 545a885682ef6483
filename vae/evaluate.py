"""Scores of a model on a whole split: exact means of per-image values, with their standard errors.

Each image's draws are a function of (seed, its id), so the batch size, the chunks over importance samples
and the number of processes change nothing but rounding: `evaluate` parts of a split anywhere, `merge` what
they measured, and `summarize` once.

Legend: N images, B batch, K importance samples, L levels, D latent dimensions, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae import pixels, quality
from vae.model import Inference, Model
from vae.objective import Terms, log_weights, terms
from vae.prior import mixture_log_prob
from vae.random import IdDraws

ACTIVE_VARIANCE = 0.01
"""A unit is active when its posterior mean varies more than this over images (Burda et al. 2016)."""

MIXTURE_LIMIT = 10_000
"""The aggregated posterior is that of the first images of the split, at most this many."""


@dataclass(frozen=True)
class Score:
    """A value over the split and its standard error (None where the value is not a mean)."""

    value: float | list[float]
    stderr: float | list[float] | None


@dataclass(frozen=True)
class Measurements:
    """What a part of a split contributes, as float64 arrays.

    columns: one row an image, (N,) or (N, L). sums: `x` and `x^2` summed over images, (D,) or (C*H*W,).
    latents: z, mean, logvar (N, D) and log_prior (N,) of one draw; empty for models of several levels.
    """

    columns: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    latents: dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """scores: by name, likelihoods in nats. per_image: columns in the order of the ids.

    protocol: what the scores depend on beside the model and the images. measured: what they were made of.
    """

    scores: dict[str, Score]
    per_image: dict[str, np.ndarray]
    protocol: dict[str, Any]
    measured: Measurements


def evaluate(
    model: Model,
    images: np.ndarray,
    ids: Sequence[str | int],
    *,
    seed: int = 0,
    k: int = 64,
    batch_size: int | None = None,
    chunk: int | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score images (N, C, H, W) uint8 by their ids, batch_size images and `chunk` of the k draws at a time.

    However a split is divided over calls, an image's row stays the same. By default batch and chunk are such
    that about a million pixels are decoded at once, for any k.

    Of every model: log_likelihood, mse, psnr (dB), ssim of the reconstruction from the posterior's mean, and
    reconstruction_std, how much a pixel of it varies over the images (root mean square over pixels, in 0..1).
    Of a generative one: elbo, log_likelihood and kl at one draw, kl_per_level, kl_per_dim (closed form
    only), active_units, iw_bound (K = k) and effective_samples (of those k), bits_per_dim of the ELBO
    (8-bit likelihoods), and mutual_information + marginal_kl, the split of the KL (one level only).
    progress is called with how many images are done, of how many.

    Raises:
        ValueError: no images, or images that do not fit the model.
        ArithmeticError: a value that is not finite, named with the id of its image.
    """
    pixels.check(model.config, images)
    if not len(images) or len(images) != len(ids):
        raise ValueError(
            f"{len(images)} images with {len(ids)} ids: evaluation needs one id an image, and an image"
        )
    model = model.to(device or model.device).eval()
    batch_size = batch_size or pixels.rows_at_once(model.config, most=64)
    chunk = chunk or max(1, pixels.rows_at_once(model.config, most=1024) // batch_size)
    parts = []
    for rows in slices(len(images), batch_size):
        progress(rows.start, len(images))
        batch = pixels.tensor(images[rows]).to(model.device)
        parts.append(_measure_batch(model, batch, IdDraws(seed, ids[rows], model.device), k, chunk))
        if rows.start >= MIXTURE_LIMIT:
            parts[-1].latents.clear()
    progress(len(images), len(images))
    whole = merge(parts)
    _require_finite(whole, ids)
    columns = {name: column for name, column in whole.columns.items() if column.ndim == 1}
    return Evaluation(summarize(whole), columns, _protocol(model, len(images), seed, k), whole)


def slices(count: int, size: int) -> list[slice]:
    """The batches of a split, the last one as small as it comes.

    >>> slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def merge(parts: Sequence[Measurements]) -> Measurements:
    """The parts of a split as one, in the order given."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    sums = {name: np.sum([part.sums[name] for part in parts], axis=0) for name in parts[0].sums}
    kept = [part.latents for part in parts if part.latents]
    latents = {
        name: np.concatenate([part[name] for part in kept])[:MIXTURE_LIMIT] for name in parts[0].latents
    }
    return Measurements(columns, sums, latents)


def summarize(whole: Measurements) -> dict[str, Score]:
    """The scores of a split from the measurements of all its images."""
    scores = {name: _mean(column) for name, column in whole.columns.items()}
    count = len(whole.columns["mse"])
    varies = _variance(whole.sums, "reconstruction", count).mean()
    scores["reconstruction_std"] = Score(math.sqrt(varies), None)
    if "kl_per_dim" in whole.sums:
        scores["kl_per_dim"] = _mean_of_sums(whole.sums["kl_per_dim"], whole.sums["kl_per_dim^2"], count)
    if "mean" in whole.sums:
        active = _variance(whole.sums, "mean", count) > ACTIVE_VARIANCE
        scores["active_units"] = Score(float(active.sum()), None)
    if whole.latents:
        scores |= kl_split(**whole.latents)
    return scores


def kl_split(z: np.ndarray, mean: np.ndarray, logvar: np.ndarray, log_prior: np.ndarray) -> dict[str, Score]:
    """The mean KL as mutual_information + marginal_kl (Hoffman & Johnson 2016, *ELBO surgery*).

    With q(z) the mixture of the N posteriors and z_n ~ q(z|x_n):
    I(x; z) = E[log q(z|x) - log q(z)], at most log N;  KL(q(z) || p(z)) = E[log q(z) - log p(z)].
    """
    draws, means, logvars = (torch.from_numpy(part) for part in (z, mean, logvar))
    log_marginal = torch.cat([mixture_log_prob(rows, means, logvars) for rows in draws.split(1024)]).numpy()
    log_posterior = -0.5 * (math.log(2 * math.pi) + logvar + (z - mean) ** 2 * np.exp(-logvar)).sum(1)
    return {
        "mutual_information": _mean(log_posterior - log_marginal),
        "marginal_kl": _mean(log_marginal - log_prior),
    }


@torch.inference_mode()
def _measure_batch(model: Model, batch: Tensor, draws: IdDraws, k: int, chunk: int) -> Measurements:
    """Measure one batch (B, C, H, W) uint8; the ELBO's terms are those of the first of the k draws."""
    seen, target = model.observe(batch, draws)
    at_mean = model.infer(seen, None)
    columns, sums = _reconstruction(at_mean, target), _powers(at_mean.likelihood.mean, "reconstruction")
    if not model.generative:
        columns["log_likelihood"] = terms(at_mean, target).log_likelihood
        return Measurements(_numpy(columns), _numpy(sums), {})
    weights: list[Tensor] = []
    for start in range(0, k, chunk):
        noise = draws.normal("posterior", min(chunk, k - start), model.latent_dim)
        inference = model.infer(seen, noise.transpose(0, 1).flatten(0, 1))
        now = terms(inference, target)
        weights.append(log_weights(inference, now.log_likelihood).unflatten(0, (-1, len(batch))))
        if start == 0:
            columns |= _elbo(now, len(batch), model, inference.likelihood.eight_bit)
            sums |= _moments(inference, at_mean, len(batch))
            latents = _latents(inference, len(batch)) if len(model.levels) == 1 else {}
    columns |= _bound(torch.cat(weights).double())
    return Measurements(_numpy(columns), _numpy(sums), _numpy(latents))


def _reconstruction(at_mean: Inference, target: Tensor) -> dict[str, Tensor]:
    image, mean = target.float() / 255, at_mean.likelihood.mean.float()
    measures = {"mse": quality.mse, "psnr": quality.psnr, "ssim": quality.ssim}
    return {name: compare(image, mean) for name, compare in measures.items()}


def _elbo(now: Terms, batch: int, model: Model, eight_bit: bool) -> dict[str, Tensor]:
    """The first draw of each image is in the first B rows."""
    elbo, kl = now.elbo[:batch], now.kl[:batch]
    columns = {
        "elbo": elbo,
        "log_likelihood": now.log_likelihood[:batch],
        "kl": kl.sum(1),
        "kl_per_level": kl,
    }
    if eight_bit:
        columns["bits_per_dim"] = -elbo / (math.prod(model.config.image_shape) * math.log(2))
    return columns


def _bound(log_w: Tensor) -> dict[str, Tensor]:
    """log_w (K, B) float64 -> L_K and the effective sample size (sum w)^2 / sum w^2, in 1..K."""
    log_sum = torch.logsumexp(log_w, 0)
    effective = torch.exp(2 * log_sum - torch.logsumexp(2 * log_w, 0))
    return {"iw_bound": log_sum - math.log(len(log_w)), "effective_samples": effective}


def _moments(inference: Inference, at_mean: Inference, batch: int) -> dict[str, Tensor]:
    of_kl = {} if inference.kl_per_dim is None else _powers(inference.kl_per_dim[:batch], "kl_per_dim")
    return _powers(at_mean.mean, "mean") | of_kl


def _powers(values: Tensor, name: str) -> dict[str, Tensor]:
    """Sums over the images, of the values and of their squares."""
    rows = values.flatten(1).double()
    return {name: rows.sum(0), f"{name}^2": (rows**2).sum(0)}


def _latents(inference: Inference, batch: int) -> dict[str, Tensor]:
    assert inference.logvar is not None
    assert inference.log_prior is not None
    parts = {"z": inference.z, "mean": inference.mean, "logvar": inference.logvar}
    return {name: part[:batch] for name, part in parts.items()} | {
        "log_prior": inference.log_prior[:batch, 0]
    }


def _numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().cpu().numpy() for name, tensor in tensors.items()}


def _variance(sums: Mapping[str, np.ndarray], name: str, count: int) -> np.ndarray:
    """Of each value over the images; no less than 0, which rounding might make it."""
    return np.maximum(sums[f"{name}^2"] / count - (sums[name] / count) ** 2, 0)


def _mean(column: np.ndarray) -> Score:
    """The mean over rows and its standard error; a list of them where a row has several values."""
    count = len(column)
    error = column.std(0, ddof=1) / math.sqrt(count) if count > 1 else None
    return Score(column.mean(0).tolist(), None if error is None else error.tolist())


def _mean_of_sums(total: np.ndarray, squares: np.ndarray, count: int) -> Score:
    mean = total / count
    if count == 1:
        return Score(mean.tolist(), None)
    variance = np.maximum(squares - count * mean**2, 0) / (count - 1)
    return Score(mean.tolist(), np.sqrt(variance / count).tolist())


def _require_finite(whole: Measurements, ids: Sequence[str | int]) -> None:
    for name, column in whole.columns.items():
        bad = np.flatnonzero(~np.isfinite(column.reshape(len(column), -1)).all(1))
        if len(bad):
            raise ArithmeticError(
                f"{name} is not finite for {len(bad)} images, the first of them {ids[bad[0]]!r}"
            )


def _protocol(model: Model, images: int, seed: int, k: int) -> dict[str, Any]:
    config = model.config
    stated = {"images": images, "seed": seed, "likelihood": config.likelihood, "binarize": config.binarize}
    if model.generative:
        stated |= {"k": k, "mixture_images": min(images, MIXTURE_LIMIT)}
    return stated
