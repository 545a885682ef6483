"""Tables: every image exactly once, whatever is killed, added, removed or damaged; read by everyone."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.commit import TooManyRejectsError
from data.files import parquet_bytes, read_file, stored_file
from data.images import DecodePath, Limits
from data.sources import limited, open_source
from data.store import open_store
from data.tables import (
    EncodeJob,
    LatentColumns,
    TableResult,
    encode_shard,
    encode_table,
    finish_encode,
    open_table,
    plan_encode,
    read_latents,
    table_files,
    write_samples,
)
from data.upkeep import gc, list_tables, show, verify

DIMS = 6
PATH = DecodePath(8, 8, 3)


def encode(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
    """A small deterministic model: its latents are the first pixels of each image."""
    mu = images.reshape(len(images), -1)[:, :DIMS].astype(np.float32) / 255
    return {"mu": mu, "logvar": -mu, "kl": mu.sum(1), "kl_levels": mu[:, :2]}


def expected(images: np.ndarray) -> np.ndarray:
    return encode(images, [])["mu"]


def shade(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (value % 256, value // 256, 100)).save(path)


def folder_of(root: Path, values: range) -> Path:
    for value in values:
        shade(root / f"{value:04d}.png", value)
    return root


def plan(folder: Path, root: Path, **options: Any) -> EncodeJob:
    settings: dict[str, Any] = {"name": "toy", "weights_sha256": "00", "shard_rows": 10, "batch_size": 4}
    columns = options.pop("columns", LatentColumns(DIMS))
    decode = options.pop("decode", PATH)
    source = limited(open_source(f"folder:{folder}"), options.pop("limit", None))
    return plan_encode(open_store(root), source, decode, columns, **{**settings, **options})


def run(folder: Path, root: Path, share: float = 0.01, **options: Any) -> TableResult:
    return encode_table(plan(folder, root, **options), encode, max_reject_share=share)


def check(uri: str, folder: Path) -> None:
    """The table holds each good image of the folder once, with its own latents."""
    ids, mu = read_latents(uri)
    names = sorted(path.name for path in folder.iterdir() if path.stat().st_size > 20)
    assert sorted(ids) == names
    shades = np.array([[int(v) % 256, int(v) // 256] for v in (key[:4] for key in ids)])
    first = np.stack([shades[:, 0]] * DIMS, 1) / 255  # the red plane's first pixels
    assert np.allclose(mu, first)
    verify(uri)


def test_every_image_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(37))
    result = run(folder, tmp_path / "out")
    assert (result.rows, result.shards, result.rejected, result.changed) == (37, 4, 0, True)
    check(result.uri, folder)
    again = run(folder, tmp_path / "out")
    assert (again.changed, again.shards_done_before, again.rows) == (False, 4, 37)


@pytest.mark.parametrize("digest", ["blake3", "sha256"])  # the latter as in records of before there were both
def test_a_file_that_changed_is_not_read(digest: str, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    data = parquet_bytes(pa.table({"id": ["a", "b"]}))
    (tmp_path / "part.parquet").write_bytes(data)
    file = stored_file("part.parquet", 2, data)
    file = file if digest == "blake3" else replace(file, blake3="")
    assert read_file(store, file)["id"].to_pylist() == ["a", "b"]
    for place in range(0, len(data), 7):
        flipped = bytes([*data[:place], data[place] ^ 4, *data[place + 1 :]])
        (tmp_path / "part.parquet").write_bytes(flipped)
        with pytest.raises(
            ValueError, match=f"part.parquet is damaged: its {digest} is not that of its record"
        ):
            read_file(store, file)


def test_schema_and_metadata(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in" / "class", range(3)).parent
    columns = LatentColumns(DIMS, levels=((1, 1, 2), (4,)), kl_levels=True)
    result = run(folder, tmp_path / "out", columns=columns, lineage={"model_uri": "models:/toy/3"})
    schema = pq.read_schema(table_files(result.uri)[0])
    assert [f"{item.name} {item.type}" for item in schema] == [
        "id string",
        "source string",
        "content_hash fixed_size_binary[16]",
        "split string",
        "label string",
        "width int32",
        "height int32",
        "mu fixed_size_list<element: float not null>[6]",
        "logvar fixed_size_list<element: float not null>[6]",
        "kl float",
        "kl_levels fixed_size_list<element: float not null>[2]",
    ]
    about = json.loads(schema.metadata[b"vae-flows"])
    assert about["job"]["weights_sha256"] == "00"
    assert about["job"]["decode_digest"] == PATH.digest
    assert about["lineage"]["model_uri"] == "models:/toy/3"
    assert about["key"] in result.uri
    assert {"numpy", "pyarrow", "pillow"} <= about["versions"].keys()


def test_parquet_settings(tmp_path: Path) -> None:
    result = run(folder_of(tmp_path / "in", range(5)), tmp_path / "out")
    group = pq.ParquetFile(table_files(result.uri)[0]).metadata.row_group(0)
    for column in (group.column(i) for i in range(group.num_columns)):
        assert column.compression == "ZSTD"
        if column.path_in_schema.startswith(("mu", "logvar", "kl")):
            assert "BYTE_STREAM_SPLIT" in column.encodings
            assert not column.has_dictionary_page


@pytest.mark.parametrize(
    "other",
    [
        {"weights_sha256": "01"},
        {"decode": DecodePath(8, 8, 3, fit="pad")},
        {"columns": LatentColumns(DIMS, dtype="float16")},
        {"limit": 3},
        {"limits": Limits(max_pixels=99)},
    ],
)
def test_another_key_is_another_table(tmp_path: Path, other: dict[str, Any]) -> None:
    folder = folder_of(tmp_path / "in", range(5))
    assert run(folder, tmp_path / "out").uri != run(folder, tmp_path / "out", **other).uri


def test_float16_and_no_logvar(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(5))
    result = run(
        folder, tmp_path / "out", columns=LatentColumns(DIMS, logvar=False, kl=False, dtype="float16")
    )
    _, mu = read_latents(result.uri)
    assert mu.dtype == np.float16
    assert pd.read_parquet(result.uri).columns.tolist()[-1] == "mu"


def test_rejects_are_rows_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(25))
    (folder / "0007.png").write_bytes(b"")
    (folder / "0013.png").write_bytes(b"no image")
    with pytest.raises(TooManyRejectsError, match=r"of 25 images rejected.*0007.png \(empty\)|0013"):
        run(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="no complete table"):
        open_table(str(next((tmp_path / "out").iterdir())))
    result = run(folder, tmp_path / "out", share=0.1)
    assert (result.rows, result.rejected) == (23, 2)
    assert result.reasons == {"empty": 1, "not_an_image": 1}
    rejects = pd.read_parquet(str(result.rejects_uri))
    assert rejects["id"].tolist() == ["0007.png", "0013.png"]
    check(result.uri, folder)


def test_a_shard_of_rejects_only(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(20))
    for value in range(10):
        (folder / f"{value:04d}.png").write_bytes(b"")
    result = run(folder, tmp_path / "out", share=1.0)
    assert (result.rows, result.rejected) == (10, 10)
    check(result.uri, folder)
    assert len(pd.read_parquet(result.uri)) == 10


def test_added_images_are_appended(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(0, 60, 2))
    first = run(folder, tmp_path / "out")
    old = {path: Path(path).read_bytes() for path in table_files(first.uri)}
    folder_of(folder, range(1, 12, 2))
    seen: list[str] = []

    def counting(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
        seen.extend(ids)
        return encode(images, ids)

    result = encode_table(plan(folder, tmp_path / "out"), counting)
    assert sorted(seen) == [f"{v:04d}.png" for v in range(1, 12, 2)]
    assert (result.uri, result.snapshot, result.rows) == (first.uri, 2, 36)
    assert set(old) < set(table_files(result.uri))
    assert all(Path(path).read_bytes() == data for path, data in old.items())
    check(result.uri, folder)


def test_removed_and_changed_images(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(40))
    run(folder, tmp_path / "out")
    (folder / "0003.png").unlink()
    shade(folder / "0025.png", 25)  # the same pixels at a later time: read again, to be sure
    (folder / "0031.png").write_bytes(b"")
    seen: list[str] = []

    def counting(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
        seen.extend(ids)
        return encode(images, ids)

    job = plan(folder, tmp_path / "out")
    assert open_table(job.plan.store.url).number == 1  # until the new one is complete
    result = encode_table(job, counting, max_reject_share=0.1)
    assert (result.snapshot, result.rows, result.rejected) == (2, 38, 1)
    assert seen == ["0025.png"]
    check(result.uri, folder)
    for value in range(10, 20):
        (folder / f"{value:04d}.png").unlink()
    result = run(folder, tmp_path / "out", share=0.1)
    assert (result.snapshot, result.rows, result.rejected) == (3, 28, 1)
    check(result.uri, folder)


def test_an_unfinished_snapshot_is_built_upon(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(30))
    job = plan(folder, tmp_path / "out")
    encode_shard(job, job.plan.shards[1], encode)
    folder_of(folder, range(30, 33))
    result = run(folder, tmp_path / "out")
    assert result.snapshot == 2
    assert any("/000001/" in file for file in table_files(result.uri))  # the shard done before is not redone
    check(result.uri, folder)


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder for somebody to whom not every file is readable: root becomes nobody for the test."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield Path(folder)
        if os.getuid() == 0:
            os.seteuid(0)


def test_a_file_is_read_once_its_permission_is_given(nobody: Path) -> None:
    """Which changes neither its time nor its size."""
    folder = folder_of(nobody / "in", range(12))
    (folder / "0003.png").chmod(0)
    with pytest.raises(TooManyRejectsError, match=r"1 of 12 images rejected.*0003.png \(unreadable\)"):
        run(folder, nobody / "out")
    assert run(folder, nobody / "out", share=0.1).reasons == {"unreadable": 1}
    (folder / "0003.png").chmod(0o644)
    result = run(folder, nobody / "out")
    assert (result.rows, result.rejected) == (12, 0)
    check(result.uri, folder)


def _work(folder: Path, root: Path) -> None:
    run(folder, root)


def test_processes_share_a_job(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(200))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(folder, tmp_path / "out")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    result = run(folder, tmp_path / "out")
    assert (result.changed, result.snapshot, result.files) == (False, 1, 20)
    check(result.uri, folder)


def test_shards_worked_one_by_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(30))
    job = plan(folder, tmp_path / "out")
    for shard in reversed(job.plan.pending()):
        encode_shard(job, shard, encode)
        encode_shard(job, shard, encode)  # twice does no harm
    check(finish_encode(job).uri, folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (LatentColumns(DIMS + 1), r"mu of shape \(4, 6\), the table has \(4, 7\)"),
        (LatentColumns(DIMS, dtype="float16", logvar=False), "not finite"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, columns: LatentColumns, message: str) -> None:
    folder = folder_of(tmp_path / "in", range(4))

    def huge(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
        return {name: value * 1e9 for name, value in encode(images + 1, ids).items()}

    with (
        pytest.raises(ValueError, match=message),
        np.errstate(over="ignore"),
    ):
        encode_table(plan(folder, tmp_path / "out", columns=columns), huge)


def test_bad_columns() -> None:
    with pytest.raises(ValueError, match="float64"):
        LatentColumns(4, dtype="float64")
    with pytest.raises(ValueError, match="do not add up to 4"):
        LatentColumns(4, levels=((2,), (3,)))


def sample(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z = np.stack([np.random.default_rng(i).standard_normal(DIMS) for i in indices]).astype(np.float32)
    return z, np.repeat(indices.astype(np.uint8), 3 * 4 * 5).reshape(-1, 3, 4, 5)


def test_samples_grow_and_read_as_images(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    settings: dict[str, Any] = {
        "name": "toy",
        "key": {"weights": "00"},
        "seed": 7,
        "dims": DIMS,
        "shard_rows": 8,
    }
    first = write_samples(store, sample, 10, **settings)
    again = write_samples(store, sample, 10, **settings)
    more = write_samples(store, sample, 20, **settings)
    assert (first.rows, again.changed, more.rows, more.uri) == (10, False, 20, first.uri)
    table = pd.concat([pd.read_parquet(file) for file in table_files(more.uri)]).sort_values("index")
    assert table["index"].tolist() == list(range(20))
    assert np.array_equal(np.stack(table["z"]), sample(np.arange(20))[0])

    import datasets

    rows = datasets.load_dataset(
        "parquet", data_files=table_files(more.uri), split="train", cache_dir=str(tmp_path / "hf")
    )
    picture = np.asarray(rows[3]["image"])
    assert picture.shape == (4, 5, 3)
    assert (picture == rows[3]["index"]).all()
    assert rows.features["z"].length == DIMS
    with pytest.raises(ValueError, match="count 0"):
        write_samples(store, sample, 0, **settings)


def test_pandas_polars_duckdb_datasets_and_pyarrow(tmp_path: Path) -> None:
    import datasets
    import duckdb
    import polars

    folder = folder_of(tmp_path / "in", range(25))
    result = run(folder, tmp_path / "out")
    ids, mu = read_latents(result.uri)
    files = table_files(result.uri)

    frame = pd.read_parquet(result.uri)
    assert frame["id"].tolist() == ids.tolist()
    assert np.array_equal(np.stack(frame["mu"]), mu)

    wide = polars.read_parquet(files)
    assert wide["mu"].dtype == polars.Array(polars.Float32, DIMS)
    assert np.array_equal(wide["mu"].to_numpy(), mu)

    rows = duckdb.sql(f"SELECT id, mu FROM '{result.uri}/**/part-*.parquet' ORDER BY id").fetchall()
    assert [row[0] for row in rows] == sorted(ids)
    assert np.array_equal(np.array([row[1] for row in rows], np.float32), mu)

    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded.features["mu"].length == DIMS
    assert np.array_equal(np.array(loaded.with_format("numpy")["mu"][:]), mu)

    assert pq.read_table(result.uri).num_rows == 25


READ_ALONE = """
import os, sys
from data.tables import open_table, read_latents
from data.upkeep import verify

