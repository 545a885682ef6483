"""The gate: which version is champion. A record for each version says what was decided, and why.

Both models are scored on the challenger's test images with the same noise, so what is compared is each
image's own difference: far less noisy than the difference of two means.
"""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from data.store import open_store
from flows import promotion, registry
from flows.jobs import job_store, lock, put_record, read_record
from flows.results import Difference, Scores, Verdict

logger = logging.getLogger("vae_flows.gate")
SAME_PROTOCOL = ("likelihood", "binarize", "decode", "split", "dataset", "seed")
CONFIDENCE = 0.95


@task(cache_policy=NO_CACHE)
def gate(
    root: Path,
    name: str,
    version: str,
    challenger: Scores,
    champion: str,
    holder: Scores | None,
    margin: float,
) -> Verdict | None:
    """Judge a version once, and promote it if it won; None if another is champion than the one scored.

    A dataset over its reject limit never comes this far: its ingest fails the run.
    """
    store = open_store(root.resolve() / "registry" / name / "gates")
    logger.info("gate: judging %s version %s", name, version)
    with lock(root, f"gate-{name}"):
        moves = promotion.reconcile(root, name)
        if (record := read_record(store, f"{version}.json")) is None:
            if champion != (registry.champion(name) or ""):
                return None
            verdict = judge(root, version, challenger, champion, holder, margin)
            record = put_record(store, f"{version}.json", verdict.model_dump())
        verdict = Verdict(**record)
        # A kill may have come between the record and the move; a later move must not be undone.
        if verdict.promoted and version not in [move.version for move in moves]:
            promotion.move(root, name, version, verdict.reason, after=len(moves))
            return verdict.model_copy(update={"changed": True})
    return verdict


def judge(
    root: Path,
    version: str,
    challenger: Scores,
    champion: str = "",
    holder: Scores | None = None,
    margin: float = 0.0,
) -> Verdict:
    """Sound first, then surely better on the same images: the interval of the difference above the margin."""

    def verdict(promoted: bool, reason: str, found: Difference | None = None) -> Verdict:
        return Verdict(
            version=version,
            champion=champion,
            promoted=promoted,
            reason=reason,
            margin=margin,
            difference=found,
        )

    if (fault := promotion.unsound(challenger)) is not None:
        return verdict(False, fault)
    if holder is None:
        return verdict(True, "champion already" if champion else "the first sound version")
    if (fault := no_contest(challenger, holder)) is not None:
        return verdict(False, f"no contest: {fault}")
    name = challenger.headline
    diff = paired(per_image(root, challenger, name), per_image(root, holder, name))
    if diff.low > margin:
        return verdict(True, f"test {name} is better than version {champion}'s: {diff}", diff)
    reason = f"test {name} is not surely better than version {champion}'s by more than {margin:g}: {diff}"
    return verdict(False, reason, diff)


def no_contest(challenger: Scores, champion: Scores) -> str | None:
    """Why two scores can't be compared, or None."""
    if challenger.headline != champion.headline:
        return f"it has {challenger.headline}, the champion {champion.headline}"
    for part in SAME_PROTOCOL:
        ours, theirs = challenger.protocol.get(part), champion.protocol.get(part)
        if ours != theirs:
            return f"{part} is {ours!r}, the champion's {theirs!r}"
    if challenger.protocol["images"] < 2:
        return "one test image tells nothing of the spread"
    return None


def per_image(root: Path, scores: Scores, name: str) -> dict[str, float]:
    """A score of each image, by id, as its evaluation committed it."""
    with np.load(io.BytesIO(job_store(root, scores.job).get("per_image.npz"))) as stored:
        return dict(zip(stored["id"].tolist(), stored[name].tolist(), strict=True))


def paired(challenger: dict[str, float], champion: dict[str, float]) -> Difference:
    """The mean of challenger less champion over the same images, with Student's 95 % interval.

    >>> str(paired({"a": 2.0, "b": 3.0, "c": 4.0}, {"a": 1.0, "b": 1.9, "c": 3.1}))
    '+1.000 nats an image (95 % interval 0.752 to 1.248, 3 images)'
    """
    from scipy.special import stdtrit

    if challenger.keys() != champion.keys():
        raise ValueError(f"{len(challenger)} and {len(champion)} images can't be paired: their ids differ")
    differences = np.array([challenger[id] - champion[id] for id in challenger])
    count, mean = len(differences), float(differences.mean())
    error = differences.std(ddof=1) / math.sqrt(count)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2) * error)
    return Difference(mean=mean, low=mean - half, high=mean + half, images=count)
