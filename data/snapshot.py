"""An immutable ingested dataset: decoded pixels in Parquet, the fingerprint of the content in its path.

Two passes. The first lists the source and hashes what it stores: ids, content, labels, splits and the
decode path make the fingerprint, so the same images give the same one on any machine, and an unchanged
source is known before anything is decoded. The second decodes and commits, shard by shard.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

import blake3
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.batches import Batch, Crew, Resident, rebatch, stream, workers_for
from data.commit import Made, Manifest, Progress, put_manifest, read_manifest, run_shards
from data.files import StoredFile, checked_bytes, read_file
from data.images import LIMITS, DecodePath, Limits, Reject, content_hash, pixel_hash, pixel_hashes
from data.listing import ListingHasher
from data.plan import plan_table
from data.sources import (
    LISTED,
    LISTING,
    RESERVED,
    SPLITS,
    Payload,
    Source,
    assign_splits,
    listed,
    runs,
    with_columns,
)
from data.store import Store, open_store
from data.tables import METADATA, about_table

SHARD_BYTES = 64 * 2**20  # of decoded pixels
DUPLICATES = ("keep", "drop", "fail")
_KEEP_FIRST = {"test": 0, "validation": 1, "train": 2}


@dataclass(frozen=True)
class Snapshot:
    """One ingested dataset, as its manifest says.

    `counts` are images by split; `duplicates` images beyond the first of equal stored bytes, of which
    `dropped` were left out; `leaked` test images whose decoded pixels are also in train. `changed` is
    False when `ingest` found it complete.
    """

    uri: str
    name: str
    fingerprint: str
    source: str
    decode: DecodePath
    rows: int
    counts: dict[str, int]
    rejected: int
    reasons: dict[str, int]
    rejects_uri: str | None
    duplicates: int
    dropped: int
    leaked: int
    files: int
    bytes: int
    manifest: Manifest = field(repr=False, compare=False)
    changed: bool = False


def ingest(
    source: Source,
    decode: DecodePath,
    store: Store,
    *,
    duplicates: str = "keep",
    max_reject_share: float = 0.01,
    limits: Limits = LIMITS,
    progress: Callable[[Progress], None] | None = None,
) -> Snapshot:
    """Bring a source's images to one geometry, in an immutable snapshot `<store>/<name>-<fingerprint>`.

    `duplicates` keeps, drops or fails on images of equal bytes; of those the test split's is kept, then
    validation's, then the first by id. Raises ValueError for bad settings or an empty source before any
    file is written, and TooManyRejectsError over the share, with the reject table left to be read.
    """
    if duplicates not in DUPLICATES:
        raise ValueError(f"unknown duplicates {duplicates!r}: give one of {', '.join(DUPLICATES)}")
    if not 0.0 <= max_reject_share <= 1.0:
        raise ValueError(f"max_reject_share {max_reject_share!r}: give a share of 0 to 1")
    store.check(write=True)
    decode = decode.resolved(source.native)
    scan = _scan(source, limits)
    rows, dropped = _settle_duplicates(scan, duplicates)
    fingerprint = _fingerprint(rows, decode, duplicates)
    about = about_table({"kind": "snapshot", "fingerprint": fingerprint}, _lineage(source, decode))
    folder = store.child(f"{source.name}-{fingerprint}")
    shard_rows = max(256, min(65_536, SHARD_BYTES // math.prod(decode.geometry)))
    plan = plan_table(folder, about, lambda: rows.to_batches(LISTED), shard_rows)
    complete = folder.exists(plan.manifest)
    maker = _Maker(source, decode, about, limits)
    run_shards(plan, maker, source.uri, max_reject_share=max_reject_share, progress=progress)
    if not complete:
        extra = {"duplicates": _repeats(scan).sum().item()}
        put_manifest(plan, dropped=dropped, extra=lambda parts: {**extra, **_summary(folder, parts)})
    return open_snapshot(folder.url, changed=not complete)


def open_snapshot(uri: str, *, changed: bool = False) -> Snapshot:
    """The complete snapshot in a folder; ValueError when there is none."""
    manifest = read_manifest(open_store(uri).check())
    if manifest is None or manifest.table["job"].get("kind") != "snapshot":
        raise ValueError(
            f"no complete snapshot at {uri}: check the path, or run its ingest again to finish it"
        )
    lineage, job = manifest.table["lineage"], manifest.table["job"]
    rejects = PurePosixPath(manifest.rejects[-1].path).parent if manifest.rejects else None
    return Snapshot(
        uri=manifest.store.url,
        name=lineage["name"],
        fingerprint=job["fingerprint"],
        source=lineage["source"],
        decode=DecodePath.from_dict(lineage["decode"]),
        rows=manifest.rows,
        counts=manifest.extra["counts"],
        rejected=manifest.rejected,
        reasons=manifest.reasons,
        rejects_uri=manifest.store.uri(str(rejects)) if rejects else None,
        duplicates=manifest.extra["duplicates"],
        dropped=manifest.dropped,
        leaked=manifest.extra["leaked"],
        files=len(manifest.parts),
        bytes=sum(file.bytes for file in manifest.parts),
        manifest=manifest,
        changed=changed,
    )


def resident(snapshot: Snapshot, split: str | None = None) -> Resident:
    """A split of a snapshot in memory (all of it when None), in order of id.

    Images are uint8 (N, C, H, W). Raises ValueError for a split that has no image.
    """
    count = snapshot.rows if split is None else snapshot.counts.get(split, 0)
    if not count:
        raise ValueError(f"no images in split {split!r} of {snapshot.uri}: it has {snapshot.counts}")
    images = np.empty((count, *snapshot.decode.geometry), np.uint8)
    ids: list[str] = []
    labels: list[str | None] = []
    for file in snapshot.manifest.parts:
        table = read_file(snapshot.manifest.store, file, ["id", "split", "label", "image"])
        chosen = table if split is None else table.filter(pc.equal(table["split"], split))
        block = pixels_of(chosen["image"], snapshot.decode)
        images[len(ids) : len(ids) + len(block)] = block
        ids += chosen["id"].to_pylist()
        labels += chosen["label"].to_pylist()
    return Resident(images, ids, labels)


@dataclass(frozen=True)
class SnapshotSource:
    """A snapshot read back as a source: pixels at its own geometry, its splits as they are."""

    snapshot: Snapshot
    hashed = True
    splits = frozenset(SPLITS)
    _parts: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    @property
    def uri(self) -> str:
        return f"snapshot:{self.snapshot.uri}"

    @property
    def name(self) -> str:
        return self.snapshot.name

    @property
    def native(self) -> tuple[int, int, int]:
        return self.snapshot.decode.geometry

    @cached_property
    def columns(self) -> pa.Schema:
        manifest = self.snapshot.manifest
        schema = pq.read_schema(pa.BufferReader(checked_bytes(manifest.store, manifest.parts[0])))
        return pa.schema([item for item in schema if item.name not in RESERVED])

    def listing(self) -> Iterator[pa.RecordBatch]:
        names = ["id", "split", "label", "content_hash", *self.columns.names]
        for file in self.snapshot.manifest.parts:
            table = read_file(self.snapshot.manifest.store, file, names)
            start = 0
            for batch in table.to_batches(LISTED):
                rows = listed(
                    id=batch["id"],
                    split=batch["split"],
                    label=batch["label"],
                    version=[digest.hex() for digest in batch["content_hash"].to_pylist()],
                    file=[file.path] * batch.num_rows,
                    position=np.arange(start, start + batch.num_rows),
                )
                yield with_columns(rows, [(item, batch[item.name]) for item in self.columns])
                start += batch.num_rows

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        positions = rows["position"].to_numpy()
        blocks = [self._part(path)[positions[a:b]] for path, a, b in runs(rows["file"].to_pylist())]
        pixels = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return pixels.transpose(0, 2, 3, 1)

    def _part(self, path: str) -> np.ndarray:
        """Pixels of one file; the last two are kept, since rows come in the order of the files."""
        with self._lock:
            if path not in self._parts:
                manifest = self.snapshot.manifest
                file = next(file for file in manifest.parts if file.path == path)
                column = read_file(manifest.store, file, ["image"])["image"]
                while len(self._parts) > 1:
                    del self._parts[next(iter(self._parts))]
                self._parts[path] = pixels_of(column, self.snapshot.decode)
            return self._parts[path]


@dataclass(frozen=True)
class _Maker:
    """Makes a shard of a snapshot: decode, and refuse what is no longer what the scan hashed."""

    source: Source
    decode: DecodePath
    about: dict[str, Any]
    limits: Limits

    def __call__(self, rows: pa.Table) -> Made:
        pieces, rejects = [], []
        for batch in stream(self.source, self.decode, 1024, rows=rows.to_batches(), limits=self.limits):
            told = [
                None if text is None else bytes.fromhex(text) for text in batch.rows["version"].to_pylist()
            ]
            same = np.array([now == then for now, then in zip(batch.hashes, told, strict=True)], bool)
            changed = Reject("changed", "its bytes changed while it was ingested", "read")
            rejects += batch.rejects + [
                (key, changed) for key, keep in zip(batch.ids, same, strict=True) if not keep
            ]
            pieces.append(self._table(batch).filter(pa.array(same)))
        return Made(pa.concat_tables(pieces), rejects)

    def _table(self, batch: Batch) -> pa.Table:
        size = math.prod(self.decode.geometry)
        flat = pa.py_buffer(batch.images.tobytes())
        columns = [
            batch.rows["id"],
            pa.array(batch.hashes, pa.binary(16)),
            pa.array(pixel_hashes(batch.images), pa.binary(16)),
            batch.rows["split"],
            batch.rows["label"],
            pa.array(batch.sizes[:, 0], pa.int32()),
            pa.array(batch.sizes[:, 1], pa.int32()),
            *(batch.rows[name] for name in self.source.columns.names),
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(batch.images), [None, flat]),
        ]
        schema = _schema(size, self.source.columns).with_metadata(
            {METADATA: json.dumps(self.about, sort_keys=True)}
        )
        return pa.table(columns, schema=schema)


def _schema(size: int, passed: pa.Schema) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("content_hash", pa.binary(16), nullable=False),
            pa.field("pixel_hash", pa.binary(16), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            *passed,
            pa.field("image", pa.binary(size), nullable=False),  # uint8 (C, H, W)
        ]
    )


def pixels_of(column: pa.ChunkedArray, decode: DecodePath) -> np.ndarray:
    """A column of fixed-size binaries as uint8 (N, C, H, W), without a copy of each."""
    size, blocks = math.prod(decode.geometry), []
    for chunk in column.chunks:
        flat = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        blocks.append(flat.reshape(len(chunk), *decode.geometry))
    return (
        blocks[0]
        if len(blocks) == 1
        else np.concatenate(blocks or [np.empty((0, *decode.geometry), np.uint8)])
    )


def _scan(source: Source, limits: Limits) -> pa.Table:
    """The source's listing with splits assigned, and content hashes as versions (null where unreadable)."""
    batches = []
    crew: Crew[list[str | None]] = Crew(
        lambda chunk: [_item_hash(item) for item in source.read(chunk, limits)],
        lambda row: [None],  # unreadable, as far as can be told: the second pass says why
        limits.max_seconds,
        workers_for(source),
    )
    try:
        for rows in rebatch(source.listing(), LISTED):
            ids, own = rows["id"].to_pylist(), rows["split"].to_pylist()
            splits = pa.array(assign_splits(ids, own, source.splits), pa.string())
            rows = rows.set_column(rows.schema.get_field_index("split"), LISTING.field("split"), splits)
            if not source.hashed:
                parts = crew.results(crew.submit(rows))
                hashes = pa.array([digest for part in parts for digest in part], pa.string())
                rows = rows.set_column(
                    rows.schema.get_field_index("version"), LISTING.field("version"), hashes
                )
            batches.append(rows)
    finally:
        crew.close()
    if not batches:
        raise ValueError(f"no images in {source.uri}")
    return pa.Table.from_batches(batches)


