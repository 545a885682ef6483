"""The whole, on real digits: one command, then each step on its own, then everything again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import duckdb
import mlflow
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pipeline import SHORT, registry_of, run, run_json
from sklearn.datasets import load_digits

import vae
from flows.config import Sample
from flows.mixture import table_key
from flows.registry import locate


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def retrained(root: Path) -> dict[str, Any]:
    return run_json("retrain", *SHORT, root=root)


@pytest.fixture(scope="module")
def client(root: Path, retrained: dict[str, Any]) -> Iterator[mlflow.MlflowClient]:
    with registry_of(root) as client:
        yield client


def test_retrain_registers_a_champion(retrained: dict[str, Any], client: mlflow.MlflowClient) -> None:
    version = client.get_model_version_by_alias("vae-digits", "champion")
    assert retrained["model_uri"] == retrained["champion_uri"] == f"models:/vae-digits/{version.version}"
    assert version.run_id == retrained["run_id"]
    assert version.tags["dataset_digest"] == retrained["ingested"]["fingerprint"]
    assert client.get_run(version.run_id).info.status == "FINISHED"


def test_run_holds_parameters_inputs_metrics_and_artifacts(
    retrained: dict[str, Any], client: mlflow.MlflowClient
) -> None:
    run = client.get_run(retrained["run_id"])
    assert run.data.params["training.epochs"] == "4"
    assert run.inputs.dataset_inputs[0].dataset.digest == retrained["ingested"]["fingerprint"]
    assert run.data.metrics["test/elbo"] == retrained["scores"]["scores"]["elbo"]["value"]
    assert run.data.metrics["test/elbo_stderr"] > 0
    validation = client.get_metric_history(run.info.run_id, "validation/elbo")
    assert len(validation) == 4
    assert validation[-1].value > validation[0].value
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"gate.json", "latents.json", "samples.json", "samples.png", "evaluation-test.json"} <= names


def test_latent_table_reads_everywhere(retrained: dict[str, Any]) -> None:
    from datasets import load_dataset

    table = retrained["latents"]
    assert table["rows"] == 1797
    dims = 16
    by_pandas = pd.read_parquet(table["uri"])
    assert len(by_pandas) == 1797
    assert by_pandas["id"].is_unique
    assert np.stack(by_pandas["mu"].to_numpy()).shape == (1797, dims)
    assert set(by_pandas["split"]) == {"train", "validation", "test"}
    assert duckdb.sql(f"SELECT count(DISTINCT id) FROM '{table['files']}'").fetchall() == [(1797,)]
    assert pl.read_parquet(table["files"])["mu"].dtype == pl.Array(pl.Float32, dims)
    loaded = load_dataset("parquet", data_files=table["files"], split="train")
    assert (len(loaded), len(loaded[0]["mu"])) == (1797, dims)


def test_latents_are_those_of_the_model(retrained: dict[str, Any]) -> None:
    model = vae.load(retrained["trained"]["bundle"])
    table = pd.read_parquet(retrained["latents"]["uri"]).sort_values("id")
    digits = np.rint(load_digits().images[:, None] * 255 / 16).astype(np.uint8)
    expected = vae.Encoder(model, "cpu").encode(digits, list(table["id"])).mu
    np.testing.assert_allclose(np.stack(table["mu"].to_numpy()), expected, rtol=1e-4, atol=1e-5)


def test_sample_table_holds_images(retrained: dict[str, Any]) -> None:
    from datasets import load_dataset

    samples = load_dataset("parquet", data_files=retrained["samples"]["files"], split="train")
    assert len(samples) == 16
    assert samples[0]["image"].size == (8, 8)
    assert len(samples[0]["z"]) == 16


def test_again_does_nothing(root: Path, retrained: dict[str, Any], client: mlflow.MlflowClient) -> None:
    runs = len(client.search_runs(["1"]))
    again = run_json("retrain", *SHORT, root=root)
    assert not again["changed"]
    assert again["run_id"] is None
    assert again["latents"]["uri"] == retrained["latents"]["uri"]
    assert len(client.search_runs(["1"])) == runs
    assert len(client.search_model_versions("name = 'vae-digits'")) == 1


def test_each_step_is_a_command(root: Path, tmp_path: Path) -> None:
    ingested = run_json("ingest", "--limit", 500, root=root)
    assert (ingested["rows"], ingested["rejected"], ingested["changed"]) == (500, 0, True)
    source = f"snapshot:{ingested['snapshot']}"
    trained = run_json("train", "--source", source, *SHORT[:4], root=root)
    scores = run_json("evaluate", "--model", trained["bundle"], "--source", source, root=root)
    assert scores["protocol"]["images"] == ingested["counts"]["test"]
    encoded = run_json("encode", "--model", trained["bundle"], "--out", tmp_path / "latents", root=root)
    assert encoded["rows"] == 1797
    assert encoded["uri"].startswith(str(tmp_path / "latents"))
    sampled = run_json("sample", "--model", trained["bundle"], "--count", 7, "--seed", 3, root=root)
    assert sampled["rows"] == 7


def test_encode_keeps_the_dimensions_that_carry_information(
    root: Path, retrained: dict[str, Any], tmp_path: Path
) -> None:
    measured = vae.load(retrained["trained"]["bundle"]).extra["kl_per_dim"]
    limit = sorted(measured)[10]
    chosen = [index for index, kl in enumerate(measured) if kl > limit]
    model = ("--model", "models:/vae-digits@champion")
    few = run_json("encode", *model, "--min-kl", limit, "--out", tmp_path, root=root)
    whole = pd.read_parquet(retrained["latents"]["uri"]).set_index("id")
    part = pd.read_parquet(few["uri"]).set_index("id").loc[whole.index]
    np.testing.assert_array_equal(np.stack(part["mu"]), np.stack(whole["mu"])[:, chosen])
    np.testing.assert_allclose(part["kl"], whole["kl"], rtol=1e-6)
    about = json.loads(pq.read_schema(glob(few["files"])[0]).metadata[b"vae-flows"])
    assert about["job"]["columns"]["dimensions"] == about["lineage"]["dimensions"] == chosen
    assert about["lineage"]["min_kl"] == limit
    sample = Sample(model=retrained["trained"]["bundle"], prior="mixture", table=few["uri"])
    with pytest.raises(ValueError, match="holds some of the model's latent dimensions"):
        table_key(sample, locate(sample.model))


def test_samples_of_a_mixture_fitted_to_the_latents(
    root: Path, retrained: dict[str, Any], tmp_path: Path
) -> None:
    prior = ("--prior", "mixture", "--mixture-components", 8, "--table", retrained["latents"]["uri"])
    model = ("--model", "models:/vae-digits@champion", "--count", 300)
    first = run_json("sample", *model, *prior, "--out", tmp_path / "a", root=root)
    again = run_json("sample", *model, *prior, "--out", tmp_path / "b", root=root)
    assert Path(first["uri"]).name == Path(again["uri"]).name != Path(retrained["samples"]["uri"]).name
    one, other = (pd.read_parquet(table["uri"]).sort_values("index") for table in (first, again))
    assert one["image"].tolist() == other["image"].tolist()
    drawn = np.stack(one["z"])
    rows = pd.read_parquet(retrained["latents"]["uri"])
    spread = np.stack(rows["mu"]).var(0) + np.exp(np.stack(rows["logvar"])).mean(0)
    np.testing.assert_allclose(drawn.mean(0), np.stack(rows["mu"]).mean(0), atol=0.3)
    np.testing.assert_allclose(drawn.var(0), spread, rtol=0.4)


def test_dry_run_of_encode_estimates(root: Path, retrained: dict[str, Any]) -> None:
    planned = run_json("encode", "--model", "models:/vae-digits@champion", "--dry-run", root=root)
    assert planned["estimate"]["images"] == 1797
    assert planned["estimate"]["shards"] == 1
    assert 0.3 < planned["estimate"]["bytes"] / retrained["latents"]["bytes"] < 3


def test_more_images_make_a_new_version_that_starts_from_the_champion(
    tmp_path: Path, prefect_server: str
) -> None:
    images, root = tmp_path / "images", tmp_path / "root"
    write_digits(images, 300)
    size = ("--source", f"folder:{images}", "--height", 8, "--width", 8, "--channels", 1)
    # Long enough that the first version has not collapsed.
    training = ("--epochs", 40, "--batch-size", 32, "--importance-samples", 5, "--count", 4)
    warm = ("--warm-start", "models:/vae-images@champion")
    first = run_json("retrain", *size, *training, *warm, root=root)
    write_digits(images, 400)
    second = run_json("retrain", *size, *training, *warm, root=root)
    assert first["verdict"]["promoted"], first["verdict"]["reason"]
    assert first["ingested"]["fingerprint"] != second["ingested"]["fingerprint"]
    assert (first["version"], second["version"]) == ("1", "2")
    assert second["latents"]["rows"] == 400
    assert "better than version 1's" in second["verdict"]["reason"]
    assert first["trained"]["warm_start"] is None  # there was no champion to start from
    start = second["trained"]["warm_start"]
    assert start["model"] == "models:/vae-images/1"
    assert 0 < start["images"] <= 40 * 300
    with registry_of(root) as client:
        page = Path(client.download_artifacts(second["run_id"], "report.html")).read_text()
    assert f"started from models:/vae-images/1 at a validation ELBO of {start['elbo']:.2f}" in page


def write_digits(folder: Path, count: int) -> None:
    digits = load_digits()
    for index in range(count):
        pixels = np.rint(digits.images[index] * 255 / 16).astype(np.uint8)
        place = folder / str(digits.target[index])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index:04d}.png")


def test_pulled_bundle_loads_and_pyfunc_agrees(
    root: Path, retrained: dict[str, Any], client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    run("pull", "models:/vae-digits@champion", tmp_path / "bundle", root=root)
    images = np.rint(load_digits().images[:5, None] * 255 / 16).astype(np.uint8)
    expected = vae.Encoder(vae.load(tmp_path / "bundle"), "cpu").encode(images, range(5)).mu
    model = mlflow.pyfunc.load_model("models:/vae-digits@champion")
    latents = model.predict(images)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, expected)
    with pytest.raises(mlflow.MlflowException, match=r"\(5, 1, 9, 9\).*\(-1, 1, 8, 8\)"):
        model.predict(np.zeros((5, 1, 9, 9), np.uint8))


def test_registered_model_carries_its_requirements(root: Path, client: mlflow.MlflowClient) -> None:
    folder = mlflow.artifacts.download_artifacts("models:/vae-digits@champion")
    requirements = (Path(folder) / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == {"mlflow", "numpy", "safetensors", "torch"}


def test_interpolation_runs_from_one_reconstruction_to_the_other(
    root: Path, retrained: dict[str, Any], tmp_path: Path
) -> None:
    ends = ("digits/000000003", "digits/000000010")
    model = ("--model", "models:/vae-digits@champion", "--table", retrained["latents"]["uri"])
    way = run_json(
        "interpolate", *ends, *model, "--steps", 5, "--stop", 2, "--picture", tmp_path / "way.png",
        "--out", tmp_path / "tables", root=root,
    )  # fmt: skip
    drawn = pd.read_parquet(way["table"]).sort_values("index")
    latents = pd.read_parquet(retrained["latents"]["uri"]).set_index("id")["mu"]
    at = np.stack(drawn["z"].to_numpy())
    np.testing.assert_allclose(at[0], latents[ends[0]], rtol=1e-6)
    np.testing.assert_allclose(at[2], latents[ends[1]], rtol=1e-6)
    np.testing.assert_allclose(at[4], 2 * at[2] - at[0], rtol=1e-4, atol=1e-5)
    assert Image.open(tmp_path / "way.png").size == (5 * 50, 50)


def test_edit_adds_a_label_by_degree(root: Path, retrained: dict[str, Any], tmp_path: Path) -> None:
    model = ("--model", "models:/vae-digits@champion", "--table", retrained["latents"]["uri"])
    picture = ("--picture", tmp_path / "edit.png")
    edited = run_json("edit", "digits/000000000", "--attribute", 8, *model, *picture, root=root)
    assert "8 +" in edited["notes"][0]
    assert Image.open(tmp_path / "edit.png").size == (7 * 50, 50)
    line = run("edit", "digits/000000000", "--attribute", "dark", *model, *picture, root=root, code=1).stderr
    assert "--attribute 'dark' is no numeric column and no label (0, 1, 2," in line


def test_reconstruct_draws_files_under_their_originals(
    root: Path, retrained: dict[str, Any], tmp_path: Path
) -> None:
    write_digits(tmp_path / "images", 3)
    files = sorted((tmp_path / "images").rglob("*.png"))
    picture = tmp_path / "pairs.png"
    run("reconstruct", *files, "--model", "models:/vae-digits@champion", "--picture", picture, root=root)
    page = np.asarray(Image.open(picture))
    assert page.shape == (2 * 50, 3 * 50)
    original = np.asarray(Image.open(files[0])).repeat(6, 0).repeat(6, 1)
    np.testing.assert_array_equal(page[1:49, 1:49], original)


def test_json_is_all_of_standard_output(root: Path) -> None:
    assert os.environ["PREFECT_API_URL"]
    json.loads(run("ingest", "--json", root=root).stdout)


def write_mess(folder: Path) -> None:
    """Good images of several kinds, and files that are none."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "good.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.png")
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "rotated.jpg", exif=exif)
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes((folder / "good.jpg").read_bytes())
    (folder / "truncated.jpg").write_bytes((folder / "good.jpg").read_bytes()[:600])
    (folder / "empty.png").touch()
    (folder / "notes.jpg").write_text("not an image")


def test_a_messy_folder(tmp_path: Path, prefect_server: str) -> None:
    write_mess(tmp_path / "images")
    command = ("ingest", "--source", f"folder:{tmp_path}/images", "--height", 32, "--width", 32)
    failed = run(*command, root=tmp_path / "root", code=1)
    for name in ("truncated.jpg", "empty.png", "notes.jpg"):
        assert name in failed.stderr.splitlines()[-1]
    done = run_json(*command, "--max-reject-share", 0.5, root=tmp_path / "root")
    assert (done["rows"], done["rejected"]) == (7, 3)
    rejects = pd.read_parquet(done["rejects"]).set_index("id")
    assert set(rejects.index) == {"truncated.jpg", "empty.png", "notes.jpg"}
    kept = pd.read_parquet(done["snapshot"]).set_index("id")
    assert "caf%E9.jpg" in kept.index
    assert kept.loc["rotated.jpg", ["width", "height"]].tolist() == [40, 30]
    assert kept.loc["good.jpg", ["width", "height"]].tolist() == [30, 40]
