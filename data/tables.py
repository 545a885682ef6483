"""Latent and sample tables: schemas, writers and readers, on the protocol of `data.commit`.

Shapes: B batch, C channels, H W pixels, D latent dimensions, L levels of a ladder, N rows of a table.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

import blake3
import numpy as np
import obstore
import PIL
import pyarrow as pa
from PIL import Image

from data.batches import stream
from data.commit import Made, Manifest, Part, Progress, put_manifest, read_manifest, run_shards, work_shard
from data.duplicates import count_duplicates
from data.files import StoredFile, read_file
from data.heap import keep_freed_memory
from data.images import LIMITS, DecodePath, Limits
from data.plan import Plan, Shard, plan_table, read_plan
from data.sources import LISTED, Limited, Source, assign_splits, listed
from data.store import Store, open_store, unseal

SCHEMA_VERSION = 1
SHARD_ROWS = 65_536
ROW_BYTES = 120  # of a row's id, hash, split, label and sizes, roughly
METADATA = b"vae-flows"  # key of the JSON in every file's schema metadata

Encode = Callable[[np.ndarray, list[str]], dict[str, np.ndarray]]
Facts = tuple[pa.RecordBatch, list[bytes], np.ndarray]  # a batch's rows of the listing, hashes and sizes
Sample = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class LatentColumns:
    """Which numbers a model gives for an image: D = `dims` in `levels` (shapes, top level first).

    `logvar` is off for the plain autoencoder, `kl` likewise; `kl_levels` and `scores` (log_likelihood
    and elbo, in nats) on request. `dtype` of mu and logvar is float32 or float16. `dimensions` says which of
    the model's dimensions these are where they are not all.

    >>> LatentColumns(2).fields()
    [('mu', 2, 'float32'), ('logvar', 2, 'float32'), ('kl', None, 'float32')]
    """

    dims: int
    levels: tuple[tuple[int, ...], ...] = ()
    logvar: bool = True
    kl: bool = True
    kl_levels: bool = False
    scores: bool = False
    dtype: str = "float32"
    dimensions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype {self.dtype!r}: latents are stored as float32 or float16")
        if self.levels and sum(math.prod(shape) for shape in self.levels) != self.dims:
            raise ValueError(f"levels {self.levels} do not add up to {self.dims} dimensions")
        if self.dimensions and len(self.dimensions) != self.dims:
            raise ValueError(f"dimensions {self.dimensions} are {len(self.dimensions)}, not {self.dims}")

    def fields(self) -> list[tuple[str, int | None, str]]:
        """(name, width or None for a scalar, dtype) of each column the model fills."""
        columns: list[tuple[str, int | None, str]] = [("mu", self.dims, self.dtype)]
        if self.logvar:
            columns.append(("logvar", self.dims, self.dtype))
        if self.kl:
            columns.append(("kl", None, "float32"))
        if self.kl_levels:
            columns.append(("kl_levels", max(1, len(self.levels)), "float32"))
        if self.scores:
            columns += [("log_likelihood", None, "float32"), ("elbo", None, "float32")]
        return columns


@dataclass(frozen=True)
class TableResult:
    """What a job wrote: where, and how many. `changed` is False when nothing was left to do.

    `duplicates` are images with the bytes of another one; None in a table that has no images.
    """

    uri: str
    snapshot: int
    rows: int
    rejected: int
    reasons: dict[str, int]
    duplicates: int | None
    rejects_uri: str | None
    files: int
    bytes: int
    shards: int
    shards_done_before: int
    changed: bool


@dataclass(frozen=True)
class EncodeJob:
    """One encode, planned: `plan` says which shards there are; any process may work on any of them."""

    source: Source
    decode: DecodePath
    columns: LatentColumns
    plan: Plan
    metadata: dict[str, Any]
    batch_size: int
    limits: Limits

    def make(self, rows: pa.Table, encode: Encode) -> Made:
        """Read, decode and encode one shard's rows; of a batch's images nothing is kept."""
        batches, known, rejects = rows.to_batches(), [], []
        block = _Block(self.columns, rows.num_rows)
        for batch in stream(self.source, self.decode, self.batch_size, rows=batches, limits=self.limits):
            rejects += batch.rejects
            if len(batch.images):
                block.add(encode(batch.images, batch.ids), len(batch.images))
                known.append((batch.rows, batch.hashes, batch.sizes))
        return Made(self._table(known, block) if known else self.schema.empty_table(), rejects)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the latent table, with its metadata."""
        fields = [
            pa.field("id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("content_hash", pa.binary(16), nullable=False),
            pa.field("split", pa.string()),
            pa.field("label", pa.string()),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            *self.source.columns,
            *(_float_field(*column) for column in self.columns.fields()),
        ]
        return pa.schema(fields, metadata={METADATA: json.dumps(self.metadata, sort_keys=True)})

    def _table(self, batches: list[Facts], block: _Block) -> pa.Table:
        pieces, hashes, sizes_of = zip(*batches, strict=True)
        rows, sizes = pa.Table.from_batches(pieces), np.concatenate(sizes_of)
        own = rows["split"].to_pylist()
        splits = assign_splits(rows["id"].to_pylist(), own, self.source.splits)
        known = {
            "id": rows["id"],
            "source": pa.array([self.source.uri] * len(rows), pa.string()),
            "content_hash": pa.array(chain.from_iterable(hashes), pa.binary(16)),
            "split": pa.array(splits, pa.string()),
            "label": rows["label"],
            "width": pa.array(sizes[:, 0], pa.int32()),
            "height": pa.array(sizes[:, 1], pa.int32()),
            **{name: rows[name] for name in self.source.columns.names},
            **block.arrays(),
        }
        return pa.table([known[name] for name in self.schema.names], schema=self.schema)


class _Block:
    """A shard's numbers, in arrays that are there from the start: nothing of a batch outlives it."""

    def __init__(self, columns: LatentColumns, rows: int):
        self._widths = {name: width for name, width, _ in columns.fields()}
        self._values = {
            name: np.empty((rows,) if width is None else (rows, width), dtype)
            for name, width, dtype in columns.fields()
        }
        self._filled = 0

    def add(self, numbers: dict[str, np.ndarray], count: int) -> None:
        """The encoder's numbers of the next `count` images; ValueError where they are not what was agreed."""
        start, self._filled = self._filled, self._filled + count
        for name, values in self._values.items():
            place = values[start : self._filled]
            place[...] = _sound(name, numbers[name], place.shape, place.dtype)

    def arrays(self) -> dict[str, pa.Array]:
        """The columns as Arrow's."""
        return {
            name: _float_array(values[: self._filled], self._widths[name])
            for name, values in self._values.items()
        }


def plan_encode(
    store: Store,
    source: Source,
    decode: DecodePath,
    columns: LatentColumns,
    *,
    name: str,
    weights_sha256: str,
    lineage: dict[str, Any] | None = None,
    shard_rows: int = SHARD_ROWS,
    batch_size: int = 256,
    limits: Limits = LIMITS,
    seed: int = 0,
) -> EncodeJob:
    """Plan the encode of a source into a table under `store`; nothing is decoded.

    The table is `<store>/<name>-<key>`; the key hashes the source, the weights, the decode path, the
    columns, the limits and a `seed` of the encoder's draws that is not 0. `lineage` (model URI and version,
    dataset fingerprint, …) goes into the metadata.
    Called again it finds the table: unchanged, unfinished, or with images added, changed or gone.
    """
    decode = decode.resolved(source.native)
    key = {
        "kind": "latents",
        "schema_version": SCHEMA_VERSION,
        "source": source.uri,
        "limit": source.count if isinstance(source, Limited) else None,
        "weights_sha256": weights_sha256,
        "decode_digest": decode.digest,
        "columns": asdict(columns),
        "limits": asdict(limits),
        "shard_rows": shard_rows,
        **({"seed": seed} if seed else {}),
    }
    about = about_table(key, {"decode": decode.to_dict(), **(lineage or {})})
    table = store.child(f"{name}-{about['key']}")
    plan = plan_table(table, about, source.listing, shard_rows)
    if not plan.rows:
        raise ValueError(f"no images in {source.uri}")
    return EncodeJob(source, decode, columns, plan, about, batch_size, limits)


def join_encode(table: Store, number: int, source: Source, batch_size: int = 256) -> EncodeJob:
    """The encode that another process planned as snapshot `number` of a table, to work on its shards.

    All but the source is in the table's own record; nothing is listed.
    """
    about = unseal(table.get("_table.json"), table.uri("_table.json"))
    job = about["job"]
    if source.uri != job["source"]:
        raise ValueError(f"{table.url} is a table of {job['source']}, not of {source.uri}")
    levels = tuple(tuple(level) for level in job["columns"]["levels"])
    dimensions = tuple(job["columns"]["dimensions"])
    columns = LatentColumns(**{**job["columns"], "levels": levels, "dimensions": dimensions})
    decode = DecodePath.from_dict(about["lineage"]["decode"])
    plan = read_plan(table, number)
    return EncodeJob(source, decode, columns, plan, about, batch_size, Limits(**job["limits"]))


@dataclass(frozen=True)
class Estimate:
    """What an encode of all of a source would write; bytes before compression."""

    rows: int
    shards: int
    bytes: int


def estimate_encode(source: Source, columns: LatentColumns, shard_rows: int = SHARD_ROWS) -> Estimate:
    """Count a source's images for a dry run; nothing is written.

    >>> from data.sources import open_source
    >>> estimate_encode(open_source("digits"), LatentColumns(16))
    Estimate(rows=1797, shards=1, bytes=452844)
    """
    rows = sum(batch.num_rows for batch in source.listing())
    numbers = sum((width or 1) * np.dtype(dtype).itemsize for _, width, dtype in columns.fields())
    return Estimate(rows, -(-rows // shard_rows), rows * (numbers + ROW_BYTES))


def encode_shard(job: EncodeJob, shard: Shard, encode: Encode) -> None:
    """Work on one shard of a planned encode; in any process, any number of times."""
    work_shard(job.plan, shard, lambda rows: job.make(rows, encode), job.source.uri)


def finish_encode(job: EncodeJob, *, shards_done_before: int = 0, changed: bool = True) -> TableResult:
    """Put the manifest, with the number of duplicates, once all shards have their record."""
    manifest = put_manifest(
        job.plan, extra=lambda parts: {"duplicates": count_duplicates(job.plan.store, parts)}
    )
    return table_result(manifest, shards_done_before, changed)


def encode_table(
    job: EncodeJob,
    encode: Encode,
    *,
    max_reject_share: float = 0.01,
    progress: Callable[[Progress], None] | None = None,
    part: Part | None = None,
) -> TableResult:
    """Encode what a planned job still lacks, commit it and return the table.

    `encode(images, ids)` takes uint8 (B, C, H, W) and B ids, and returns float arrays by column: mu and
    logvar (B, D), kl (B,) and so on, as the job's columns ask. Raises TooManyRejectsError over the share.
    """
    before = len(job.plan.done())
    complete = job.plan.store.exists(job.plan.manifest)
    keep_freed_memory()
    run_shards(
        job.plan,
        lambda rows: job.make(rows, encode),
        job.source.uri,
        max_reject_share=max_reject_share,
        progress=progress,
        part=part,
    )
    return finish_encode(job, shards_done_before=before, changed=not complete)


def write_samples(
    store: Store,
    sample: Sample,
    count: int,
    *,
    name: str,
    key: dict[str, Any],
    seed: int,
    dims: int,
    lineage: dict[str, Any] | None = None,
    shard_rows: int = 4096,
    batch_size: int = 256,
    progress: Callable[[Progress], None] | None = None,
) -> TableResult:
    """Write images sampled from a model: `index`, `seed`, `z` and the PNG as Hugging Face's `image`.

    `sample(indices)` returns z float32 (B, D) and images uint8 (B, C, H, W), a function of each index alone;
    `key` holds what else decides them (weights, temperature). A larger `count` later appends to the table.
    """
    if count < 1:
        raise ValueError(f"count {count}: give at least 1 sample")
    about = about_table({"kind": "samples", "seed": seed, "dims": dims, **key}, lineage or {})
    table = store.child(f"{name}-{about['key']}")
    plan = plan_table(table, about, lambda: _indices(count), shard_rows)
    before, complete = len(plan.done()), table.exists(plan.manifest)

    def make(rows: pa.Table) -> Made:
        places = rows["position"].to_numpy()
        cuts = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
        return Made(pa.concat_tables([_sample_rows(cut, sample, seed, dims, about) for cut in cuts]), [])

    run_shards(plan, make, f"seed:{seed}", max_reject_share=0.0, progress=progress)
    return table_result(put_manifest(plan), before, not complete)


def write_columns(
    store: Store,
    columns: dict[str, Sequence[Any] | np.ndarray],
    *,
    name: str,
    key: dict[str, Any],
    lineage: dict[str, Any] | None = None,
) -> TableResult:
    """Write a small table of these columns, one of them `id`, unique; a row each of what a job found.

    `key` holds what decides the rows: another key is another table, `<store>/<name>-<key>`.
    """
    about = about_table({"kind": name, **key}, lineage or {})
    rows = pa.table(columns).sort_by("id").replace_schema_metadata({METADATA: json.dumps(about)})
    table = store.child(f"{name}-{about['key']}")
    plan = plan_table(table, about, lambda: [listed(id=rows["id"].to_pylist())], rows.num_rows)
    before, complete = len(plan.done()), table.exists(plan.manifest)
    run_shards(plan, lambda _: Made(rows, []), name, max_reject_share=0.0)
    return table_result(put_manifest(plan), before, not complete)


def open_table(uri: str) -> Manifest:
    """The current snapshot of a table; ValueError when there is none."""
    manifest = read_manifest(open_store(uri).check())
    if manifest is None:
        raise ValueError(f"no complete table at {uri}: check the path, or run its job again to finish it")
    return manifest


def table_files(uri: str) -> list[str]:
    """The full path or URL of every file of the table's current snapshot, for any Parquet reader."""
    manifest = open_table(uri)
    return [manifest.store.uri(file.path) for file in manifest.parts]


def read_latents(uri: str, column: str = "mu") -> tuple[np.ndarray, np.ndarray]:
    """`(ids, latents)` of a table: N strings and float (N, D), each file's digest checked.

    `column` is mu, logvar or any other fixed-width column. ValueError for a damaged file.
    """
    manifest = open_table(uri)
    if not manifest.rows:
        raise ValueError(f"the table at {uri} has no rows")
    ids = np.empty(manifest.rows, object)
    starts = np.cumsum([0, *(file.rows for file in manifest.parts)])
    ids[: starts[1]], first = _block(manifest, manifest.parts[0], column)
    values = np.empty((manifest.rows, *first.shape[1:]), first.dtype)
    values[: starts[1]] = first

    def fill(place: int) -> None:
        start, stop = starts[place : place + 2]
        ids[start:stop], values[start:stop] = _block(manifest, manifest.parts[place], column)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(1, len(manifest.parts))))
    return ids, values


def _block(manifest: Manifest, file: StoredFile, column: str) -> tuple[np.ndarray, np.ndarray]:
    table = read_file(manifest.store, file, ["id", column])
    return table["id"].to_numpy(), matrix(table[column])


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-width list column as one array (N, D); a scalar column as (N,)."""
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    flat = column.combine_chunks().flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def about_table(key: dict[str, Any], lineage: dict[str, Any]) -> dict[str, Any]:
    """A table's metadata: its key in full and hashed, lineage, and the versions of what wrote it."""
    text = json.dumps(key, sort_keys=True)
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "pillow": PIL.__version__,
        "obstore": obstore.__version__,
    }
    digest = blake3.blake3(text.encode()).hexdigest(length=8)
    return {"key": digest, "job": json.loads(text), "lineage": lineage, "versions": versions}


