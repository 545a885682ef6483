"""How a table is committed: planned once, a shard at a time, a manifest last.

A table is a folder of a store:

    _table.json                      what made it: its key in full
    000001/_plan.json                one listing of the source, cut into shards; numbered, put if absent
    000001/_plan/<digest>.parquet    the listing's rows of one shard
    000001/part-000000.parquet       a shard's rows
    000001/_rejects/rejects-000000.parquet
    000001/_records/000000.json      a shard is done: its files' sizes and sha256, rows and rejects
    000001/_manifest.json            the snapshot is complete: every file of it

Each file is put whole, if absent, under its final name. A shard is done once its record exists, and the
record of a part that was found there is computed from the stored file. So any number of processes may
work on a table, be killed at any point and be run again: what is done stays done, once. Names begin with
an underscore where readers of a whole folder (pandas, pyarrow, Spark) must pass them over.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import blake3
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.batches import rebatch
from data.images import Reject
from data.store import Store, seal, unseal

ROW_GROUP = 16_384
REJECTS = pa.schema([pa.field(name, pa.string()) for name in ("id", "source", "stage", "error", "message")])
PLACES = frozenset({"file", "position", "size"})  # columns of a listing that say where an image lies
NAMED = 10  # rejects that an error names


class TooManyRejectsError(ValueError):
    """More images were rejected than the job allows; the reject table is there to be read."""


class Made(NamedTuple):
    """What working on a shard gave: the table's rows and the ids that gave none, with the reason."""

    table: pa.Table
    rejects: list[tuple[str, Reject]]


@dataclass(frozen=True)
class StoredFile:
    """A committed Parquet file; `path` is relative to the table."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A piece of the plan: `rows` rows of the listing, ids `first` to `last`, kept at `plan`.

    `carry` names the earlier record whose files hold these rows already, for a shard rewritten because
    some of its other images have changed or gone.
    """

    number: int  # of the snapshot that planned it
    index: int
    plan: str
    rows: int
    first: str
    last: str
    carry: str | None = None

    @property
    def record(self) -> str:
        return f"{self.number:06d}/_records/{self.index:06d}.json"

    @property
    def part(self) -> str:
        return f"{self.number:06d}/part-{self.index:06d}.parquet"

    @property
    def reject_file(self) -> str:
        return f"{self.number:06d}/_rejects/rejects-{self.index:06d}.parquet"


@dataclass(frozen=True)
class Record:
    """A shard that is done: rows in = rows + rejected. A reject file of no rows is not kept."""

    shard: Shard
    part: StoredFile
    rejects: StoredFile | None
    reasons: dict[str, int]

    @property
    def rows(self) -> int:
        return self.part.rows

    @property
    def rejected(self) -> int:
        return self.rejects.rows if self.rejects else 0

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Record:
        rejects = StoredFile(**body["rejects"]) if body["rejects"] else None
        return cls(Shard(**body["shard"]), StoredFile(**body["part"]), rejects, body["reasons"])


@dataclass(frozen=True)
class Plan:
    """One numbered snapshot of a table: shards to work on, and records reused from earlier ones."""

    store: Store  # the table's folder
    number: int
    listing: str  # digest of the listing
    rows: int
    shards: tuple[Shard, ...]
    reused: tuple[str, ...] = ()  # records of earlier snapshots, kept as they are

    @property
    def manifest(self) -> str:
        return f"{self.number:06d}/_manifest.json"

    def done(self) -> set[int]:
        """Indices of this plan's shards whose record is committed."""
        names = (entry.path for entry in self.store.entries(f"{self.number:06d}/_records"))
        return {int(name.rsplit("/", 1)[1].removesuffix(".json")) for name in names}

    def pending(self) -> list[Shard]:
        done = self.done()
        return [shard for shard in self.shards if shard.index not in done]

    def records(self) -> Iterator[Record]:
        """Records of every shard of the snapshot, reused ones first; all must be committed."""
        for path in (*self.reused, *(shard.record for shard in self.shards)):
            yield read_record(self.store, path)


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


