"""WebDataset tar shards, here or in a bucket: samples of an image and its sidecars under one key."""

from __future__ import annotations

import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from data.images import EXTENSIONS, LIMITS, Limits, Reject
from data.sources import (
    LISTED,
    NATIVE,
    PROBLEMS,
    Payload,
    Source,
    escape,
    find_files,
    listed,
    passed,
    split_of,
    stem,
    too_many_bytes,
    with_columns,
)
from data.store import Entry, Store

LABEL = "cls"  # WebDataset's sidecar of a class
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
SIDECAR_BYTES = 2**20  # larger members that are no image are passed over


@dataclass(frozen=True)
class Member:
    """An image in a shard: its sample's key, its extension, where it lies, and what is wrong with that."""

    key: str
    extension: str
    position: int
    size: int
    problem: str | None


@dataclass
class Contents:
    """What a shard holds: images, text sidecars by key and extension, and how it ends if badly."""

    images: list[Member] = field(default_factory=list)
    sidecars: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    ending: str | None = None


@dataclass(frozen=True)
class TarSource:
    """WebDataset shards: `KEY.jpg` with sidecars `KEY.cls` (its label), `KEY.txt`, `KEY.json`, …

    The id is shard/key, the shard's name without `.tar`; a sample of several images has one row each,
    their extension in the id. Sidecars are kept as text columns, those that the first shard of
    each split has. Nothing
    is ever unpacked to disk; a member whose name climbs out, a link, or a cut archive is a reject.
    """

    store: Store
    shards: tuple[Entry, ...]  # in order of id
    columns: pa.Schema
    native: tuple[int, int, int] = NATIVE
    hashed = False

    @property
    def uri(self) -> str:
        return f"tar:{self.store.url}"

    @property
    def name(self) -> str:
        return self.store.url.rsplit("/", 1)[-1]

    @property
    def splits(self) -> frozenset[str]:
        return frozenset(split for split in (split_of(shard.path) for shard in self.shards) if split)

    def listing(self) -> Iterator[pa.RecordBatch]:
        for shard in self.shards:
            contents = scan(self.store, shard)
            self._check_sidecars(shard, contents)
            rows = sorted(_named(contents))
            for start in range(0, len(rows), LISTED):
                yield self._rows(shard, contents, rows[start : start + LISTED])

    def read(self, rows: pa.RecordBatch, limits: Limits = LIMITS) -> Payload:
        names = ("file", "position", "size", "problem")
        places = zip(*(rows[name].to_pylist() for name in names), strict=True)
        return [self._read(path, start, size, problem, limits) for path, start, size, problem in places]

    def _read(
        self, path: str, position: int, size: int, problem: str | None, limits: Limits
    ) -> bytes | Reject:
        if problem is not None:
            return Reject(problem, PROBLEMS[problem], "list")
        if size > limits.max_bytes:
            return too_many_bytes(size, limits)
        return self.store.get_range(path, position, position + size)

    def _check_sidecars(self, shard: Entry, contents: Contents) -> None:
        unknown = _sidecar_names(contents) - set(self.columns.names)
        if unknown:
            extra = ", ".join(sorted(unknown))
            raise ValueError(
                f"{self.store.uri(shard.path)} has sidecars {extra} that the first shard of its split lacks"
            )

    def _rows(self, shard: Entry, contents: Contents, named: list[tuple[str, Member]]) -> pa.RecordBatch:
        members = [member for _, member in named]
        own = [contents.sidecars.get(member.key, {}) for member in members]
        rows = listed(
            id=[f"{stem(shard)}/{name}" for name, _ in named],
            split=[split_of(shard.path)] * len(named),
            label=[texts.get(LABEL) for texts in own],
            version=[f"{shard.version}:{member.size}" for member in members],
            file=[shard.path] * len(named),
            position=[member.position for member in members],
            size=[member.size for member in members],
            problem=[member.problem for member in members],
        )
        texts = [{passed(kind): text for kind, text in sidecar.items()} for sidecar in own]
        return with_columns(
            rows, [(item, pa.array([t.get(item.name) for t in texts], pa.string())) for item in self.columns]
        )


def open_tar(place: str) -> Source:
    """WebDataset shards in a folder, or one shard; ValueError when there is none that can be read."""
    store, shards = find_files(place, ".tar")
    if not shards:
        squeezed = [entry.path for entry in store.entries() if entry.path.endswith(COMPRESSED)]
        if squeezed:
            raise ValueError(
                f"{store.uri(squeezed[0])} is compressed: unpack it, so that it can be read anywhere"
            )
        raise ValueError(f"no .tar files in {store.url}")
    shards = tuple(sorted(shards, key=lambda shard: stem(shard) + "/"))
    firsts = {split_of(shard.path): shard for shard in reversed(shards)}
    names = set[str]().union(*(_sidecar_names(scan(store, shard)) for shard in firsts.values()))
    return TarSource(store, shards, pa.schema([pa.field(name, pa.string()) for name in sorted(names)]))


def scan(store: Store, shard: Entry) -> Contents:
    """Read a shard's headers and sidecars, in the order of the file."""
    contents = Contents()
    with store.open(shard.path) as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r:", errors="surrogateescape") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                    _add(contents, archive, member)
                    if member.offset_data + member.size > shard.size:
                        contents.ending = "truncated"
                        break
        except tarfile.TarError:
            contents.ending = "truncated" if contents.images else "corrupt"
    return contents


def _add(contents: Contents, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    key, extension = _cut(member.name)
    if extension.rpartition(".")[2].lower() in EXTENSIONS:
        problem = None if member.isreg() else "not_a_file"
        if member.name.startswith("/") or ".." in member.name.split("/"):
            problem = "path_outside"
        contents.images.append(Member(key, extension, member.offset_data, member.size, problem))
    elif member.isreg() and member.size <= SIDECAR_BYTES:
        content = archive.extractfile(member)
        assert content is not None
        contents.sidecars[key][extension] = content.read().decode("utf-8", "replace").strip()


def _cut(name: str) -> tuple[str, str]:
    """WebDataset's cut: the key ends at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension


def _named(contents: Contents) -> Iterator[tuple[str, Member]]:
    """Each image with its name in the id, unlike all others of the shard."""
    images = Counter(member.key for member in contents.images)
    seen: set[str] = set()
    for member in contents.images:
        name = member.key if images[member.key] == 1 else f"{member.key}.{member.extension}"
        if name in seen:
            name = f"{name}#{member.position}"
            member = Member(member.key, member.extension, member.position, member.size, "duplicate_id")
        seen.add(name)
        yield escape(name.encode("utf-8", "surrogateescape")), member
    if contents.ending:
        yield "#end", Member("#end", "", 0, 0, contents.ending)


def _sidecar_names(contents: Contents) -> set[str]:
    """Columns of the sidecars that stand beside an image."""
    keys = {member.key for member in contents.images}
    return {passed(kind) for key in keys for kind in contents.sidecars.get(key, {}) if kind != LABEL}