def table_result(manifest: Manifest, shards_done_before: int, changed: bool) -> TableResult:
    """The small record that a flow reports of a complete table."""
    folder = PurePosixPath(manifest.rejects[-1].path).parent if manifest.rejects else None
    return TableResult(
        uri=manifest.store.url,
        snapshot=manifest.number,
        rows=manifest.rows,
        rejected=manifest.rejected,
        reasons=manifest.reasons,
        duplicates=manifest.extra.get("duplicates"),
        rejects_uri=manifest.store.uri(str(folder)) if folder else None,
        files=len(manifest.parts),
        bytes=sum(file.bytes for file in manifest.parts),
        shards=len(manifest.parts),
        shards_done_before=shards_done_before,
        changed=changed,
    )


def _float_field(name: str, width: int | None, dtype: str) -> pa.Field:
    kind = pa.float16() if dtype == "float16" else pa.float32()
    if width is None:
        return pa.field(name, kind, nullable=False)
    return pa.field(name, pa.list_(pa.field("element", kind, nullable=False), width), nullable=False)


def _sound(name: str, given: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What a model gave as the table holds it; ValueError where its shape is another or it is not finite."""
    values = np.asarray(given, dtype)
    if values.shape != shape:
        raise ValueError(f"the model gave {name} of shape {values.shape}, the table has {shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"the model gave a {name} that is not finite in {dtype}")
    return values


def _float_array(values: np.ndarray, width: int | None) -> pa.Array:
    if width is None:
        return pa.array(values)
    kind = _float_field("", width, str(values.dtype)).type
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)


def _indices(count: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, count, LISTED):
        places = range(start, min(start + LISTED, count))
        yield listed(id=[f"{place:012d}" for place in places], position=list(places))


def _sample_rows(places: np.ndarray, sample: Sample, seed: int, dims: int, about: dict[str, Any]) -> pa.Table:
    z, images = sample(places)
    png = [
        {"bytes": png_bytes(image), "path": f"{place:012d}.png"}
        for place, image in zip(places, images, strict=True)
    ]
    columns = [
        pa.array([f"{place:012d}" for place in places], pa.string()),
        pa.array(places, pa.int64()),
        pa.array([seed] * len(places), pa.int64()),
        _float_array(_sound("z", z, (len(places), dims), np.dtype(np.float32)), dims),
        pa.array(png, _IMAGE),
    ]
    return pa.table(columns, schema=_sample_schema(dims, about))


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _sample_schema(dims: int, about: dict[str, Any]) -> pa.Schema:
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        _float_field("z", dims, "float32"),
        pa.field("image", _IMAGE),
    ]
    value = {name: {"dtype": kind, "_type": "Value"} for name, kind in _SAMPLE_VALUES.items()}
    z = {"feature": {"dtype": "float32", "_type": "Value"}, "length": dims, "_type": "List"}
    features = {**value, "z": z, "image": {"_type": "Image"}}
    huggingface = json.dumps({"info": {"features": features}})
    return pa.schema(
        fields, metadata={METADATA: json.dumps(about, sort_keys=True), b"huggingface": huggingface}
    )


_SAMPLE_VALUES = {"id": "string", "index": "int64", "seed": "int64"}


def png_bytes(pixels: np.ndarray) -> bytes:
    """One image uint8 (C, H, W) as a PNG."""
    file = io.BytesIO()
    plane = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(plane)).save(file, "PNG", compress_level=1)
    return file.getvalue()
