"""Stores: a put is whole and once, on every backend; records know when they are damaged."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from data.store import open_store, seal, unseal


def test_second_put_leaves_the_first(tmp_path: Path) -> None:
    store = open_store(tmp_path / "root")
    assert store.put_if_absent("a/b/c", b"first")
    assert not store.put_if_absent("a/b/c", b"second")
    assert store.get("a/b/c") == b"first"


def test_of_many_writers_one_creates(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    barrier, created = threading.Barrier(8), []

    def put(token: bytes) -> None:
        barrier.wait()
        created.append(store.put_if_absent("claim", token * 100_000))

    threads = [threading.Thread(target=put, args=(bytes([65 + i]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 7 + [True]
    assert len(set(store.get("claim"))) == 1  # whole, of one writer
    assert os.listdir(tmp_path) == ["claim"]


def test_entries_are_relative_and_hide_drafts(tmp_path: Path) -> None:
    store = open_store(tmp_path).child("x")
    store.put_if_absent("b/1", b"1")
    store.put_if_absent("a", b"22")
    (tmp_path / "x" / ".c.0011.tmp").write_bytes(b"half")
    assert sorted((e.path, e.size) for e in store.entries()) == [("a", 2), ("b/1", 1)]
    assert [e.path for e in store.leftovers()] == [".c.0011.tmp"]
    assert store.folders() == ["b"]


@pytest.mark.parametrize("name", ["with space", "100%41", "é", "#1", "a~b*"])
def test_odd_folder_names(tmp_path: Path, name: str) -> None:
    store = open_store(tmp_path / name)
    store.put_if_absent("f", b"1")
    assert open_store(str(tmp_path / name)).get("f") == b"1"
    assert (tmp_path / name / "f").read_bytes() == b"1"


def test_absent_objects(tmp_path: Path) -> None:
    store = open_store(tmp_path / "nothing")
    assert list(store.entries()) == []
    assert store.stat("x") is None
    store.delete("x")
    with pytest.raises(FileNotFoundError, match="no object"):
        store.get("x")
    assert not (tmp_path / "nothing").exists()


def test_memory_store_is_shared_by_name() -> None:
    open_store("memory://shared/a").put_if_absent("x", b"1")
    assert open_store("memory://shared").get("a/x") == b"1"


def test_a_file_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        open_store(tmp_path / "file" / "below").check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write"):
        open_store(tmp_path / "root").check(write=True)


@pytest.mark.parametrize("url", ["s3://", "ftp://x/y"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"no bucket|unknown store"):
        open_store(url)


def test_no_bit_of_a_sealed_record_flips_unseen() -> None:
    data = seal({"rows": 3, "files": [{"path": "é", "sha256": "00"}]})
    for place in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match="damaged"):
            unseal(bytes(flipped))
