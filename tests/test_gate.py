"""The gate and the alias it moves: who wins, what is on record, what a kill or a hand in between leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline import registry_of

import vae
from flows import promotion, registry
from flows.config import Follow, Promote, Rollback, Train
from flows.evaluate import npz
from flows.gate import judge, paired
from flows.jobs import job_store, put_record
from flows.promotion import PromotionLostError
from flows.results import Scores
from flows.tracking import Run, client
from vae.bundle import to_files
from vae.model import build

NAME = "gated"


IDS = [f"{index:03d}" for index in range(50)]
NOISE = np.random.default_rng(0).normal(size=(2, 50))


def scores(elbo: float, active: float = 5.0, bits: float = 3.0, job: str = "job", **protocol: Any) -> Scores:
    values = {"elbo": elbo, "active_units": active, "bits_per_dim": bits}
    return Scores(
        job=job,
        model=f"models:/{NAME}/7",
        snapshot="snapshot",
        scores={name: {"value": value, "stderr": 1.0} for name, value in values.items()},
        protocol={"likelihood": "bernoulli", "split": "test", "dataset": "d", "images": 50, **protocol},
    )


def commit(root: Path, found: Scores, gain: float, spread: float) -> Scores:
    """Put an evaluation on record whose images vary a lot among themselves and a little between models."""
    elbo = -90 + 30 * NOISE[0] + gain + spread * NOISE[1]
    job_store(root, found.job).put_if_absent("per_image.npz", npz(IDS, {"elbo": elbo}))
    put_record(job_store(root, found.job), "scores.json", found.model_dump(mode="json"))
    return found


@pytest.mark.parametrize(
    ("challenger", "champion", "promoted", "reason"),
    [
        (scores(-90.0), None, True, "the first sound version"),
        (scores(float("nan")), None, False, "the test score is nan"),
        (scores(float("-inf")), scores(-99.0), False, "the test score is -inf"),
        (scores(-90.0, active=0.0), None, False, "collapsed"),
        (scores(-90.0, active=0.0), scores(-99.0), False, "collapsed"),
        (scores(-90.0, bits=8.01), None, False, "no better than guessing: 8.01 bits/dim"),
        (scores(-90.0, bits=7.99), None, True, "the first sound version"),
        (scores(-90.0, likelihood="gaussian"), scores(-99.0), False, "no contest: likelihood is 'gaussian'"),
        (scores(-90.0, binarize="sampled"), scores(-99.0), False, "no contest: binarize is 'sampled'"),
        (scores(-90.0, dataset="other"), scores(-99.0), False, "no contest: dataset"),
        (scores(-90.0, images=1), scores(-99.0, images=1), False, "no contest: one test image"),
    ],
)
def test_unsound_and_no_contest(
    tmp_path: Path, challenger: Scores, champion: Scores | None, promoted: bool, reason: str
) -> None:
    verdict = judge(tmp_path, "8", challenger, "7" if champion else "", champion)
    assert verdict.promoted is promoted
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("gain", "spread", "margin", "promoted"),
    [
        (1.0, 1.0, 0.0, True),
        (1.0, 1.0, 0.9, False),
        (0.1, 1.0, 0.0, False),
        (0.0, 0.0, 0.0, False),
        (-1.0, 1.0, 0.0, False),
    ],
)
def test_wins_only_surely(tmp_path: Path, gain: float, spread: float, margin: float, promoted: bool) -> None:
    champion = commit(tmp_path, scores(-90.0, job="old"), 0.0, 0.0)
    challenger = commit(tmp_path, scores(-89.0, job="new"), gain, spread)
    verdict = judge(tmp_path, "8", challenger, "7", champion, margin)
    assert verdict.promoted is promoted, verdict.reason
    assert verdict.champion == "7"
    assert verdict.difference is not None
    assert verdict.difference.low <= verdict.difference.mean <= verdict.difference.high
    assert ("not surely" in verdict.reason) is not promoted


def test_paired_interval_is_students() -> None:
    from scipy.stats import ttest_rel

    ours, theirs = -90 + NOISE[0], -91 + NOISE[1]
    found = paired(dict(zip(IDS, ours, strict=True)), dict(zip(IDS, theirs, strict=True)))
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])
    with pytest.raises(ValueError, match="their ids differ"):
        paired({"a": 1.0}, {"b": 1.0})


@pytest.fixture
def root(tmp_path: Path, prefect_server: str) -> Iterator[Path]:
    with registry_of(tmp_path):
        yield tmp_path


def register(root: Path, seed: int) -> str:
    model = build(vae.FlatConfig(height=8, width=8, channels=1, latent_dim=2), seed)
    bundle = root / str(seed) / "bundle"
    bundle.mkdir(parents=True, exist_ok=True)
    for name, content in to_files(model, {"decode": {}}).items():
        (bundle / name).write_bytes(content)
    run = Run(Train(root=root))
    tags = {"dataset_digest": "d", "evaluation": f"evaluation-{seed}"}
    found = registry.register(run, root, NAME, f"job-{seed}", bundle, tags)
    run.finish()
    return str(found.version)


def moves(root: Path) -> list[tuple[str, str]]:
    return [(move.version, move.kind) for move in promotion.history(root, NAME)]


def test_alias_and_history(root: Path) -> None:
    assert registry.champion(NAME) is None
    first, second = register(root, 1), register(root, 2)
    assert register(root, 1) == first, "a job registers one version"
    assert (first, second) == ("1", "2")

    made = promotion.move(root, NAME, first, "won", after=0)
    assert registry.champion_uri(NAME) == "models:/gated/1"
    assert not promotion.settled(root, NAME, made)
    promotion.settle(root, NAME, made, {"tables": []})

    # Two at once, both decided on the first move: one wins, the other says so.
    promotion.move(root, NAME, second, "better", after=1)
    with pytest.raises(PromotionLostError, match=r"version 2 is champion since .* \(better\)"):
        promotion.move(root, NAME, first, "late", after=1)
    assert registry.champion(NAME) == second

    # Killed between the history and the alias: the next command finishes the move.
    client().set_registered_model_alias(NAME, registry.CHAMPION, first)
    assert promotion.reconcile(root, NAME)[-1].version == second
    assert registry.champion(NAME) == second
    promotion.settle(root, NAME, promotion.history(root, NAME)[-1], {"tables": []})

    # Moved by hand, to another version or back: after a settled move that is nobody's kill.
    client().set_registered_model_alias(NAME, registry.CHAMPION, first)
    promotion.reconcile(root, NAME)
    assert moves(root) == [("1", "promote"), ("2", "promote"), ("1", "external")]
    assert promotion.reigns(promotion.history(root, NAME)) == ["1", "2", "1"]


def test_what_can_not_be_promoted_or_rolled_back(root: Path) -> None:
    with pytest.raises(ValueError, match="no model 'gated' in the registry"):
        promotion.check(Follow(root=root, name=NAME))
    first, second = register(root, 1), register(root, 2)
    sound, collapsed = scores(-90.0, job="evaluation-1"), scores(-90.0, active=0.0, job="evaluation-2")
    with pytest.raises(ValueError, match="has no champion to go back to, and none now"):
        promotion.check(Rollback(root=root, name=NAME))
    with pytest.raises(ValueError, match="no table of 'digits' follows the champion of 'gated'"):
        promotion.check(Follow(root=root, name=NAME, drop="digits"))
    with pytest.raises(ValueError, match="gated/1 has no scores"):
        promotion.check(Promote(root=root, name=NAME, version=first, reason="try"))
    commit(root, sound, 0.0, 0.0)
    commit(root, collapsed, 0.0, 0.0)
    promotion.check(Promote(root=root, name=NAME, version=first, reason="try"))
    with pytest.raises(ValueError, match="gated/2 can't be champion: collapsed"):
        promotion.check(Promote(root=root, name=NAME, version=second, reason="try"))
    with pytest.raises(ValueError, match="no model 'models:/gated/9'"):
        promotion.check(Promote(root=root, name=NAME, version="9", reason="try"))
    with pytest.raises(ValueError, match="no reason given"):
        Promote(root=root, name=NAME, version=first)
    promotion.move(root, NAME, first, "won", after=0)
    with pytest.raises(ValueError, match="to go back to: version 1 is its first"):
        promotion.check(Rollback(root=root, name=NAME))


def test_located_bundle_is_the_one_registered(root: Path) -> None:
    register(root, 1)
    found = registry.locate("models:/gated/1")
    assert (found.name, found.version) == ("gated", "1")
    model = vae.load(found.folder)
    images = np.zeros((1, 1, 8, 8), np.uint8)
    expected = vae.Encoder(vae.load(root / "1" / "bundle")).encode(images, ["x"]).mu
    np.testing.assert_array_equal(vae.Encoder(model).encode(images, ["x"]).mu, expected)
    with pytest.raises(ValueError, match="no model 'models:/gated@champion' in the registry"):
        registry.pin("models:/gated@champion")
