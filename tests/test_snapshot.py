"""Ingest: an immutable snapshot, its fingerprint in the path, every image accounted for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data.batches import stream
from data.commit import TooManyRejectsError
from data.images import DecodePath
from data.snapshot import Snapshot, ingest, open_snapshot, resident
from data.sources import open_source
from data.store import open_store

PATH = DecodePath(8, 8, 3)
RNG = np.random.default_rng(0)


def noise(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (10, 12, 3), np.uint8)).save(path)
    return root


def take(folder: Path, root: Path, **options: object) -> Snapshot:
    return ingest(open_source(f"folder:{folder}"), PATH, open_store(root), **options)  # type: ignore[arg-type]


def test_digits_round_trip(tmp_path: Path) -> None:
    digits = open_source("digits")
    snapshot = ingest(digits, DecodePath(), open_store(tmp_path))
    assert sum(snapshot.counts.values()) == snapshot.rows == 1797
    assert snapshot.decode.geometry == (1, 8, 8)
    pixels = np.concatenate([np.asarray(digits.read(rows)) for rows in digits.listing()])
    whole = resident(snapshot)
    assert np.array_equal(whole.images, pixels.transpose(0, 3, 1, 2))
    parts = [resident(snapshot, split) for split in ("train", "validation", "test")]
    assert sorted(key for part in parts for key in part.ids) == whole.ids
    with pytest.raises(ValueError, match="no images in split 'dev'"):
        resident(snapshot, "dev")


def test_again_it_is_found(tmp_path: Path) -> None:
    folder = noise(tmp_path / "in", ["a/1.png", "b/2.png"])
    first = take(folder, tmp_path / "out")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = take(folder, tmp_path / "out")
    assert (first.changed, again.changed) == (True, False)
    assert again == open_snapshot(first.uri) and again.uri == first.uri  # noqa: PT018
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == files


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    here = noise(tmp_path / "here" / "set", ["a/1.png", "b/2.png"])
    there = tmp_path / "there" / "set"
    shutil.copytree(here, there)  # other path, other times
    first = take(here, tmp_path / "o1")
    assert take(there, tmp_path / "o2").fingerprint == first.fingerprint
    digest = {path.name: path.read_bytes() for path in Path(first.uri).rglob("part-*")}
    twin = {path.name: path.read_bytes() for path in Path(take(there, tmp_path / "o3").uri).rglob("part-*")}
    assert digest.keys() == twin.keys()
    (there / "a" / "1.png").rename(there / "a" / "one.png")
    assert take(there, tmp_path / "o2").fingerprint != first.fingerprint


def test_growth_is_a_new_snapshot_and_splits_stay(tmp_path: Path) -> None:
    folder = noise(tmp_path / "in", [f"{i}.png" for i in range(40)])
    first = take(folder, tmp_path / "out")
    noise(folder, ["more.png"])
    second = take(folder, tmp_path / "out")
    assert second.uri != first.uri
    before = {key: split for split in first.counts for key in _ids(first, split)}
    after = {key: split for split in second.counts for key in _ids(second, split)}
    assert before.items() < after.items()


def _ids(snapshot: Snapshot, split: str) -> list[str]:
    return resident(snapshot, split).ids if snapshot.counts[split] else []


def test_duplicates_keep_drop_fail(tmp_path: Path) -> None:
    folder = noise(tmp_path / "in", ["train/a.png", "train/b.png", "test/c.png", "val/d.png"])
    shutil.copy(folder / "test/c.png", folder / "train/copy.png")
    shutil.copy(folder / "train/a.png", folder / "train/a2.png")
    kept = take(folder, tmp_path / "out")
    assert (kept.rows, kept.duplicates, kept.dropped, kept.leaked) == (6, 2, 0, 1)
    dropped = take(folder, tmp_path / "out", duplicates="drop")
    assert (dropped.rows, dropped.duplicates, dropped.dropped, dropped.leaked) == (4, 2, 2, 0)
    assert resident(dropped, "test").ids == ["test/c.png"]  # the held-out copy stays
    assert dropped.manifest.rows_in == 6
    with pytest.raises(ValueError, match=r"2 images are copies of others: train/a2.png, train/copy.png"):
        take(folder, tmp_path / "out", duplicates="fail")


def test_leakage_compares_decoded_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8))
    for name in ("train/a.png", "test/b.bmp", "val/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        image.save(tmp_path / "in" / name)
    snapshot = take(tmp_path / "in", tmp_path / "out")
    assert (snapshot.duplicates, snapshot.leaked) == (1, 1)  # a and c are equal files; b only looks the same


def mixed_folder(root: Path) -> dict[str, str | None]:
    """Issue 2's folder: each file's name as an id, with its reject code or None for a good one."""
    noise(root, ["good.png", "good.jpg", "good.webp", "good.bmp", "good.tiff", "good.ppm"])
    whole = (root / "good.jpg").read_bytes()
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.png").touch()
    grey = RNG.integers(0, 256, (10, 12), np.uint8)
    Image.fromarray(grey).convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(root / "deep.png")
    Image.fromarray(grey).quantize(8).save(root / "palette.png")
    frames = [Image.new("L", (10, 12), shade) for shade in (10, 200)]
    frames[0].save(root / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (20, 10)).save(root / "rotated.jpg", exif=exif)
    (root / "notes.txt").write_text("not an image")
    shutil.copy(root / "good.png", root / "wrong.jpg")
    shutil.copy(root / "good.png", os.fsencode(root) + b"/caf\xe9.png")
    bad = {
        "truncated.jpg": "truncated",
        "empty.png": "empty",
        "notes.txt": "not_an_image",
        "wrong.jpg": "wrong_extension",
    }
    good = [path.name for path in root.iterdir() if path.name not in bad and "\udce9" not in path.name]
    return {**dict.fromkeys([*good, "caf%E9.png"]), **bad}


def test_a_folder_of_everything(tmp_path: Path) -> None:
    outcomes = mixed_folder(tmp_path / "in")
    bad = {key: code for key, code in outcomes.items() if code}
    snapshot = take(tmp_path / "in", tmp_path / "out", max_reject_share=0.5)
    assert set(resident(snapshot).ids) == outcomes.keys() - bad.keys()
    assert snapshot.rejected == len(bad)
    assert snapshot.reasons == dict.fromkeys(bad.values(), 1)
    assert snapshot.rejects_uri is not None
    rejects = pd.read_parquet(snapshot.rejects_uri)
    assert dict(zip(rejects["id"], rejects["error"], strict=True)) == bad
    assert set(rejects["source"]) == {f"folder:{tmp_path / 'in'}"}
    table = pd.read_parquet(snapshot.uri).set_index("id")
    assert (table.loc["rotated.jpg", "width"], table.loc["rotated.jpg", "height"]) == (10, 20)
    assert set(table["image"].map(len)) == {3 * 8 * 8}


def test_by_default_it_fails_and_names_them(tmp_path: Path) -> None:
    outcomes = mixed_folder(tmp_path / "in")
    with pytest.raises(TooManyRejectsError) as caught:
        take(tmp_path / "in", tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for key, error in outcomes.items():
        assert (f"{key} ({error})" in message) == (error is not None)
    (folder,) = (tmp_path / "out").glob("*/000001/_rejects")
    assert str(folder) in message
    assert len(pd.read_parquet(folder)) == 4
    snapshot = take(tmp_path / "in", tmp_path / "out", max_reject_share=0.5)  # nothing is decoded again
    assert snapshot.rejected == 4


@pytest.mark.parametrize(
    "options", [{"duplicates": "ignore"}, {"max_reject_share": 1.5}, {"max_reject_share": float("nan")}]
)
def test_bad_settings_leave_nothing(tmp_path: Path, options: dict[str, object]) -> None:
    folder = noise(tmp_path / "in", ["a.png"])
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        take(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_as_root_is_one_line(tmp_path: Path) -> None:
    folder = noise(tmp_path / "in", ["a.png"])
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        take(folder, tmp_path / "out")


def test_a_snapshot_is_a_source(tmp_path: Path) -> None:
    snapshot = ingest(open_source("digits"), DecodePath(), open_store(tmp_path))
    source = open_source(f"snapshot:{snapshot.uri}")
    batches = list(stream(source, snapshot.decode, 100))
    whole = resident(snapshot)
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), whole.images)
    assert [key for batch in batches for key in batch.ids] == whole.ids
    again = ingest(source, DecodePath(), open_store(tmp_path / "again"))
    assert again.counts == snapshot.counts


def test_a_snapshot_of_more_rows_than_a_batch_of_its_listing(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (9_000, 3, 5), np.uint8)
    header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + images.tobytes())
    snapshot = ingest(open_source(f"idx:{tmp_path}"), DecodePath(), open_store(tmp_path / "out"))
    source = open_source(f"snapshot:{snapshot.uri}")
    streamed = np.concatenate([batch.images for batch in stream(source, snapshot.decode, 1000)])
    assert np.array_equal(streamed[:, 0], images)


def test_columns_pass_through_a_snapshot(tmp_path: Path) -> None:
    folder = noise(tmp_path / "in", ["a.png", "b.png"])
    (folder / "metadata.csv").write_text("file_name,label,author,id\na.png,x,ann,7\nb.png,y,bob,8\n")
    snapshot = take(folder, tmp_path / "out")
    source = open_source(f"snapshot:{snapshot.uri}")
    rows = next(source.listing())
    assert rows["author"].to_pylist() == ["ann", "bob"]
    assert rows["source_id"].to_pylist() == ["7", "8"]
    assert resident(snapshot).labels == ["x", "y"]


def test_a_damaged_part_is_never_read(tmp_path: Path) -> None:
    snapshot = ingest(open_source("digits"), DecodePath(), open_store(tmp_path))
    (part,) = Path(snapshot.uri).rglob("part-*.parquet")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 4
    part.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        resident(snapshot)


INGEST = """
import sys
from data.images import DecodePath
from data.snapshot import ingest
from data.sources import open_source
from data.store import open_store
print(ingest(open_source("folder:" + sys.argv[1]), DecodePath(64, 64, 3), open_store(sys.argv[2])).uri)
"""


def test_killed_and_run_again_it_is_as_if_never_stopped(tmp_path: Path) -> None:
    folder = noise(tmp_path / "in", [f"{i:04d}.png" for i in range(600)])
    whole = ingest(open_source(f"folder:{folder}"), DecodePath(64, 64, 3), open_store(tmp_path / "whole"))
    command = [sys.executable, "-c", INGEST, str(folder), str(tmp_path / "killed")]
    for milestone in ("_plan.json", "000001/_plan"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not any((tmp_path / "killed").rglob(milestone.split("/")[-1])):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    uri = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    snapshot = open_snapshot(uri)
    assert snapshot.fingerprint == whole.fingerprint
    mine, theirs = resident(snapshot), resident(whole)
    assert mine.ids == theirs.ids
    assert np.array_equal(mine.images, theirs.images)
