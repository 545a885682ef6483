"""The gate: which version is champion. A record for each version says what was decided, and why."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from data.store import open_store
from flows import registry
from flows.jobs import lock, put_record, read_record
from flows.results import Scores, Verdict

logger = logging.getLogger("vae_flows.gate")
SAME_PROTOCOL = ("likelihood", "binarize", "decode", "split", "dataset", "seed")


@task(cache_policy=NO_CACHE)
def gate(root: Path, name: str, version: str, challenger: Scores, holder: Scores | None) -> Verdict:
    """Judge a version once, and promote it if it won."""
    store = open_store(root.resolve() / "registry" / name / "gates")
    logger.info("gate: judging %s version %s", name, version)
    with lock(root, f"gate-{name}"):
        before = registry.champion(name)
        if (record := read_record(store, f"{version}.json")) is None:
            promoted, reason = judge(challenger, holder)
            verdict = Verdict(version=version, champion=before or "", promoted=promoted, reason=reason)
            record = put_record(store, f"{version}.json", verdict.model_dump())
        verdict = Verdict(**record)
        # A kill may have come between the record and the move; a later move must not be undone.
        if verdict.promoted and version not in [move["version"] for move in registry.history(root, name)]:
            registry.promote(root, name, version, verdict.reason)
            return verdict.model_copy(update={"changed": True})
    return verdict


def judge(challenger: Scores, champion: Scores | None) -> tuple[bool, str]:
    """Whether the challenger wins, and why: sound first, then the better mean on the same images."""
    if (fault := unsound(challenger)) is not None:
        return False, fault
    if champion is None:
        return True, "the first sound version"
    if challenger.headline != champion.headline:
        return False, f"no contest: it has {challenger.headline}, the champion {champion.headline}"
    for part in SAME_PROTOCOL:
        ours, theirs = challenger.protocol.get(part), champion.protocol.get(part)
        if ours != theirs:
            return False, f"no contest: {part} is {ours!r}, the champion's {theirs!r}"
    name = challenger.headline
    ours, theirs = challenger.scores[name]["value"], champion.scores[name]["value"]
    better = "better" if ours > theirs else "not better"
    return ours > theirs, f"test {name} {ours:.3f} is {better} than the champion's {theirs:.3f}"


def unsound(challenger: Scores) -> str | None:
    """Why a model can't be champion whatever its rivals, or None."""
    scores = challenger.scores
    value = scores[challenger.headline]["value"]
    if not math.isfinite(value):
        return f"the test score is {value}"
    if "active_units" in scores and scores["active_units"]["value"] == 0:
        return "collapsed: no latent dimension is active"
    return None
