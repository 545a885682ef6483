"""How a table is committed: planned once, a shard at a time, a manifest last.

A table is a folder of a store:

    _table.json                      what made it: its key in full
    000001/_plan.json                one listing of the source, cut into shards; numbered, put if absent
    000001/_plan/<digest>.parquet    the listing's rows of one shard
    000001/part-000000.parquet       a shard's rows
    000001/_rejects/rejects-000000.parquet
    000001/_records/000000.json      a shard is done: its files' sizes and digests, rows and rejects
    000001/_manifest.json            the snapshot is complete: every file of it

Each file is put whole, if absent, under its final name. A shard is done once its record exists, and the
record of a part that was found there is computed from the stored file. So any number of processes may
work on a table, be killed at any point and be run again: what is done stays done, once. Names begin with
an underscore where readers of a whole folder (pandas, pyarrow, Spark) must pass them over.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data.clock import spent
from data.files import StoredFile, parquet_bytes, parquet_table, read_file, stored_file
from data.images import Reject
from data.plan import Plan, Record, Shard, plan_rows, read_record, snapshot_numbers
from data.store import Store, seal, unseal

REJECTS = pa.schema([pa.field(name, pa.string()) for name in ("id", "source", "stage", "error", "message")])
NAMED = 10  # rejects that an error names


class TooManyRejectsError(ValueError):
    """More images were rejected than the job allows; the reject table is there to be read."""


class Made(NamedTuple):
    """What working on a shard gave: the table's rows and the ids that gave none, with the reason."""

    table: pa.Table
    rejects: list[tuple[str, Reject]]


@dataclass(frozen=True)
class Manifest:
    """A complete snapshot of a table, as its manifest says: the truth about which files it has."""

    store: Store
    number: int
    listing: str
    table: dict[str, Any]  # what made it: its key in full
    rows_in: int
    rows: int
    rejected: int
    dropped: int
    reasons: dict[str, int]
    parts: tuple[StoredFile, ...]
    rejects: tuple[StoredFile, ...]
    extra: dict[str, Any] = field(default_factory=dict)


class Part(NamedTuple):
    """Where one of several processes that share a job begins: with part `number` (from 0) `of` so many."""

    number: int
    of: int


