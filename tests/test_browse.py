"""Looking into tables: rows, their images, their neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.browse import images_of, latent_of, nearest_rows, sample_rows
from data.images import DecodePath
from data.sources import open_source
from data.store import open_store
from data.tables import LatentColumns, encode_table, plan_encode, read_latents, write_samples


def encode(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
    """Two pixels as the latent."""
    mu = images[:, 0, 3, 3:5].astype(np.float32) / 16
    return {"mu": mu, "logvar": -mu, "kl": mu.sum(1)}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits in four files."""
    store = open_store(tmp_path_factory.mktemp("latents"))
    job = plan_encode(store, open_source("digits"), DecodePath(), LatentColumns(2), name="digits",
                      weights_sha256="0", shard_rows=500)  # fmt: skip
    return encode_table(job, encode).uri


def test_rows_are_drawn_at_random_and_the_same_again(table: str) -> None:
    rows = sample_rows(table, 20, seed=3)
    assert rows == sample_rows(table, 20, seed=3) != sample_rows(table, 20, seed=4)
    assert len({row["id"] for row in rows}) == 20
    assert set(rows[0]) == {"id", "split", "label", "width", "height", "kl"}
    assert len(sample_rows(table, 10_000)) == 1797


def test_the_nearest_are_those_of_all_files_together(table: str) -> None:
    ids, latents = read_latents(table)
    for place in (0, 700, 1796):
        found = nearest_rows(table, latents[place], 9)
        distances = np.linalg.norm(latents.astype(np.float64) - latents[place], axis=1)
        assert [near.distance for near in found] == pytest.approx(np.sort(distances)[:9].tolist())
        of = dict(zip(ids, distances, strict=True))
        assert all(of[near.row["id"]] == pytest.approx(near.distance) for near in found)
    with pytest.raises(ValueError, match="has latents of 2 dimensions, not 3"):
        nearest_rows(table, np.zeros(3), 1)


def test_a_latent_and_an_image_by_id(table: str, tmp_path: Path) -> None:
    ids, latents = read_latents(table)
    np.testing.assert_array_equal(latent_of(table, ids[900]), latents[900])
    assert latent_of(table, "digits/nine") is None
    found = images_of(table, [ids[900], ids[3], "digits/nine"], tmp_path)
    assert set(found) == {ids[900], ids[3]}
    assert found[ids[900]].shape == (1, 8, 8)
    np.testing.assert_array_equal(found[ids[900]][0, 3, 3:5].astype(np.float32) / 16, latents[900])


def test_the_images_of_a_folder_that_has_lost_one(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((8, 8), ord(name), np.uint8)).save(folder / f"{name}.png")
    path = DecodePath(height=8, width=8, channels=1)
    job = plan_encode(open_store(tmp_path / "latents"), open_source(f"folder:{folder}"), path,
                      LatentColumns(2), name="t", weights_sha256="0")  # fmt: skip
    uri = encode_table(job, encode).uri
    (folder / "b.png").unlink()
    found = images_of(uri, ["a.png", "b.png"], tmp_path)
    assert list(found) == ["a.png"]
    assert (found["a.png"] == ord("a")).all()


def test_a_table_of_samples_holds_its_own_images(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    z = np.zeros((5, 2), np.float32)
    uri = write_samples(
        open_store(tmp_path), lambda at: (z[at], drawn[at]), 5, name="s", key={}, seed=1, dims=2
    ).uri
    rows = sample_rows(uri, 2)
    assert set(rows[0]) == {"id", "index", "seed"}
    for row in rows:
        np.testing.assert_array_equal(images_of(uri, [row["id"]], tmp_path)[row["id"]], drawn[row["index"]])