def _item_hash(item: bytes | np.ndarray | Reject) -> str | None:
    if isinstance(item, Reject):
        return None
    return (content_hash(item) if isinstance(item, bytes) else pixel_hash(item)).hex()


def _repeats(rows: pa.Table) -> np.ndarray:
    """bool (N,): True for each image whose bytes an image that goes before it has too.

    The test split goes first, then validation, then train, each in order of id: so where one of two is
    dropped, the held-out splits stay whole.
    """
    rank = np.array([_KEEP_FIRST.get(split, 2) for split in rows["split"].to_pylist()])
    order = np.argsort(rank, kind="stable")
    versions = rows["version"].to_numpy(zero_copy_only=False)
    seen: set[str] = set()
    repeated = np.zeros(len(order), bool)
    for place in order:
        version = versions[place]
        repeated[place] = version is not None and version in seen
        seen.add(version)
    return repeated


def _settle_duplicates(rows: pa.Table, duplicates: str) -> tuple[pa.Table, int]:
    """The rows to ingest, and how many were dropped; ValueError on a duplicate where that was asked."""
    repeated = _repeats(rows)
    if duplicates == "keep" or not repeated.any():
        return rows, 0
    if duplicates == "fail":
        named = rows.filter(pa.array(repeated))["id"].slice(0, 10).to_pylist()
        raise ValueError(
            f"{repeated.sum()} images are copies of others: {', '.join(named)}; remove or drop them"
        )
    return rows.filter(pa.array(~repeated)), int(repeated.sum())


