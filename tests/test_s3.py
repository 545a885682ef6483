"""Everything on S3, a real server on loopback; tests/faults/s3.py has it behind a bad network."""

from __future__ import annotations

import gzip
import io
import tarfile
import urllib.request
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.images import DecodePath
from data.snapshot import ingest, resident
from data.sources import Source, open_source
from data.store import Store, open_store
from data.tables import (
    LatentColumns,
    TableResult,
    encode_table,
    plan_encode,
    read_latents,
    table_files,
)
from data.upkeep import verify

server = pytest.importorskip("moto.server", reason="moto's server is not installed")

DIMS = 4
PATH = DecodePath(8, 8, 3)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(moto: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a fresh bucket."""
    name = f"b{abs(hash(request.node.name))}"
    urllib.request.urlopen(urllib.request.Request(f"http://{moto}/{name}", method="PUT")).read()
    for key, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{moto}")
    return f"s3://{name}"


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def fill(store: Store, values: range) -> Source:
    for value in values:
        store.put_if_absent(f"{value:04d}.png", png(value))
    return open_source(f"folder:{store.url}")


def encode(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
    mu = images.reshape(len(images), -1)[:, :DIMS].astype(np.float32)
    return {"mu": mu, "logvar": mu, "kl": mu.sum(1)}


def run(source: Source, store: Store) -> TableResult:
    columns = LatentColumns(DIMS)
    job = plan_encode(store, source, PATH, columns, name="toy", weights_sha256="0", shard_rows=10)
    return encode_table(job, encode)


def check(uri: str, count: int) -> None:
    ids, mu = read_latents(uri)
    assert sorted(ids) == [f"{value:04d}.png" for value in range(count)]
    assert np.array_equal(mu[:, 0], [float(key[:4]) for key in ids])
    verify(uri)


def test_put_if_absent(bucket: str) -> None:
    store = open_store(f"{bucket}/pre/fix")
    assert (store.put_if_absent("a/b", b"1"), store.put_if_absent("a/b", b"2")) == (True, False)
    assert store.get("a/b") == b"1"
    assert [entry.path for entry in store.entries()] == ["a/b"]
    assert (store.folders(), store.exists("a"), store.stat("none")) == (["a"], False, None)
    with store.open("a/b") as file:
        assert file.read() == b"1"
    store.delete("a/b")
    assert not store.exists("a/b")


def test_a_missing_bucket_is_one_line(bucket: str) -> None:
    with pytest.raises(ValueError, match="cannot read s3://no-such-bucket") as caught:
        open_source("folder:s3://no-such-bucket/x")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no files in"):
        open_source(f"folder:{bucket}/empty")


def test_encode_from_and_to_s3(bucket: str) -> None:
    images, tables = open_store(f"{bucket}/images"), open_store(f"{bucket}/latents")
    first = run(fill(images, range(25)), tables)
    assert (first.rows, first.shards) == (25, 3)
    check(first.uri, 25)
    assert not run(open_source(f"folder:{images.url}"), tables).changed
    second = run(fill(images, range(25, 28)), tables)
    assert (second.snapshot, second.rows) == (2, 28)
    check(second.uri, 28)


def test_ingest_to_s3_and_encode_the_snapshot(bucket: str) -> None:
    source = fill(open_store(f"{bucket}/images"), range(12))
    snapshot = ingest(source, PATH, open_store(f"{bucket}/snapshots"))
    assert resident(snapshot).images[:, 0, 0, 0].tolist() == list(range(12))
    assert not ingest(source, PATH, open_store(f"{bucket}/snapshots")).changed
    check(run(open_source(f"snapshot:{snapshot.uri}"), open_store(f"{bucket}/latents")).uri, 12)


def test_tar_and_parquet_on_s3(bucket: str) -> None:
    store, archive = open_store(f"{bucket}/packed"), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for value in range(9):
            info = tarfile.TarInfo(f"{value:04d}.png")
            info.size = len(png(value))
            tar.addfile(info, io.BytesIO(png(value)))
    store.put_if_absent("a.tar", archive.getvalue())
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [png(value) for value in range(9)]}), table, row_group_size=4)
    store.put_if_absent("a.parquet", table.getvalue().to_pybytes())
    for kind in ("tar", "parquet"):
        source = open_source(f"{kind}:{store.url}")
        items = [item for rows in source.listing() for item in source.read(rows)]
        assert items == [png(value) for value in range(9)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_on_s3(bucket: str, suffix: str) -> None:
    store, pixels = open_store(f"{bucket}/sets"), np.arange(9 * 8 * 8, dtype=np.uint8).reshape(9, 8, 8)
    header = bytes([0, 0, 8, 3]) + np.array(pixels.shape, ">u4").tobytes()
    labels = bytes([0, 0, 8, 1]) + np.array([9], ">u4").tobytes() + bytes(range(9))
    for name, content in (("images-idx3", header + pixels.tobytes()), ("labels-idx1", labels)):
        content = gzip.compress(content) if suffix else content
        store.put_if_absent(f"kmnist-train-{name}-ubyte{suffix}", content)
        store.put_if_absent(f"other-train-{name}-ubyte{suffix}", content)
    with pytest.raises(ValueError, match="several sets"):
        open_source(f"idx:{store.url}")
    source = open_source(f"idx:{store.url}/kmnist")
    (rows,) = source.listing()
    assert (source.name, source.native, source.uri) == ("kmnist", (1, 8, 8), f"idx:{store.url}/kmnist")
    assert rows["label"].to_pylist() == [str(label) for label in range(9)]
    assert np.array_equal(np.asarray(source.read(rows))[..., 0], pixels)
    with pytest.raises(ValueError, match="no image files in"):
        open_source(f"idx:{bucket}/nothing/here")


def test_other_readers_take_the_files(bucket: str, moto: str) -> None:
    result = run(fill(open_store(f"{bucket}/images"), range(12)), open_store(f"{bucket}/latents"))
    from pyarrow import fs

    remote = fs.S3FileSystem(
        access_key="x", secret_key="y", region="us-east-1", endpoint_override=f"http://{moto}"
    )
    paths = [path.removeprefix("s3://") for path in table_files(result.uri)]
    assert sum(pq.read_table(path, filesystem=remote).num_rows for path in paths) == 12
