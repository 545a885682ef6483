"""Drift: silent on more of the same images, loud on turned, noisy and unknown ones; what an alarm does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pipeline import registry_of, run_json

import vae
from data.sources import open_source
from flows.config import Drift, Encode, Retrain, Train
from flows.drift import drift
from flows.encode import encode
from flows.retrain import retrain
from flows.train import train
from flows.two_samples import Rows, differences, kolmogorov_smirnov, mmd, smallest, verdict

LEVEL = 0.05
MODEL = vae.FlatConfig(height=28, width=28, channels=1, network="mlp", hidden=(128,), latent_dim=8)
SHORT = vae.TrainConfig(epochs=2, batch_size=128)


def pictures(source: Any, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a split, uint8 (N, 1, 28, 28), and their labels."""
    places = np.arange(count)
    return source.parts[part].pixels(places).transpose(0, 3, 1, 2), source.parts[part].labels[:count]


@pytest.fixture(scope="module")
def clothes(fashion_mnist: Path) -> dict[str, np.ndarray]:
    source = open_source(f"idx:{fashion_mnist}")
    train, train_labels = pictures(source, "train", 12_000)
    test, test_labels = pictures(source, "test", 10_000)
    return {"train": train, "train_labels": train_labels, "test": test, "test_labels": test_labels}


def trained(images: np.ndarray) -> vae.Encoder:
    return vae.Encoder(vae.fit(MODEL, SHORT, np.ascontiguousarray(images)).model)


def rows(encoder: vae.Encoder, images: np.ndarray, start: int = 0) -> Rows:
    """What a latent table holds of these images."""
    ids = [f"test/{start + i}" for i in range(len(images))]
    found = encoder.encode(np.ascontiguousarray(images), ids, scores=True)
    return {name: getattr(found, name) for name in ("mu", "kl", "log_likelihood", "elbo")}


def at(table: Rows, places: np.ndarray) -> Rows:
    return {name: column[places] for name, column in table.items()}


@pytest.fixture(scope="module")
def encoder(clothes: dict[str, np.ndarray]) -> vae.Encoder:
    return trained(clothes["train"])


@pytest.fixture(scope="module")
def table(encoder: vae.Encoder, clothes: dict[str, np.ndarray]) -> Rows:
    return rows(encoder, clothes["test"])


def test_at_most_five_of_a_hundred_clean_resamples_raise_an_alarm(table: Rows) -> None:
    rng = np.random.default_rng(0)
    smallest_p = []
    for seed in range(100):
        places = rng.permutation(len(table["elbo"]))
        tests = differences(at(table, places[:500]), at(table, places[500:1000]), seed=seed)
        smallest_p.append(min(smallest(tests).values()))
    alarms = sum(p < LEVEL for p in smallest_p)
    print(f"{alarms} alarms in 100 clean resamples")
    assert alarms <= 5
    # Nor are the tests silent by being too careful: exact ones would give half of all clean samples some
    # p-value below a half, and as they are corrected for their number, a quarter has.
    assert sum(p < 0.5 for p in smallest_p) > 15


def turned(degrees: float) -> Callable[[np.ndarray], np.ndarray]:
    def turn(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image[0]).rotate(degrees, Image.Resampling.BILINEAR))[None]

    return lambda images: np.stack([turn(image) for image in images])


def noisy(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(images: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(0).normal(scale=255 * sigma, size=images.shape)
        return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)

    return spoil


@pytest.mark.parametrize("change", [turned(15), turned(-15), turned(90), noisy(0.1), noisy(0.5)])
def test_changed_images_raise_an_alarm(
    encoder: vae.Encoder,
    table: Rows,
    clothes: dict[str, np.ndarray],
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    new = rows(encoder, change(clothes["test"][500:700]), start=500)
    tests = differences(at(table, np.arange(500)), new)
    p = smallest(tests)
    assert verdict(tests, LEVEL)[0]
    assert p["marginal"] < 1e-3
    assert p["mean"] < LEVEL


@pytest.mark.parametrize("unknown", [1, 8])  # trousers, bags
def test_a_class_held_out_of_training_raises_an_alarm(clothes: dict[str, np.ndarray], unknown: int) -> None:
    encoder = trained(clothes["train"][clothes["train_labels"] != unknown])
    known = clothes["test"][clothes["test_labels"] != unknown]
    reference, same = rows(encoder, known[:2000]), rows(encoder, known[2000:4000], start=2000)
    assert not verdict(differences(reference, same), LEVEL)[0]
    everything = rows(encoder, clothes["test"][5000:7000], start=5000)  # a tenth of them of that class
    assert verdict(differences(reference, everything), LEVEL)[0]


def test_each_test_finds_what_it_is_for_and_scipy_agrees() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 2)), rng.normal(size=(200, 2))
    assert mmd(a, b, permutations=199)[1] > LEVEL
    # A dependence that no single column shows.
    joined = np.stack([b[:, 0], b[:, 0] * 0.9 + b[:, 1] * np.sqrt(1 - 0.81)], 1)
    assert kolmogorov_smirnov(a, joined)[1].min() > LEVEL
    assert mmd(a, joined)[1] == 1 / 1000
    # The MMD by its definition, a kernel at a time.
    both = np.concatenate([a, b])
    squares = ((both[:, None] - both) ** 2).sum(-1)
    kernel = np.exp(-squares / (2 * np.median(squares)))
    square = kernel[:300, :300].mean() + kernel[300:, 300:].mean() - 2 * kernel[:300, 300:].mean()
    np.testing.assert_allclose(mmd(a, b, permutations=1)[0], np.sqrt(square), rtol=1e-4)