def _fingerprint(rows: pa.Table, decode: DecodePath, duplicates: str) -> str:
    hasher = ListingHasher()
    hasher.update(rows)
    text = json.dumps([hasher.digest(), decode.digest, duplicates])
    return blake3.blake3(text.encode()).hexdigest(length=8)


def _lineage(source: Source, decode: DecodePath) -> dict[str, Any]:
    return {
        "source": source.uri,
        "name": source.name,
        "decode": decode.to_dict(),
        "decode_digest": decode.digest,
    }


def _summary(folder: Store, parts: list[StoredFile]) -> dict[str, Any]:
    """Images by split, and how many test images have the decoded pixels of one in train."""
    counts: Counter[str] = Counter()
    pixels: dict[str, list[np.ndarray]] = {name: [np.empty(0, "V16")] for name in SPLITS}
    for file in parts:
        table = read_file(folder, file, ["split", "pixel_hash"])
        splits = np.array(table["split"].to_pylist())
        hashes = np.frombuffer(b"".join(table["pixel_hash"].to_pylist()), "V16")
        counts.update(splits.tolist())
        for name in SPLITS:
            pixels[name].append(hashes[splits == name])
    train = {digest.tobytes() for digest in np.concatenate(pixels["train"])}
    leaked = sum(digest.tobytes() in train for digest in np.concatenate(pixels["test"]))
    return {"counts": {name: counts[name] for name in SPLITS}, "leaked": leaked}