def plan_table(
    store: Store, about: dict[str, Any], listing: Callable[[], Iterable[pa.RecordBatch]], shard_rows: int
) -> Plan:
    """The current plan of a table: the one committed for this listing, or a new numbered snapshot.

    `listing()` gives the source's rows in order of id, anew at each call. A first plan cuts them into
    shards of `shard_rows`. A later one reuses the shards that are as they were, rewrites those that lost
    or changed an image, and cuts new and changed images into new shards.
    """
    store.put_if_absent("_table.json", seal(about))
    latest = latest_plan(store)
    if latest is None:
        rows = listing()
        return _put_plan(store, 1, rows, shard_rows)
    if listing_digest(listing()) == latest.listing:
        return latest
    return _replan(latest, listing, shard_rows)


def latest_plan(store: Store) -> Plan | None:
    """The plan of the highest number, complete or not; None for no table."""
    for number in reversed(snapshot_numbers(store)):
        if store.exists(f"{number:06d}/_plan.json"):
            return read_plan(store, number)
    return None


def read_plan(store: Store, number: int) -> Plan:
    """The committed plan of a numbered snapshot."""
    path = f"{number:06d}/_plan.json"
    body = unseal(store.get(path), store.uri(path))
    shards = tuple(Shard(**shard) for shard in body["shards"])
    return Plan(store, number, body["listing"], body["rows"], shards, tuple(body["reused"]))


def snapshot_numbers(store: Store) -> list[int]:
    """Numbers of the snapshots begun in a table's folder, ascending."""
    return [int(name) for name in store.folders() if name.isdigit()]


def plan_rows(store: Store, shard: Shard) -> pa.Table:
    """A shard's rows of the listing; ValueError if they are not those that its name was made of."""
    data = store.get(shard.plan)
    if blake3.blake3(data).hexdigest(length=16) not in shard.plan:
        raise ValueError(f"{store.uri(shard.plan)} is damaged: its content does not match its name")
    return pq.read_table(pa.BufferReader(data))


def read_record(store: Store, path: str) -> Record:
    return Record.from_dict(unseal(store.get(path), store.uri(path)))


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
    store, listed = plan.store, plan_rows(plan.store, shard)
    made = None
    if not store.exists(shard.part):
        made = _carry(plan, shard, listed) if shard.carry else make(listed)
        data = parquet_bytes(made.table)
        if not store.put_if_absent(shard.part, data):
            made = None
    if made is None:
        data = store.get(shard.part)
        stored = pq.read_table(pa.BufferReader(data), columns=["id"], page_checksum_verification=True)
        made = Made(stored, _account(stored["id"], listed, make))
    part = _file(shard.part, made.table.num_rows, data)
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


def read_file(store: Store, file: StoredFile, columns: list[str] | None = None) -> pa.Table:
    """A committed file, after its sha256 is found to be that of its record; ValueError if it is not."""
    return pq.read_table(pa.BufferReader(checked_bytes(store, file)), columns=columns)


def checked_bytes(store: Store, file: StoredFile) -> bytes:
    """A committed file's bytes; ValueError if they are not what was committed."""
    data = store.get(file.path) if store.local is None else (store.local / file.path).read_bytes()
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ValueError(f"{store.uri(file.path)} is damaged: its sha256 is not that of its record")
    return data


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as one Parquet file: zstd, page checksums, floats byte-stream-split without a dictionary."""
    floats = [item.name for item in table.schema if _is_float(item.type)]
    plain = [item.name for item in table.schema if _is_unique(item)]
    leaves = [
        f"{name}.list.element" if pa.types.is_fixed_size_list(table.schema.field(name).type) else name
        for name in floats
    ]
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression="zstd",
        compression_level=1,
        use_dictionary=[item.name for item in table.schema if item.name not in {*floats, *plain}],
        use_byte_stream_split=leaves,
        write_page_checksum=True,
    )
    return sink.getvalue()


def listing_digest(rows: Iterable[pa.RecordBatch]) -> str:
    """A digest of a listing's ids, versions, splits and labels, however it is cut into batches."""
    hasher = ListingHasher()
    for batch in rows:
        hasher.update(batch)
    return hasher.digest()


