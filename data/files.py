"""Parquet files as they are committed: written one way, read back only when they are what was written."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from data.store import Store

ROW_GROUP = 16_384
DIGESTS: dict[str, Callable[[bytes], Any]] = {"sha256": hashlib.sha256, "blake3": blake3}


@dataclass(frozen=True)
class StoredFile:
    """A committed Parquet file; `path` is relative to the table.

    Readers check the blake3, which costs them a quarter of what the sha256 would; that one is for people, and
    for records of before there were both.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    blake3: str = ""


def parquet_table(data: bytes, columns: list[str] | None = None, *, checksums: bool = False) -> pa.Table:
    """The table in a Parquet file's bytes; with `checksums` each page is tested against its own.

    Read in this thread alone: Arrow's own threads may hold on to the bytes for a moment longer than the
    call, and one that gives them back while the interpreter ends would abort the process.
    """
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=checksums)
    return file.read(columns, use_threads=False)


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


def read_file(store: Store, file: StoredFile, columns: list[str] | None = None) -> pa.Table:
    """A committed file, after its digest is found to be that of its record; ValueError if it is not."""
    return parquet_table(checked_bytes(store, file), columns)


def checked_bytes(store: Store, file: StoredFile) -> bytes:
    """A committed file's bytes; ValueError if they are not what was committed."""
    data = store.get(file.path) if store.local is None else (store.local / file.path).read_bytes()
    check_digest(store, file, data, "blake3" if file.blake3 else "sha256")
    return data


def check_digest(store: Store, file: StoredFile, data: bytes, name: str) -> None:
    """ValueError where these bytes' blake3 or sha256 is not that of the file's record."""
    if DIGESTS[name](data).hexdigest() != getattr(file, name):
        raise ValueError(f"{store.uri(file.path)} is damaged: its {name} is not that of its record")


def in_arrow(data: bytes) -> pa.BufferReader:
    """The bytes as a file of Arrow's own memory, for readers that cannot do without Arrow's threads."""
    buffer = pa.allocate_buffer(len(data))
    memoryview(buffer).cast("B")[:] = data
    return pa.BufferReader(buffer)


def stored_file(path: str, rows: int, data: bytes) -> StoredFile:
    """The record of a file of these bytes."""
    digests = {name: digest(data).hexdigest() for name, digest in DIGESTS.items()}
    return StoredFile(path, rows, len(data), **digests)


def _is_float(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind.value_type if pa.types.is_fixed_size_list(kind) else kind)


def _is_unique(item: pa.Field) -> bool:
    """Columns whose values rarely repeat: a dictionary would only cost."""
    return item.name == "id" or pa.types.is_fixed_size_binary(item.type) or pa.types.is_struct(item.type)
