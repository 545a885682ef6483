"""A dossier in words and numbers, as the page, the model card and Prefect's artifacts tell it."""

from __future__ import annotations

import io
import math
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from flows.dossier import Dossier
from flows.jobs import job_store, read_record
from flows.results import Scores, Trained

PROGRAMS = ("vae-flows", "torch", "numpy", "mlflow", "prefect", "plotly")
STAGES = ("ingest", "train", "evaluate", "encode", "sample")


class Measure(NamedTuple):
    """A score as people know it: its unit, and whether more is better (None where neither is)."""

    key: str
    name: str
    unit: str
    more: bool | None
    sign: int = 1


MEASURES = (
    Measure("elbo", "ELBO", "nats", True),
    Measure("log_likelihood", "Reconstruction, log-likelihood", "nats", True),
    Measure("kl", "KL", "nats", None),
    Measure("iw_bound", "NLL", "nats", False, -1),
    Measure("bits_per_dim", "Bits/dim of the ELBO", "bits", False),
    Measure("mse", "Mean squared error", "", False),
    Measure("psnr", "PSNR", "dB", True),
    Measure("ssim", "SSIM", "", True),
    Measure("active_units", "Active units", "", None),
    Measure("mutual_information", "Mutual information of image and latent", "nats", None),
    Measure("marginal_kl", "KL of aggregate posterior and prior", "nats", None),
)
HEADLINES = ("elbo", "kl", "iw_bound", "bits_per_dim")
HEADLINES_OF_AUTOENCODER = ("log_likelihood", "mse", "psnr", "ssim")


def number(value: float | None, error: float | None = None) -> str:
    """A value, to the second digit of its standard error.

    >>> number(-1917.114, 5.28), number(3.5283, 0.00972), number(0.5), number(32.0)
    ('−1917.1 ± 5.3', '3.5283 ± 0.0097', '0.5', '32')
    """
    if value is None:
        return "–"
    if not error or not math.isfinite(error):
        return f"{value:.6g}".replace("-", "−")
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def rows(dossier: Dossier) -> list[dict[str, Any]]:
    """Each score beside the rival's on the same images, and the mean difference of the images."""
    mine = per_image(dossier, dossier.scores)
    theirs = per_image(dossier, dossier.rival) if dossier.rival else {}
    return [
        {
            "name": measure.name,
            "unit": measure.unit,
            "own": _score(measure, dossier.scores),
            "rival": _score(measure, dossier.rival) if dossier.rival else None,
            "difference": _difference(measure, mine, theirs),
            "better": {True: "higher is better", False: "lower is better", None: ""}[measure.more],
        }
        for measure in MEASURES
        if measure.key in dossier.scores.scores
    ]


def headlines(dossier: Dossier) -> list[dict[str, str]]:
    """The scores that stand on top."""
    keys = HEADLINES if "elbo" in dossier.scores.scores else HEADLINES_OF_AUTOENCODER
    chosen = [m for key in keys for m in MEASURES if m.key == key and key in dossier.scores.scores]
    return [
        {
            "name": measure.name.split(",")[0].split(" of")[0],
            "value": value,
            "error": f"± {error}" if error else "",
            "unit": measure.unit,
        }
        for measure in chosen
        for value, _, error in [_score(measure, dossier.scores).partition(" ± ")]
    ]


def per_image(dossier: Dossier, scores: Scores) -> dict[str, np.ndarray]:
    """The terms of each image, (N,) each, and the ids, as the evaluation committed them."""
    with np.load(io.BytesIO(job_store(dossier.root, scores.job).get("per_image.npz"))) as stored:
        return dict(stored)


def _score(measure: Measure, scores: Scores | None) -> str:
    if scores is None or measure.key not in scores.scores:
        return "–"
    one = scores.scores[measure.key]
    return number(one["value"] * measure.sign, one["stderr"])


def _difference(measure: Measure, mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str:
    """The mean over images of this model less the rival, with its standard error."""
    if measure.key not in mine or measure.key not in theirs:
        return "–"
    if len(mine["id"]) < 2 or not np.array_equal(mine["id"], theirs["id"]):
        return "–"
    each = measure.sign * (mine[measure.key] - theirs[measure.key])
    value = number(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))))
    return value if value.startswith("−") else f"+{value}"


def stages(dossier: Dossier) -> list[dict[str, str]]:
    """Seconds and images/s of each step of the run that made the model, and what it spent most on."""
    metrics = dossier.run.metrics if dossier.run else {}
    found = []
    for stage in STAGES:
        if (seconds := metrics.get(f"time/{stage}_seconds")) is None:
            continue
        shares = {
            name.rsplit("_", 1)[1]: value
            for name, value in metrics.items()
            if name.startswith(f"time/{stage}_share_")
        }
        spent = ", ".join(
            f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda s: -s[1])
        )
        rate = f"{metrics[f'time/{stage}_per_second']:,.0f}"
        found.append({"name": stage, "seconds": f"{seconds:,.1f}", "rate": rate, "spent": spent})
    return found


def warm_start(dossier: Dossier) -> str:
    """The model that training started from, and what that saved; '' where it started from scratch."""
    trained = read_record(job_store(dossier.root, dossier.home), "trained.json")
    start = Trained(**trained).warm_start if trained else None
    return str(start) if start else ""


def verdict(dossier: Dossier) -> tuple[str, str]:
    """(promoted, kept back or not judged; why) in a word and a line."""
    if dossier.verdict is None:
        return "Not judged", "no gate has compared this model with a champion"
    return "Promoted" if dossier.verdict.promoted else "Not promoted", dossier.verdict.reason


def standing(dossier: Dossier) -> str:
    """Who is champion now, in a line."""
    if not dossier.moves:
        return ""
    last = dossier.moves[-1]
    who = "This version" if last.version == dossier.model.version else f"Version {last.version}"
    return f"{who} is champion since {last.at.replace('T', ' ').replace('Z', ' UTC')} ({last.reason})."


def commands(dossier: Dossier) -> list[tuple[str, str]]:
    """What to type to make it again, and to use it."""
    uri = dossier.model.uri
    made = [("train it again, with these settings as config.toml", "vae-flows retrain --config config.toml")]
    return [
        *(made if dossier.config_toml else []),
        ("draw this page again", f"vae-flows report {uri} --out report.html"),
        ("encode images with it", f"vae-flows encode --model {uri} --source {dossier.ingested.source}"),
        ("have it as a folder", f"vae-flows pull {uri} ./model"),
    ]


def context(dossier: Dossier) -> dict[str, Any]:
    """What the page's template says in words and numbers."""
    decided, why = verdict(dossier)
    return {
        "dossier": dossier,
        "decided": decided,
        "why": why,
        "standing": standing(dossier),
        "headlines": headlines(dossier),
        "scores": rows(dossier),
        "stages": stages(dossier),
        "warm_start": warm_start(dossier),
        "commands": commands(dossier),
        "versions": {name: version(name) for name in PROGRAMS},
    }
