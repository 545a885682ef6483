"""What a table is made of: shards planned once and numbered, and the records of those that are done.

A plan is one listing of a source, cut into shards, and is put if absent under its number. A later listing
makes the next number: shards that are as they were are named again by their records, a shard that lost or
changed an image is rewritten from its own file, and new and changed images make new shards.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import blake3
import pyarrow as pa

from data.batches import rebatch
from data.files import StoredFile, parquet_bytes, parquet_table
from data.listing import PLACES, ListingHasher, listing_digest
from data.store import Store, seal, unseal


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
    return parquet_table(data)


def read_record(store: Store, path: str) -> Record:
    return Record.from_dict(unseal(store.get(path), store.uri(path)))


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