@dataclass(frozen=True)
class Progress:
    """How far a job is, counted in the source's rows."""

    rows: int
    rows_done: int
    rejected: int
    shards: int
    shards_done: int


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of the current snapshot, the highest one committed; None if none is."""
    for number in reversed(snapshot_numbers(store)):
        path = f"{number:06d}/_manifest.json"
        if store.exists(path):
            body = unseal(store.get(path), store.uri(path))
            files = {name: tuple(StoredFile(**file) for file in body[name]) for name in ("parts", "rejects")}
            return Manifest(store, **{**body, **files})
    return None


def run_shards(
    plan: Plan,
    make: Callable[[pa.Table], Made],
    source: str,
    *,
    max_reject_share: float,
    progress: Callable[[Progress], None] | None = None,
    part: Part | None = None,
) -> None:
    """Work on the plan's shards until each has its record, here; other processes may do so too.

    Raises TooManyRejectsError as soon as the records together go over the share.
    """
    tally = Tally(plan, max_reject_share)
    while pending := in_turn(plan, part):
        tally.check(progress)
        work_shard(plan, pending[0], make, source)
    tally.check(progress)


def in_turn(plan: Plan, part: Part | None = None) -> list[Shard]:
    """Pending shards at random, so that processes that share a job seldom meet on one; a part's own first."""
    pending = plan.pending()
    random.shuffle(pending)
    if part is not None:
        pending.sort(key=lambda shard: shard.index * part.of // len(plan.shards) != part.number)
    return pending


def work_shard(plan: Plan, shard: Shard, make: Callable[[pa.Table], Made], source: str) -> Record:
    """Make a shard's files and commit its record; what is already stored is kept as it is.

    The stored part decides: whatever planned id it lacks is a reject, whoever wrote it.
    """
    store = plan.store
    made, data = _put_part(plan, shard, make)
    part = stored_file(shard.part, made.table.num_rows, data)
    told = _put_rejects(store, shard.reject_file, made.rejects, source)
    rejected = told.rows if told else 0
    if part.rows + rejected != shard.rows:
        raise ValueError(f"{store.uri(part.path)}: {shard.rows} rows in, {part.rows} + {rejected} out")
    reasons = Counter(reject.error for _, reject in made.rejects)
    store.put_if_absent(shard.record, seal(asdict(Record(shard, part, told, dict(reasons)))))
    return read_record(store, shard.record)


def put_manifest(
    plan: Plan,
    *,
    dropped: int = 0,
    extra: Callable[[list[StoredFile]], dict[str, Any]] | None = None,
) -> Manifest:
    """Check that all shards add up, then put the manifest: from then on the snapshot is current.

    `extra` adds to it what it computes from the parts.
    """
    if not plan.store.exists(plan.manifest):
        records = list(plan.records())
        rows, rejected = sum(r.rows for r in records), sum(r.rejected for r in records)
        if rows + rejected != plan.rows:
            raise ValueError(f"{plan.store.url}: {plan.rows} rows in, {rows} + {rejected} rejected out")
        parts = [record.part for record in records if record.rows]
        body = {
            "number": plan.number,
            "listing": plan.listing,
            "table": unseal(plan.store.get("_table.json"), plan.store.uri("_table.json")),
            "rows_in": plan.rows + dropped,
            "rows": rows,
            "rejected": rejected,
            "dropped": dropped,
            "reasons": _sum_reasons(records),
            "parts": [asdict(part) for part in parts],
            "rejects": [asdict(record.rejects) for record in records if record.rejects],
            "extra": extra(parts) if extra else {},
        }
        plan.store.put_if_absent(plan.manifest, seal(body))
    manifest = read_manifest(plan.store)
    assert manifest is not None
    return manifest


class Tally:
    """Counts the records of a plan as they come, and fails over the allowed share of rejects."""

    def __init__(self, plan: Plan, max_reject_share: float):
        self._plan, self._share = plan, max_reject_share
        self._rejects: list[StoredFile] = []
        self._seen: set[int] = set()
        self._rows = self._rejected = 0
        for path in plan.reused:
            self._count(read_record(plan.store, path))

    def check(self, progress: Callable[[Progress], None] | None) -> None:
        new = self._plan.done() - self._seen
        for shard in self._plan.shards:
            if shard.index in new:
                self._count(read_record(self._plan.store, shard.record))
        self._seen |= new
        if progress is not None:
            done = self._rows + self._rejected
            total = len(self._plan.shards) + len(self._plan.reused)
            shards_done = len(self._seen) + len(self._plan.reused)
            progress(Progress(self._plan.rows, done, self._rejected, total, shards_done))
        if self._rejected > self._share * self._plan.rows:
            raise TooManyRejectsError(self._message())

    def _count(self, record: Record) -> None:
        self._rows += record.rows
        self._rejected += record.rejected
        if record.rejects:
            self._rejects.append(record.rejects)

    def _message(self) -> str:
        named: list[str] = []
        for file in sorted(self._rejects, key=lambda file: file.path):
            table = read_file(self._plan.store, file).slice(0, NAMED - len(named))
            named += [f"{row['id']} ({row['error']})" for row in table.to_pylist()]
            if len(named) == NAMED:
                break
        folder = self._rejects[0].path.rsplit("/", 1)[0]
        return (
            f"{self._rejected} of {self._plan.rows} images rejected, over the allowed share of "
            f"{self._share:g}: {', '.join(named)}; see {self._plan.store.uri(folder)}, then mend them or "
            f"raise max_reject_share"
        )


def _put_part(plan: Plan, shard: Shard, make: Callable[[pa.Table], Made]) -> tuple[Made, bytes]:
    """The shard's part as it is stored: made and put here, or found there and accounted for."""
    store, listed = plan.store, plan_rows(plan.store, shard)
    if not store.exists(shard.part):
        made = _carry(plan, shard, listed) if shard.carry else make(listed)
        with spent("write"):
            data = parquet_bytes(made.table)
            if store.put_if_absent(shard.part, data):
                return made, data
    data = store.get(shard.part)
    stored = parquet_table(data, ["id"], checksums=True)
    return Made(stored, _account(stored["id"], listed, make)), data


def _carry(plan: Plan, shard: Shard, listed: pa.Table) -> Made:
    """Rows of an earlier shard's files that this one keeps; nothing is decoded or encoded again."""
    assert shard.carry is not None
    earlier, wanted = read_record(plan.store, shard.carry), listed["id"].combine_chunks()
    part = read_file(plan.store, earlier.part)
    rejects: list[tuple[str, Reject]] = []
    if earlier.rejects is not None:
        told = read_file(plan.store, earlier.rejects)
        rows = told.filter(pc.is_in(told["id"], wanted)).to_pylist()
        rejects = [(row["id"], Reject(row["error"], row["message"], row["stage"])) for row in rows]
    return Made(part.filter(pc.is_in(part["id"], wanted)), rejects)


def _account(
    stored: pa.ChunkedArray, listed: pa.Table, make: Callable[[pa.Table], Made]
) -> list[tuple[str, Reject]]:
    """The rejects behind a part that was stored without its record: only those ids are read again."""
    absent = listed.filter(pc.invert(pc.is_in(listed["id"], stored.combine_chunks())))
    if not absent.num_rows:
        return []
    again = make(absent)
    mended = Reject("changed", "rejected when its shard was written, readable since", "read")
    return again.rejects + [(key, mended) for key in again.table["id"].to_pylist()]


def _put_rejects(
    store: Store, path: str, rejects: list[tuple[str, Reject]], source: str
) -> StoredFile | None:
    if not rejects:
        return None
    rows = [(key, source, told.stage, told.error, told.message) for key, told in sorted(rejects)]
    table = pa.table([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], schema=REJECTS)
    data = parquet_bytes(table)
    if not store.put_if_absent(path, data):
        data = store.get(path)
        table = parquet_table(data, checksums=True)
    return stored_file(path, table.num_rows, data)


def _sum_reasons(records: list[Record]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.reasons)
    return dict(total)