class ListingHasher:
    """Hashes a listing column by column, so that the digest depends on its rows, not its batches.

    Where an image lies is left out: one that was only moved inside its archive is the same.
    """

    def __init__(self) -> None:
        # A column's lengths and its texts each have their own: interleaved, they would show the batches.
        self._lengths: dict[str, Any] = defaultdict(blake3.blake3)
        self._texts: dict[str, Any] = defaultdict(blake3.blake3)

    def update(self, batch: pa.RecordBatch | pa.Table) -> None:
        for name in batch.schema.names:
            if name not in PLACES:
                texts = as_text(batch.column(name))
                lengths = pc.fill_null(pc.cast(pc.binary_length(texts), pa.int64()), -1)
                self._lengths[name].update(lengths.to_numpy(zero_copy_only=False).tobytes())
                self._texts[name].update("".join(text for text in texts.to_pylist() if text).encode())

    def digest(self) -> str:
        whole = blake3.blake3()
        for name in sorted(self._lengths):
            whole.update(name.encode() + self._lengths[name].digest() + self._texts[name].digest())
        return whole.hexdigest(length=16)


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Any column as strings, null where it is null; equal values give equal texts."""
    if pa.types.is_string(column.type):
        return column
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        return pa.array([None if value is None else repr(value) for value in column.to_pylist()], pa.string())
    return column.cast(pa.string())


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


def _put_plan(
    store: Store,
    number: int,
    rows: Iterable[pa.RecordBatch],
    shard_rows: int,
) -> Plan:
    hasher = ListingHasher()
    shards: list[Shard] = []
    for index, piece in enumerate(rebatch(rows, shard_rows)):
        hasher.update(piece)
        shards.append(_put_shard(store, number, index, pa.Table.from_batches([piece])))
    return _commit_plan(Plan(store, number, hasher.digest(), sum(s.rows for s in shards), tuple(shards)))


def _put_shard(store: Store, number: int, index: int, rows: pa.Table, carry: str | None = None) -> Shard:
    """Put a shard's rows under a name made of their bytes: planners that disagree never mix."""
    data = parquet_bytes(rows)
    path = f"{number:06d}/_plan/{blake3.blake3(data).hexdigest(length=16)}.parquet"
    store.put_if_absent(path, data)
    first, last = rows["id"][0].as_py(), rows["id"][-1].as_py()
    return Shard(number, index, path, rows.num_rows, first, last, carry)


def _commit_plan(plan: Plan) -> Plan:
    """Put the plan; where another process was first, its plan is the one to work on."""
    body = {
        "listing": plan.listing,
        "rows": plan.rows,
        "shards": [asdict(shard) for shard in plan.shards],
        "reused": list(plan.reused),
    }
    plan.store.put_if_absent(f"{plan.number:06d}/_plan.json", seal(body))
    return read_plan(plan.store, plan.number)