def threads():  # the store's own have a name of theirs, and come and go
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum(not name.startswith("tokio") for name in names)

open_table(sys.argv[1])
before = threads()
read_latents(sys.argv[1]), verify(sys.argv[1])
import pyarrow as pa
import pyarrow.parquet as pq
own = threads() - before
pq.read_table(sys.argv[1])
print(own, threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_reading_leaves_nothing_in_arrows_threads(tmp_path: Path) -> None:
    """Arrow's threads that give Python's bytes back while the interpreter ends abort it, now and then."""
    uri = run(folder_of(tmp_path / "in", range(5)), tmp_path / "out").uri
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", READ_ALONE, uri]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    own, usual = map(int, told.split())
    assert own <= 0
    assert usual > own


def test_another_seed_is_another_table(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(3))
    keys = [plan(folder, tmp_path / "out", **seed).plan.store.url for seed in ({}, {"seed": 0}, {"seed": 1})]
    assert keys[0] == keys[1] != keys[2]


def test_list_show_and_gc(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(20))
    root = tmp_path / "root"
    result = run(folder, root / "latents", lineage={"model_uri": "models:/toy/1"})
    settings: dict[str, Any] = {"name": "toy", "key": {}, "seed": 7, "dims": DIMS}
    write_samples(open_store(root / "samples"), sample, 5, **settings)
    latents, samples = list_tables(str(root))
    assert (latents.kind, latents.rows, latents.snapshot, latents.unfinished) == ("latents", 20, 1, False)
    assert (samples.kind, samples.rows) == ("samples", 5)
    assert show(result.uri).about["lineage"]["model_uri"] == "models:/toy/1"
    assert gc(result.uri).paths == ()
    with pytest.raises(ValueError, match="no table at"):
        show(str(folder))


def test_gc_removes_only_what_no_manifest_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", range(20))
    run(folder, tmp_path / "out")
    folder_of(folder, range(20, 40))
    abandoned = plan(folder, tmp_path / "out")  # snapshot 2, one shard of two done
    encode_shard(abandoned, abandoned.plan.shards[0], encode)
    uri = abandoned.plan.store.url
    assert gc(uri).paths == ()  # it may still be worked on
    assert show(uri).unfinished
    for value in range(20, 40):
        (folder / f"{value:04d}.png").unlink()
    folder_of(folder, range(40, 42))
    result = run(folder, tmp_path / "out")
    assert result.snapshot == 3
    draft = Path(uri) / "000003" / ".part.00.tmp"
    draft.write_bytes(b"half")
    assert {path.split("/")[0] for path in gc(uri, remove=False).paths} == {"000002"}
    os.utime(draft, (0, 0))
    swept = gc(uri, remove=False)
    assert gc(uri) == swept
    assert {path.split("/")[0] for path in swept.paths} == {"000002", "000003"}
    assert not draft.exists()
    assert gc(uri).paths == ()
    check(uri, folder)
    folder_of(folder, range(50, 53))
    check(run(folder, tmp_path / "out").uri, folder)


@pytest.mark.parametrize("at_once", [1_000_000, 5])
def test_duplicates_are_counted_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("data.duplicates.HASHES_AT_ONCE", at_once)
    folder = folder_of(tmp_path / "in", range(30))
    for copy in range(100, 107):
        shutil.copy(folder / "0003.png", folder / f"{copy:04d}.png")
    result = run(folder, tmp_path / "out")
    assert (result.duplicates, show(result.uri).duplicates) == (7, 7)
    shutil.copy(folder / "0004.png", folder / "0200.png")
    assert run(folder, tmp_path / "out").duplicates == 8
    assert run(folder, tmp_path / "out").duplicates == 8


RENAMES = "rename,renameat,renameat2"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_commit_renames_nothing(tmp_path: Path) -> None:
    """A link that is refused where its name exists is the only way to a name: no rename could replace."""
    folder, calls = folder_of(tmp_path / "in", range(12)), tmp_path / "calls"
    code = "import sys, pathlib; from tests.test_tables import run; run(*map(pathlib.Path, sys.argv[1:]))"
    traced = ["strace", "-f", "-qq", "-s", "999", "-o", str(calls), "-e", f"trace={RENAMES},link,linkat"]
    line = [*traced, sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    subprocess.run(line, check=True, cwd=Path(__file__).parents[1])
    ours = [line for line in calls.read_text().splitlines() if str(tmp_path) in line]  # Python renames .pyc
    names = {line.split()[1].partition("(")[0] for line in ours}
    assert names <= {"link", "linkat"}
    assert names
