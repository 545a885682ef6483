"""Looking after tables: what is there, whether it is intact, and what can be removed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.commit import Manifest, read_manifest
from data.files import StoredFile, check_digest, checked_bytes, parquet_table
from data.plan import Plan, Record, latest_plan, plan_rows, read_plan, read_record, snapshot_numbers
from data.store import Store, open_store, unseal
from data.tables import open_table

DRAFT_AGE = 3600.0  # seconds after which a file on its way to its name is no longer anyone's


@dataclass(frozen=True)
class TableInfo:
    """One table: its kind and key, its current snapshot (0 when none is complete), and if work is left.

    `duplicates` are images with the bytes of another one; None in a table that has no images.
    """

    uri: str
    kind: str
    key: str
    snapshot: int
    rows: int
    rejected: int
    duplicates: int | None
    files: int
    bytes: int
    unfinished: bool
    about: dict[str, Any]


@dataclass(frozen=True)
class Swept:
    """What `gc` removed, or would: paths in the table, and their bytes."""

    paths: tuple[str, ...]
    bytes: int


def list_tables(uri: str) -> list[TableInfo]:
    """Every table (latents, samples, snapshots) under a root or a folder of tables, by path."""
    return [show(store.url) for store in _tables(open_store(uri).check(), 2)]


def show(uri: str) -> TableInfo:
    """What a table is and what made it; ValueError where there is none."""
    store = open_store(uri).check()
    about = read_about(store)
    manifest, plan = read_manifest(store), latest_plan(store)
    return TableInfo(
        uri=store.url,
        kind=about["job"]["kind"],
        key=about["key"],
        snapshot=manifest.number if manifest else 0,
        rows=manifest.rows if manifest else 0,
        rejected=manifest.rejected if manifest else 0,
        duplicates=manifest.extra.get("duplicates") if manifest else None,
        files=len(manifest.parts) if manifest else 0,
        bytes=sum(file.bytes for file in manifest.parts) if manifest else 0,
        unfinished=plan is not None and (manifest is None or plan.number > manifest.number),
        about=about,
    )


def read_about(store: Store) -> dict[str, Any]:
    """What made the table in a store's folder; ValueError where there is none."""
    if not store.exists("_table.json"):
        raise ValueError(f"no table at {store.url}: check the path")
    return unseal(store.get("_table.json"), store.uri("_table.json"))


def verify(uri: str) -> Manifest:
    """Check all of a table's current snapshot; a ValueError names the first thing that is wrong.

    Every file against both digests of its record, every page against its checksum, every record and plan
    against its own digest, and the counts of all of them against each other.
    """
    manifest = open_table(uri)
    store, plan = manifest.store, read_plan(manifest.store, manifest.number)
    read_about(store)
    records = list(plan.records())
    for record in records:
        plan_rows(store, record.shard)
        for file in _files(record):
            _verify_file(store, file)
    rows, rejected = sum(r.rows for r in records), sum(r.rejected for r in records)
    if (rows, rejected) != (manifest.rows, manifest.rejected) or rows + rejected != plan.rows:
        raise ValueError(f"{uri}: the manifest says {manifest.rows} rows, its records {rows}")
    return manifest


def gc(uri: str, *, remove: bool = True) -> Swept:
    """Remove what no manifest names: files of abandoned snapshots, and drafts that a kill left behind.

    A snapshot still being written is left alone, and so is one that a newer manifest has replaced.
    With `remove` False nothing is deleted, only told.
    """
    store = open_store(uri).check()
    read_about(store)
    kept = {"_table.json"}
    manifest, latest = read_manifest(store), latest_plan(store)
    for plan in _plans(store):
        complete = store.exists(plan.manifest)
        if complete or plan == latest:
            kept |= set(_needed(plan, complete))
    current = manifest.number if manifest else 0
    planning = {number for number in snapshot_numbers(store) if number > current}
    swept = [
        entry
        for entry in store.entries()
        if entry.path not in kept and not _begun(entry.path, planning, latest)
    ]
    swept += [entry for entry in store.leftovers() if _stale(store, entry.path)]
    for entry in swept if remove else []:
        store.delete(entry.path)
    return Swept(tuple(entry.path for entry in swept), sum(entry.size for entry in swept))


def drop(uri: str) -> None:
    """Remove a whole table: its manifests first, so that nobody takes what is left for complete.

    Killed on the way, the same call removes the rest. ValueError where there is no table.
    """
    store = open_store(uri).check()
    if not store.exists("_table.json"):
        raise ValueError(f"no table at {uri}: check the path")
    rank = {"_manifest.json": 0, "_table.json": 2}
    for entry in sorted(store.entries(), key=lambda entry: rank.get(entry.path.rsplit("/", 1)[-1], 1)):
        store.delete(entry.path)


def _tables(store: Store, depth: int) -> Iterator[Store]:
    if store.exists("_table.json"):
        yield store
    elif depth:
        for name in store.folders():
            yield from _tables(store.child(name), depth - 1)


def _files(record: Record) -> list[StoredFile]:
    return [record.part, *([record.rejects] if record.rejects else [])]


def _verify_file(store: Store, file: StoredFile) -> None:
    data = checked_bytes(store, file)
    check_digest(store, file, data, "sha256")
    rows = parquet_table(data, checksums=True).num_rows
    if (rows, len(data)) != (file.rows, file.bytes):
        raise ValueError(f"{store.uri(file.path)} has {rows} rows, its record says {file.rows}")


def _plans(store: Store) -> Iterator[Plan]:
    for number in snapshot_numbers(store):
        if store.exists(f"{number:06d}/_plan.json"):
            yield read_plan(store, number)


def _needed(plan: Plan, complete: bool) -> Iterator[str]:
    """Every path that a complete snapshot, or the one being written, is made of."""
    yield from (f"{plan.number:06d}/_plan.json", plan.manifest)
    done = {shard.record for shard in plan.shards} if complete else set()
    for shard in plan.shards:
        yield from (shard.plan, shard.record, shard.part, shard.reject_file)
    earlier = {shard.carry for shard in plan.shards if shard.carry and not complete}
    for path in {*plan.reused, *done, *earlier}:
        record = read_record(plan.store, path)
        yield from (path, record.shard.plan, *(file.path for file in _files(record)))


def _begun(path: str, planning: set[int], latest: Plan | None) -> bool:
    """Whether a file is of a snapshot whose plan is being written just now."""
    number = path.split("/")[0]
    return number.isdigit() and int(number) in planning and (latest is None or int(number) > latest.number)


def _stale(store: Store, path: str) -> bool:
    assert store.local is not None
    return time.time() - (store.local / path).stat().st_mtime > DRAFT_AGE