def _replan(latest: Plan, listing: Callable[[], Iterable[pa.RecordBatch]], shard_rows: int) -> Plan:
    """A new snapshot on the records of the latest one, complete or not."""
    store, number = latest.store, latest.number + 1
    done = latest.done()
    base = [read_record(store, path).shard for path in latest.reused]
    base += [shard for shard in latest.shards if shard.index in done]
    changes = _Changes(store, base)
    hasher = ListingHasher()
    shards: list[Shard] = []
    for piece in rebatch(changes.fresh(_hashing(listing(), hasher)), shard_rows):
        shards.append(_put_shard(store, number, len(shards), pa.Table.from_batches([piece])))
    reused = [shard for place, shard in enumerate(base) if place not in changes.lost]
    for place, lost in sorted(changes.lost.items()):
        kept = _without(plan_rows(store, base[place]), lost)
        if kept.num_rows:
            shards.append(_put_shard(store, number, len(shards), kept, base[place].record))
    rows = sum(shard.rows for shard in (*reused, *shards))
    paths = tuple(shard.record for shard in reused)
    return _commit_plan(Plan(store, number, hasher.digest(), rows, tuple(shards), paths))


def _hashing(batches: Iterable[pa.RecordBatch], hasher: ListingHasher) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        hasher.update(batch)
        yield batch


def _without(table: pa.Table, places: array[int]) -> pa.Table:
    lost = set(places)
    return table.take(pa.array([i for i in range(table.num_rows) if i not in lost], pa.int64()))


class _Changes:
    """A merge of a new listing with the shards of an earlier one; both are in order of id.

    After `fresh` is exhausted, `lost` maps a shard's place in `base` to its rows that are gone or changed.
    """

    def __init__(self, store: Store, base: list[Shard]):
        self._store, self._base = store, base
        self.lost: dict[int, array[int]] = {}

    def fresh(self, listing: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Rows of the listing that no earlier shard has as they are."""
        old = heapq.merge(*(self._rows(chain) for chain in _chains(self._base)))
        current = next(old, None)
        for batch in listing:
            new: list[int] = []
            for place, (key, version) in enumerate(_keys(batch)):
                while current is not None and current[0] < key:
                    self._lose(current)
                    current = next(old, None)
                if current is None or current[0] != key:
                    new.append(place)
                    continue
                if current[1] != version:
                    self._lose(current)
                    new.append(place)
                current = next(old, None)
            if new:
                yield batch.take(pa.array(new, pa.int64()))
        while current is not None:
            self._lose(current)
            current = next(old, None)

    def _lose(self, row: tuple[str, str, int, int]) -> None:
        self.lost.setdefault(row[2], array("L")).append(row[3])

    def _rows(self, chain: list[int]) -> Iterator[tuple[str, str, int, int]]:
        for place in chain:
            table = plan_rows(self._store, self._base[place])
            for row, (key, version) in enumerate(_keys(table)):
                yield key, version, place, row


def _keys(rows: pa.RecordBatch | pa.Table) -> Iterator[tuple[str, str]]:
    """(id, all that a new snapshot must not take over from the old one unless it is equal)."""
    names = sorted(set(rows.schema.names) - {"id", *PLACES})
    columns = [rows.column(name).to_pylist() for name in names]
    for key, *values in zip(rows.column("id").to_pylist(), *columns, strict=True):
        yield key, repr(values)


def _chains(shards: list[Shard]) -> list[list[int]]:
    """Places of shards, in as few chains of ascending, disjoint ids as there are: one a snapshot, mostly."""
    chains: list[list[int]] = []
    for place in sorted(range(len(shards)), key=lambda place: shards[place].first):
        for chain in chains:
            if shards[chain[-1]].last < shards[place].first:
                chain.append(place)
                break
        else:
            chains.append([place])
    return chains


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
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    return _file(path, table.num_rows, data)


def _file(path: str, rows: int, data: bytes) -> StoredFile:
    return StoredFile(path, rows, len(data), hashlib.sha256(data).hexdigest())


def _sum_reasons(records: list[Record]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.reasons)
    return dict(total)


def _is_float(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind.value_type if pa.types.is_fixed_size_list(kind) else kind)


def _is_unique(item: pa.Field) -> bool:
    """Columns whose values rarely repeat: a dictionary would only cost."""
    return item.name == "id" or pa.types.is_fixed_size_binary(item.type) or pa.types.is_struct(item.type)
