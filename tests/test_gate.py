"""The gate and the alias it moves: who wins, what is on record, what a kill or a hand in between leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

import vae
from flows import registry
from flows.config import Train
from flows.gate import judge
from flows.results import Scores
from flows.tracking import Run, client
from vae.bundle import to_files
from vae.model import build

NAME = "gated"


def scores(elbo: float, active: float = 5.0, **protocol: Any) -> Scores:
    values = {"elbo": elbo, "active_units": active}
    return Scores(
        job="job",
        model="model",
        snapshot="snapshot",
        scores={name: {"value": value, "stderr": 1.0} for name, value in values.items()},
        protocol={"likelihood": "bernoulli", "split": "test", "dataset": "d", **protocol},
    )


@pytest.mark.parametrize(
    ("challenger", "champion", "promoted", "reason"),
    [
        (scores(-90.0), None, True, "the first sound version"),
        (scores(-90.0), scores(-91.0), True, "-90.000 is better than the champion's -91.000"),
        (scores(-91.0), scores(-91.0), False, "not better"),
        (scores(-92.0), scores(-91.0), False, "not better"),
        (scores(float("nan")), None, False, "the test score is nan"),
        (scores(-90.0, active=0.0), None, False, "collapsed"),
        (scores(-90.0, likelihood="gaussian"), scores(-99.0), False, "no contest: likelihood is 'gaussian'"),
        (scores(-90.0, dataset="other"), scores(-99.0), False, "no contest: dataset"),
    ],
)
def test_judge(challenger: Scores, champion: Scores | None, promoted: bool, reason: str) -> None:
    won, why = judge(challenger, champion)
    assert won is promoted
    assert reason in why


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path
    mlflow.set_tracking_uri(before)


def register(root: Path, seed: int) -> str:
    model = build(vae.FlatConfig(height=8, width=8, channels=1, latent_dim=2), seed)
    bundle = root / str(seed) / "bundle"
    bundle.mkdir(parents=True, exist_ok=True)
    for name, content in to_files(model, {"decode": {}}).items():
        (bundle / name).write_bytes(content)
    run = Run(Train(root=root))
    found = registry.register(run, root, NAME, f"job-{seed}", bundle, {"dataset_digest": "d"})
    run.close("FINISHED")
    return str(found.version)


def versions(root: Path) -> list[tuple[str, str]]:
    return [(move["version"], move["reason"]) for move in registry.history(root, NAME)]


def test_alias_and_history(root: Path) -> None:
    assert registry.champion(NAME) is None
    first, second = register(root, 1), register(root, 2)
    assert register(root, 1) == first, "a job registers one version"
    assert (first, second) == ("1", "2")

    assert registry.promote(root, NAME, first, "won")
    assert registry.champion_uri(NAME) == "models:/gated/1"
    assert registry.pin("models:/gated@champion") == "models:/gated/1"
    assert registry.promote(root, NAME, first, "again"), "promoting the champion changes nothing"
    assert versions(root) == [("1", "won")]

    # Killed between the history and the alias: the next promotion finishes the move first.
    assert registry._append(root, NAME, 2, second, "killed")
    registry.reconcile(root, NAME)
    assert registry.champion(NAME) == second

    # Moved by hand to a version that no record names.
    third = register(root, 3)
    client().set_registered_model_alias(NAME, registry.CHAMPION, third)
    registry.reconcile(root, NAME)
    assert versions(root) == [("1", "won"), ("2", "killed"), ("3", "external")]

    # Two at once: the number is taken by whoever appends first.
    assert not registry._append(root, NAME, 3, first, "late")


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