def write_idx(folder: Path, images: np.ndarray) -> str:
    """A source of these images, without labels."""
    folder.mkdir()
    header = np.array([0x803, len(images), 28, 28], ">u4").tobytes()
    (folder / "train-images-idx3-ubyte").write_bytes(header + images.tobytes())
    return f"idx:{folder}"


@pytest.fixture(scope="module")
def root(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: str, clothes: dict[str, np.ndarray]
) -> Iterator[Path]:
    """A root with a champion of 2,000 pictures."""
    root = tmp_path_factory.mktemp("drifting")
    source = write_idx(root / "clothes", clothes["train"][:2000])
    settings = {"model": {"hidden": (64,), "latent_dim": 4}, "training": {"epochs": 8}, "count": 4}
    config = Retrain(root=root, source=source, preset="mlp", importance_samples=2, **settings)
    with registry_of(root):
        assert retrain(config).verdict.promoted
        yield root


def alarms_heard(server: str) -> list[dict[str, Any]]:
    """The drift events that Prefect's server has, waiting a little for one on its way."""
    for _ in range(50):
        wanted = {"filter": {"event": {"name": ["vae.drift.detected"]}}}
        found = httpx.post(f"{server}/events/filter", json=wanted, trust_env=False).json()["events"]
        if found:
            return list(found)
        time.sleep(0.2)
    return []


MODEL_URI = "models:/vae-clothes@champion"


def test_more_of_the_same_is_no_drift(root: Path, clothes: dict[str, np.ndarray], tmp_path: Path) -> None:
    source = write_idx(tmp_path / "more", clothes["train"][1000:2600])  # 1,000 known, 600 new
    found = drift(Drift(root=root, model=MODEL_URI, source=source))
    assert (found.drift, found.changed, found.new_rows, found.table is not None) == (False, True, 600, True)
    again = drift(Drift(root=root, model=MODEL_URI, source=source))
    assert (again.changed, again.run_id, again.p) == (False, None, found.p)
    nothing = drift(Drift(root=root, model=MODEL_URI, source=f"idx:{root}/clothes"))
    assert (nothing.drift, nothing.new_rows, nothing.table) == (False, 0, None)


def test_drift_is_told_on_the_terminal_in_a_table_in_mlflow_and_by_an_event(
    root: Path, clothes: dict[str, np.ndarray], tmp_path: Path, prefect_server: str
) -> None:
    source = write_idx(tmp_path / "turned", turned(90)(clothes["train"][2000:2300]))
    found = run_json("drift", "--model", MODEL_URI, "--source", source, root=root)
    assert found["drift"]
    assert "tests differ: " in found["reason"]
    tests = pd.read_parquet(found["table"]).set_index("id")
    assert set(tests.index) == {
        *(
            f"marginal {name}"
            for name in ("mu[0]", "mu[1]", "mu[2]", "mu[3]", "kl", "log_likelihood", "elbo")
        ),
        "mmd",
        "mean elbo",
    }
    assert (tests["p"] < LEVEL).sum() == int(found["reason"].split()[0])
    assert tests.loc["mean elbo", "new_mean"] < tests.loc["mean elbo", "reference_mean"]
    assert mlflow.MlflowClient().get_run(found["run_id"]).data.metrics["drift/alarm"] == 1
    (event,) = alarms_heard(prefect_server)
    assert event["resource"]["prefect.resource.id"] == "vae.model.vae-clothes"
    assert event["payload"]["table"] == found["table"]
    by_table = drift(Drift(root=root, model=MODEL_URI, table=found["new"]))
    assert (by_table.drift, by_table.changed) == (True, False)
    assert len(alarms_heard(prefect_server)) == 1


def test_a_table_of_another_model_or_without_scores_is_refused(root: Path, tmp_path: Path) -> None:
    other = train(Train(root=root, source=f"idx:{root}/clothes", preset="mlp", training={"epochs": 1}))
    plain = encode(Encode(root=root, model=MODEL_URI, source=f"idx:{root}/clothes", limit=50))
    with pytest.raises(ValueError, match=r"has no scores: encode it with --scores"):
        drift(Drift(root=root, model=MODEL_URI, table=plain.uri))
    with pytest.raises(ValueError, match=r"was not encoded by .*: its latents are of another model"):
        drift(Drift(root=root, model=str(other.bundle), table=plain.uri))
    with pytest.raises(ValueError, match=r"no snapshot [0-9a-f]{16}, which .* --reference TABLE"):
        drift(Drift(root=tmp_path, model=MODEL_URI, table=plain.uri))
