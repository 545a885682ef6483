"""Sources: what each kind lists and reads, and the one line it gives when it cannot."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.batches import stream
from data.images import DecodePath, Limits, Reject
from data.sources import Source, assign_splits, escape, limited, open_source, unescape

FASHION = Path("/usr/share/datasets/fashion-mnist")
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 5, 7), np.uint8)


def rows_of(source: Source) -> pa.Table:
    return pa.Table.from_batches(list(source.listing()))


def ids_of(source: Source) -> list[str]:
    return rows_of(source)["id"].to_pylist()


def read_all(source: Source) -> list[bytes | np.ndarray | Reject]:
    return [item for rows in source.listing() for item in source.read(rows)]


def write_idx(path: Path, values: np.ndarray) -> None:
    data = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_set(folder: Path, prefix: str = "", suffix: str = "") -> None:
    for part, chosen in (("train", IMAGES[:20]), ("t10k", IMAGES[20:])):
        write_idx(folder / f"{prefix}{part}-images-idx3-ubyte{suffix}", chosen)
        write_idx(
            folder / f"{prefix}{part}-labels-idx1-ubyte{suffix}", np.arange(len(chosen)).astype(np.uint8)
        )


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits")
    bunch = load_digits()
    pixels = np.concatenate([source.read(rows) for rows in source.listing()])
    assert pixels.shape == (1797, 8, 8, 1)
    assert np.array_equal(np.unique(pixels), np.round(np.arange(17) * 255 / 16).astype(np.uint8))
    assert np.array_equal(pixels[..., 0], np.round(bunch.images * 255 / 16))
    assert rows_of(source)["label"].to_pylist() == [str(label) for label in bunch.target]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_pairs(tmp_path: Path, suffix: str) -> None:
    write_set(tmp_path, suffix=suffix)
    source = open_source(f"idx:{tmp_path}")
    assert source.native == (1, 5, 7)
    assert source.splits == {"train", "test"}
    assert np.array_equal(np.array(read_all(source))[..., 0], np.concatenate([IMAGES[20:], IMAGES[:20]]))
    rows = rows_of(source)
    assert rows["id"][10].as_py() == "train/000000000"
    assert rows["split"].to_pylist() == ["test"] * 10 + ["train"] * 20
    assert rows["label"].to_pylist()[:3] == ["0", "1", "2"]


def test_idx_rows_in_any_order(tmp_path: Path) -> None:
    write_set(tmp_path)
    source = open_source(f"idx:{tmp_path}")
    picked = rows_of(source).take(pa.array([25, 3, 11])).combine_chunks().to_batches()[0]
    expected = np.concatenate([IMAGES[20:], IMAGES[:20]])[[25, 3, 11]]
    assert np.array_equal(np.array(source.read(picked))[..., 0], expected)


def test_emnist_is_turned_upright_and_chosen_by_prefix(tmp_path: Path) -> None:
    write_set(tmp_path, "emnist-letters-", ".gz")
    write_set(tmp_path, "emnist-digits-", ".gz")
    with pytest.raises(ValueError, match=r"several sets .*emnist-digits, emnist-letters"):
        open_source(f"idx:{tmp_path}")
    source = open_source(f"idx:{tmp_path}/emnist-letters")
    assert source.native == (1, 7, 5)
    assert source.name == "emnist-letters"
    assert np.array_equal(np.array(read_all(source))[10, ..., 0], IMAGES[0].T)


@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    source = open_source(f"idx:{FASHION}")
    assert rows_of(source).num_rows == 70_000
    assert source.native == (1, 28, 28)


def test_damaged_idx_files(tmp_path: Path) -> None:
    images = tmp_path / "train-images-idx3-ubyte"
    write_idx(images, IMAGES)
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"has 1065 bytes, its header .* asks for 1066"):
        open_source(f"idx:{tmp_path}")
    images.write_bytes(b"\x00\x00\x0d\x03" + whole[4:])
    with pytest.raises(ValueError, match="no idx file of 3-dimensional uint8"):
        open_source(f"idx:{tmp_path}")
    images.write_bytes(whole)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(7, np.uint8))
    with pytest.raises(ValueError, match=r"has 7 labels, .* has 30 images"):
        open_source(f"idx:{tmp_path}")
    images.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        open_source(f"idx:{tmp_path}")


def make_tree(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path, "PNG")


def test_folder_ids_labels_and_order(tmp_path: Path) -> None:
    make_tree(
        tmp_path, "dog/b.png", "cat/a/deep.png", "cat.png", "cat/z.png", ".hidden/x.png", "cat/.DS_Store"
    )
    rows = rows_of(open_source(f"folder:{tmp_path}"))
    assert rows["id"].to_pylist() == ["cat.png", "cat/a/deep.png", "cat/z.png", "dog/b.png"]
    assert rows["id"].to_pylist() == sorted(rows["id"].to_pylist())
    assert rows["label"].to_pylist() == [None, "cat", "cat", "dog"]
    assert set(rows["split"].to_pylist()) == {None}


def test_folder_with_splits(tmp_path: Path) -> None:
    make_tree(tmp_path, "train/cat/a.png", "test/cat/b.png", "val/dog/c.png")
    source = open_source(f"folder:{tmp_path}")
    rows = rows_of(source)
    assert source.splits == {"train", "test", "validation"}
    assert rows["split"].to_pylist() == ["test", "train", "validation"]
    assert rows["label"].to_pylist() == ["cat", "cat", "dog"]


def test_folder_versions_change_with_the_file(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.png", "b.png")
    before = rows_of(open_source(f"folder:{tmp_path}"))["version"].to_pylist()
    make_tree(tmp_path, "b.png")
    after = rows_of(open_source(f"folder:{tmp_path}"))["version"].to_pylist()
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_links_and_special_files(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    make_tree(root, "good.png", "class/also.png")
    make_tree(outside, "secret.png")
    (root / "in.png").symlink_to("good.png")
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "sneaky.png").symlink_to("class/../../outside/secret.png")
    (root / "folder_out").symlink_to(outside)
    (root / "folder_in").symlink_to("class")
    (root / "nothing.png").symlink_to("gone.png")
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    source = open_source(f"folder:{root}")
    got = dict(zip(ids_of(source), read_all(source), strict=True))
    codes = {key: item.error for key, item in got.items() if isinstance(item, Reject)}
    assert codes == {
        "out.png": "link_outside",
        "sneaky.png": "link_outside",
        "folder_out": "link_outside",
        "folder_in": "link_folder",
        "nothing.png": "missing",
        "loop.png": "unreadable",
        "pipe.png": "not_a_file",
    }
    assert got["in.png"] == got["good.png"]


def test_files_over_the_cap_are_not_read(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.png")
    source = open_source(f"folder:{tmp_path}")
    (item,) = source.read(next(source.listing()), Limits(max_bytes=10))
    assert isinstance(item, Reject)
    assert item.error == "too_many_bytes"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in (b"\xff\xfe.png", b"100%.png", b"\xc3\xa9.png", b"new\nline.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    source = open_source(f"folder:{tmp_path}")
    ids = ids_of(source)
    assert ids == sorted(["%FF%FE.png", "100%25.png", "é.png", "new\nline.png"])
    assert read_all(source) == [unescape(key) for key in ids]


@settings(deadline=None)
@given(st.binary(min_size=1))
def test_every_name_comes_back_from_its_id(name: bytes) -> None:
    assert unescape(escape(name)) == name
    escape(name).encode()


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_tar_shards_with_sidecars(tmp_path: Path) -> None:
    long = "x" * 150
    first = {"b.png": png(1), "b.cls": b"7", "b.txt": "é".encode(), "a.png": png(0), f"{long}.png": png(2)}
    write_tar(tmp_path / "train-000.tar", first)  # type: ignore[arg-type]
    write_tar(tmp_path / "test-000.tar", {"dir/a.png": png(3), "dir/a.cls": b"5"})
    source = open_source(f"tar:{tmp_path}")
    rows = rows_of(source)
    assert rows["id"].to_pylist() == ["test-000/dir/a", "train-000/a", "train-000/b", f"train-000/{long}"]
    assert rows["split"].to_pylist() == ["test", "train", "train", "train"]
    assert rows["label"].to_pylist() == ["5", None, "7", None]
    assert rows["txt"].to_pylist() == [None, None, "é", None]
    assert source.columns.names == ["txt"]
    assert read_all(source) == [png(3), png(0), png(1), png(2)]


def test_bad_tars(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = {"../up.png": png(0), "/root.png": png(1), "link.png": link, "ok.png": png(2), "z.png": png(3)}
    write_tar(tmp_path / "a.tar", members)  # type: ignore[arg-type]
    data = (tmp_path / "a.tar").read_bytes()
    end = data.index(png(3)) + 10
    (tmp_path / "a.tar").write_bytes(data[:end])
    (tmp_path / "b.tar").write_bytes(b"garbage" * 1000)
    source = open_source(f"tar:{tmp_path}")
    got = dict(zip(ids_of(source), read_all(source), strict=True))
    codes = {key: item.error for key, item in got.items() if isinstance(item, Reject)}
    assert codes == {
        "a/../up": "path_outside",
        "a//root": "path_outside",
        "a/link": "not_a_file",
        "a/#end": "truncated",
        "b/#end": "corrupt",
    }
    assert got["a/ok"] == png(2)
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        for value in (4, 5):
            info = tarfile.TarInfo("same.png")
            info.size = len(png(value))
            archive.addfile(info, io.BytesIO(png(value)))
    twice = open_source(f"tar:{tmp_path / 'c.tar'}")
    assert [getattr(item, "error", None) for item in read_all(twice)] == [None, "duplicate_id"]
    assert len(set(ids_of(twice))) == 2


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.tar.gz is compressed: unpack it"):
        open_source(f"tar:{tmp_path}")


def test_parquet_with_hugging_face_images(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "id": datasets.Value("int64"),
        }
    )
    images = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in range(6)]
    rows = {"image": images, "label": [0, 1, 0, 1, 0, 1], "id": list(range(6))}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"), batch_size=2)
    source = open_source(f"parquet:{tmp_path}")
    listed = rows_of(source)
    assert listed["id"][5].as_py() == "train-00000-of-00001/000000005"
    assert listed["label"].to_pylist() == ["cat", "dog"] * 3
    assert listed["source_id"].to_pylist() == list(range(6))
    assert set(listed["split"].to_pylist()) == {"train"}
    reds = [np.asarray(Image.open(io.BytesIO(item)))[0, 0, 0] for item in read_all(source)]  # type: ignore[arg-type]
    assert reds == list(range(6))


def test_parquet_of_plain_bytes(tmp_path: Path) -> None:
    names = {"jpeg": [png(0), None, png(2)], "caption": ["a", "b", "c"], "split": ["train", "test", "valid"]}
    pq.write_table(pa.table(names), tmp_path / "x.parquet", row_group_size=2)
    source = open_source(f"parquet:{tmp_path / 'x.parquet'}")
    listed = rows_of(source)
    assert listed["split"].to_pylist() == ["train", "test", "validation"]
    assert listed["caption"].to_pylist() == ["a", "b", "c"]
    items = read_all(source)
    assert (items[0], items[2]) == (png(0), png(2))
    assert isinstance(items[1], Reject)
    shuffled = listed.take(pa.array([2, 0])).combine_chunks().to_batches()[0]
    assert source.read(shuffled) == [png(2), png(0)]
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"], "c": [1]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"has a \(binary\), b .*int64\); write parquet:.*\?image=COLUMN"):
        open_source(f"parquet:{tmp_path / 'y.parquet'}")
    assert read_all(open_source(f"parquet:{tmp_path / 'y.parquet'}?image=b")) == [b"2"]


def pixel_columns() -> dict[str, pa.Array]:
    """The same images in every way in which a column can hold them."""
    flat = pa.array(IMAGES.reshape(-1))
    rows = pa.ListArray.from_arrays(pa.array(range(0, 30 * 35 + 1, 7), pa.int32()), flat)

    def tensors(*shape: int, order: tuple[int, ...] | None = None) -> pa.Array:
        kind = pa.fixed_shape_tensor(pa.uint8(), shape, permutation=order)
        return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, 35))

    return {
        "tensors": tensors(5, 7),
        "channels last": tensors(5, 7, 1),
        "channels first": tensors(1, 5, 7),
        "permuted": tensors(1, 5, 7, order=(1, 2, 0)),
        "lists": pa.ListArray.from_arrays(pa.array(range(0, 151, 5), pa.int32()), rows),
        "fixed lists": pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 7), 5),
        "python": pa.array(IMAGES.tolist(), pa.list_(pa.large_list(pa.uint8()))),
    }


@pytest.mark.parametrize("form", pixel_columns())
def test_parquet_of_pixels(form: str, tmp_path: Path) -> None:
    table = pa.table({"image": pixel_columns()[form], "label": [str(row) for row in range(30)]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=8)
    source = open_source(f"parquet:{tmp_path}")
    assert source.native == (1, 5, 7)
    listed = rows_of(source).combine_chunks().to_batches()[0]
    whole = source.read(listed)
    assert isinstance(whole, np.ndarray)  # which `read_rows` takes as it is
    assert (whole == IMAGES[..., None]).all()
    picked = [3, 4, 5, 29, 0, 7]
    assert (np.asarray(source.read(listed.take(pa.array(picked)))) == IMAGES[picked][..., None]).all()


def test_pixels_in_parquet_are_read_as_those_of_an_idx_set(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", IMAGES)
    pq.write_table(pa.table({"pixels": pixel_columns()["lists"]}), tmp_path / "train.parquet")
    path = DecodePath(8, 8, 1)
    (arrays,) = stream(open_source(f"idx:{tmp_path}"), path)
    (columns,) = stream(open_source(f"parquet:{tmp_path}"), path)
    assert arrays.hashes == columns.hashes
    assert (arrays.images == columns.images).all()
    assert (arrays.sizes == columns.sizes).all()


def test_pixels_that_are_no_image_are_rejects(tmp_path: Path) -> None:
    kind = pa.list_(pa.list_(pa.list_(pa.uint8())))
    grey, colour = np.full((2, 3, 1), 7, np.uint8), np.full((4, 4, 3), 9, np.uint8)
    odd = [None, [], [[[1], [2]], [[3]]], [[[None]]], np.zeros((5, 5, 4), np.uint8).tolist()]
    values = [grey.tolist(), *odd, colour.tolist()]
    pq.write_table(pa.table({"image": pa.array(values, kind), "n": range(7)}), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}")
    first, *between, last = read_all(source)
    assert (first == grey).all()
    assert (last == colour).all()
    assert [item.error for item in between if isinstance(item, Reject)] == [
        "missing",
        "corrupt",
        "corrupt",
        "corrupt",
        "unsupported_mode",
    ]
    (batch,) = stream(source, DecodePath(4, 4, 3))
    assert len(batch.images) == 2
    assert len(batch.rejects) == 5


def test_hugging_face_arrays_in_parquet(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Array2D((5, 7), "uint8"), "digit": datasets.Value("int8")}
    )
    rows = {"image": list(IMAGES[:4]), "digit": [3, 1, 4, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    source = open_source(f"parquet:{tmp_path}")
    (whole,) = (source.read(rows) for rows in source.listing())
    assert (np.asarray(whole) == IMAGES[:4, ..., None]).all()
    assert rows_of(source)["digit"].to_pylist() == [3, 1, 4, 1]


def test_flat_lists_are_no_images(tmp_path: Path) -> None:
    flat = pa.array(IMAGES.reshape(30, -1).tolist(), pa.list_(pa.uint8()))
    pq.write_table(pa.table({"pixels": flat}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column of images .* pixels \(list<.*uint8.*lists of rows"):
        open_source(f"parquet:{tmp_path}")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_labels_from_a_table_beside(tmp_path: Path, kind: str) -> None:
    make_tree(tmp_path, "a.png", "sub/b.png", "c.png")
    rows = [
        {"file_name": "sub/b.png", "label": "007", "split": "val", "author": "x", "size": 3},
        {"file_name": "a.png", "label": "two", "split": "test", "author": "y", "size": 4},
    ]
    path = tmp_path / f"metadata.{kind}"
    if kind == "csv":
        path.write_text(
            "file_name,label,split,author,size\n"
            + "".join(",".join(map(str, r.values())) + "\n" for r in rows)
        )
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    source = open_source(f"folder:{tmp_path}")
    listed = rows_of(source)
    assert listed["id"].to_pylist() == ["a.png", "c.png", "sub/b.png"]
    assert listed["label"].to_pylist() == ["two", None, "007"]
    assert listed["split"].to_pylist() == ["test", None, "validation"]
    assert listed["author"].to_pylist() == ["y", None, "x"]
    assert listed["source_size"].to_pylist() == [4, None, 3]
    assert source.splits == {"test", "validation"}


def test_label_tables_that_cannot_be_used(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text("label\n1\n")
    with pytest.raises(ValueError, match="has no column file_name"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "labels.csv").write_text("file_name,label\na.png,1\na.png,2\n")
    with pytest.raises(ValueError, match="more than once"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "labels.csv").write_text("file_name,label\na.png,1,2\n")
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("folder:{0}/none", "no folder .*none: check the path"),
        ("folder:{0}/file", "is a file: give the folder"),
        ("folder:{0}/empty", "no files in .*empty"),
        ("folder:", "names no place"),
        ("idx:{0}/none", "no folder .*none"),
        ("idx:{0}/empty", "no image files in"),
        ("snapshot:{0}/empty", "no complete snapshot"),
        ("snapshot:{0}/none", "no complete snapshot"),
        ("{0}/empty", "unknown source .*write folder:"),
        ("tar:{0}/empty", "no .tar files in"),
        ("tar:{0}/none.tar", "no file .*none.tar"),
        ("parquet:{0}/empty", "no .parquet files in"),
        ("parquet:{0}/none", "no folder"),
        ("mnist", "unknown source 'mnist': give one of digits, idx:DIR"),
        ("torchvision:NoSuchSet", "no data set 'NoSuchSet'"),
    ],
)
def test_one_clear_line(tmp_path: Path, uri: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        open_source(uri.format(tmp_path), downloads=tmp_path / "downloads")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_torchvision_reads_what_idx_reads(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in FASHION.glob("*-ubyte*"):
        (raw / file.name.removesuffix(".gz")).write_bytes(
            gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        )
    source = open_source("torchvision:FashionMNIST", downloads=tmp_path)
    mine, theirs = rows_of(open_source(f"idx:{FASHION}")), rows_of(source)
    assert mine.equals(theirs)
    assert source.native == (1, 28, 28)


def test_splits_are_stable_and_of_the_right_size() -> None:
    ids = [f"image-{i}" for i in range(20_000)]
    none = assign_splits(ids, [None] * len(ids), frozenset())
    assert none[:100] == assign_splits(ids[:100], [None] * 100, frozenset())
    shares = {name: none.count(name) / len(ids) for name in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01)
    own = ["test" if i < 5000 else "train" for i in range(len(ids))]
    kept = assign_splits(ids, own, frozenset({"train", "test"}))
    assert kept[:5000] == ["test"] * 5000
    assert kept[5000:].count("validation") / 15_000 == pytest.approx(0.1, abs=0.01)
    assert set(kept[5000:]) == {"train", "validation"}


def test_limit_is_a_stable_subset_of_every_class(tmp_path: Path) -> None:
    digits = open_source("digits")
    few, more = rows_of(limited(digits, 100)), rows_of(limited(digits, 200))
    assert few.num_rows == 100
    assert set(few["id"].to_pylist()) < set(more["id"].to_pylist())
    assert len(set(few["label"].to_pylist())) == 10
    assert rows_of(limited(digits, 5000)).num_rows == 1797
    with pytest.raises(ValueError, match="limit 0"):
        limited(digits, 0)


def test_a_limited_source_keeps_every_split() -> None:
    digits = open_source("digits")
    ids = [key for rows in limited(digits, 500).listing() for key in rows["id"].to_pylist()]
    splits = Counter(assign_splits(ids, [None] * len(ids), digits.splits))
    assert len(ids) == 500
    assert all(splits[name] > 20 for name in ("train", "validation", "test"))
