"""What latent tables cost: memory of an encode, array sources' speed, bytes of trained latents, reading them.

    python benchmarks/tables.py [--rounds 3] [--train-minutes 1] [--minutes 8] [--fashion-mnist DIR]

Each figure is measured in a process of its own, interleaved over rounds, and is their median. Results go
to benchmarks/results/tables.json run by run, and in the end, as tables, into docs/tables.md. Stopped, or out
of --minutes, the same command goes on.

* memory: the peak of a whole encode of N synthetic 32x32 images to D = 64, by a trivial encoder, and what
  it left on disk, from which the costs of larger sets follow;
* sources: idx, a snapshot, a Parquet of pixels (lists of rows) and one of PNG files, through the whole stream
  into batches; the PNG's bytes alone, and OpenCV alone on these bytes, the limit of any Parquet of files;
* latents: a flat convolutional VAE of D = 64 is trained on Fashion-MNIST for --train-minutes of CPU and
  encodes its 70,000 images; its columns' stored bytes over those of raw float32, under four settings;
* reading: that table by read_latents, and by pandas in two ways.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import FILES, alone, keep, medians, place, play, results, rounds_told, whole_rounds

DIMS = 64
MEMORY = (100_000, 1_000_000)
SOURCES = ("idx", "snapshot", "parquet_pixels", "parquet_png", "parquet_png_bytes", "opencv")
SHARD = 65_536
GIVEN = ("fashion_mnist", "files", "train_minutes")  # options that a measurement needs
STORED = {
    "parts": "*/part-*.parquet",
    "plans": "*/_plan/*",
    "records": "*/_records/*",
    "manifest": "*/_manifest.json",
    "plan": "*/_plan.json",
}
READERS = ("read_latents", "pandas", "pandas_two_columns")


def synthetic(count: int) -> Any:
    """`count` grey images of 32x32 pixels, made when they are asked for."""
    from data.arrays import ArraySource, Part

    def pixels(positions: np.ndarray) -> np.ndarray:
        values = np.arange(1024, dtype=np.int64) * (1 + positions[:, None] % 251) + positions[:, None] // 251
        return values.astype(np.uint8).reshape(-1, 32, 32, 1)

    return ArraySource("synthetic", "synthetic", (1, 32, 32), {"train": Part(count, None, pixels)})


def project(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
    """A trivial encoder: images uint8 (B, C, H, W) -> mean and log-variance (B, D)."""
    flat = images.reshape(len(images), -1)[:, : 2 * DIMS].astype(np.float32) / 255
    return {"mu": np.sqrt(flat[:, :DIMS]), "logvar": np.log1p(flat[:, DIMS:])}


def memory(count: str, options: argparse.Namespace) -> dict[str, float]:
    from data.images import DecodePath
    from data.store import open_store
    from data.tables import LatentColumns, encode_table, plan_encode

    with tempfile.TemporaryDirectory() as out:
        columns = LatentColumns(DIMS, kl=False)
        settings: dict[str, Any] = {"name": "memory", "weights_sha256": "0"}
        start = time.process_time()
        job = plan_encode(open_store(out), synthetic(int(count)), DecodePath(), columns, **settings)
        planning = time.process_time() - start
        result = encode_table(job, project)
        sizes = {name: _bytes(Path(result.uri), pattern) for name, pattern in STORED.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mib": peak, "rows": result.rows, "planning_cpu_seconds": planning, **sizes}


def _bytes(table: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in table.glob(pattern))


def source_speed(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """A source's images, through the whole stream into batches, by one worker."""
    import pandas  # noqa: F401  pyarrow imports it with its first array

    from data.batches import stream
    from data.images import DecodePath
    from data.sources import open_source

    source = open_source(source_uri(kind, options))
    path = DecodePath(28, 28, 1)
    if kind == "parquet_png_bytes":
        return timed(lambda: sum(len(source.read(rows)) for rows in source.listing()))
    if kind == "opencv":
        import cv2

        files = [np.frombuffer(file, np.uint8) for rows in source.listing() for file in source.read(rows)]
        return timed(lambda: len([cv2.imdecode(file, cv2.IMREAD_GRAYSCALE).shape for file in files]))
    return timed(lambda: sum(len(batch.images) for batch in stream(source, path, 1024, workers=1)))


def reading(reader: str, options: argparse.Namespace) -> dict[str, float]:
    """The vectors of the trained model's table as one array."""
    import pandas as pd

    from data.tables import read_latents

    uri = trained_table(options)

    def with_pandas(columns: list[str] | None) -> int:
        frame = pd.read_parquet(uri, columns=columns)
        return len(np.stack(frame["mu"].to_numpy()))

    ways: dict[str, Callable[[], int]] = {
        "read_latents": lambda: len(read_latents(uri)[1]),
        "pandas": lambda: with_pandas(None),
        "pandas_two_columns": lambda: with_pandas(["id", "mu"]),
    }
    ways[reader]()  # imports and caches
    return timed(ways[reader])


def timed(work: Callable[[], int]) -> dict[str, float]:
    cpu, start = time.process_time(), time.perf_counter()
    count = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"images": count, "seconds": seconds, "cpu_seconds": cpu, "images_per_cpu_second": count / cpu}


def source_uri(kind: str, options: argparse.Namespace) -> str:
    """Fashion-MNIST as idx, as a snapshot or as a Parquet of pixels or of PNG files, made if need be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data.images import DecodePath
    from data.snapshot import ingest
    from data.sources import open_source
    from data.store import open_store
    from data.tables import png_bytes

    idx = f"idx:{options.fashion_mnist}"
    if kind == "idx":
        return idx
    source = open_source(idx)
    if kind == "snapshot":
        return f"snapshot:{ingest(source, DecodePath(), open_store(options.files / 'snapshots')).uri}"
    pixels = kind == "parquet_pixels"
    file = options.files / ("pixels.parquet" if pixels else "images.parquet")
    if not file.exists():
        images = (image for rows in source.listing() for image in source.read(rows).transpose(0, 3, 1, 2))
        file.parent.mkdir(parents=True, exist_ok=True)
        lists = pa.list_(pa.list_(pa.uint8()))
        column = (
            pa.array([list(image[0]) for image in images], lists) if pixels else [*map(png_bytes, images)]
        )
        pq.write_table(pa.table({"image": column}), file, row_group_size=8192)
    return f"parquet:{file}"


def trained_table(options: argparse.Namespace) -> str:
    """The table of the set by a flat VAE of D = 64, trained now unless it is there; its URI."""
    out = options.files / f"trained-{options.train_minutes:g}"
    manifest = next(out.glob("*/*/_manifest.json"), None)
    return str(manifest.parent.parent) if manifest else train_and_encode(options, out)


def train_and_encode(options: argparse.Namespace, out: Path) -> str:
    from training import read_idx, train_for

    from data.images import DecodePath
    from data.sources import open_source
    from data.store import open_store
    from data.tables import LatentColumns, encode_table, plan_encode
    from vae.config import FlatConfig, TrainConfig
    from vae.encode import Encoder

    shape = {"height": 28, "width": 28, "channels": 1}
    model = FlatConfig(**shape, latent_dim=DIMS, network="strided", hidden=(16, 32))
    config = TrainConfig(batch_size=64, learning_rate=3e-3)
    pixels = read_idx(options.fashion_mnist)["train"].pixels
    encoder = Encoder(train_for(60 * options.train_minutes, model, config, pixels).model)

    def numbers(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
        latents = encoder.encode(images, ids)
        return {"mu": latents.mu, "logvar": latents.logvar, "kl": latents.kl}

    source, columns = open_source(f"idx:{options.fashion_mnist}"), LatentColumns(DIMS)
    settings: dict[str, Any] = {"name": "trained", "weights_sha256": "0"}
    job = plan_encode(open_store(out), source, DecodePath(), columns, **settings)
    return encode_table(job, numbers).uri


def latents(which: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the columns of a trained model's table take, and would take under other settings."""
    files = [str(path) for path in sorted(Path(trained_table(options)).rglob("part-*.parquet"))]
    if which == "stored":
        return stored_share(files)
    with tempfile.TemporaryDirectory() as folder:
        return settings_compared(files, Path(folder))


def stored_share(files: list[str]) -> dict[str, float]:
    """Stored bytes of each float column over those of raw float32, from the files' own metadata."""
    import pyarrow.parquet as pq

    stored: dict[str, int] = {}
    values: dict[str, int] = {}
    for file in files:
        metadata = pq.ParquetFile(file).metadata
        for group in range(metadata.num_row_groups):
            for leaf in range(metadata.num_columns):
                column = metadata.row_group(group).column(leaf)
                name = column.path_in_schema.split(".")[0]
                if column.physical_type == "FLOAT":
                    stored[name] = stored.get(name, 0) + column.total_compressed_size
                    values[name] = values.get(name, 0) + column.num_values
    shares = {name: stored[name] / (4 * values[name]) for name in stored}
    return {**shares, "all": sum(stored.values()) / (4 * sum(values.values()))}


def settings_compared(files: list[str], folder: Path) -> dict[str, Any]:
    """The same columns rewritten under other settings: share of raw float32, and CPU seconds to write."""
    import pyarrow.parquet as pq

    table = pq.read_table(files, columns=["mu", "logvar", "kl"])
    leaves = ["mu.list.element", "logvar.list.element", "kl"]
    found = {}
    for level, split in ((1, True), (3, True), (9, True), (1, False)):
        options = {"use_byte_stream_split": leaves} if split else {}
        start, path = time.process_time(), folder / "again.parquet"
        pq.write_table(
            table,
            path,
            row_group_size=16_384,
            compression="zstd",
            compression_level=level,
            use_dictionary=False,
            **options,
        )
        name = f"zstd-{level}" + ("" if split else " without byte-stream-split")
        found[name] = {"share": stored_share([str(path)])["all"], "cpu_seconds": time.process_time() - start}
    return found


MEASURES: dict[str, Callable[..., Any]] = {
    "memory": memory,
    "sources": source_speed,
    "latents": latents,
    "reading": reading,
}
CASES = [
    *(f"memory {count}" for count in MEMORY),
    *(f"sources {kind}" for kind in SOURCES),
    "latents stored",
    "latents settings",
    *(f"reading {reader}" for reader in READERS),
]
ONCE = {case for case in CASES if case.startswith(("memory", "latents"))}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By measure and argument, the medians; of what ran once, that."""
    found: dict[str, Any] = {measure: {} for measure in MEASURES}
    for case, rounds in runs.items():
        measure, argument = case.split()
        found[measure][argument] = rounds[0] if case in ONCE else medians(rounds)
    return found


def costs(run: dict[str, float]) -> list[str]:
    """What larger sets cost, by the shard, from the run of 10^6."""
    rows, lines = run["rows"], ["| | 10^6 (run) | 10^8 | 10^9 |", "|---|---:|---:|---:|"]
    sets = (rows, 100 * rows, 1000 * rows)
    shards = [-(-int(count) // SHARD) for count in sets]
    lines.append(
        "| files of rows, and records listed to resume | " + " | ".join(f"{n:,}" for n in shards) + " |"
    )
    titles = {"parts": "rows", "plans": "plan files", "plan": "the plan's own JSON"}
    for name in ("parts", "plans", "records", "plan", "manifest"):
        cells = (_size(run[name] * count / rows) for count in sets)
        lines.append(f"| {titles.get(name, name)} | {' | '.join(cells)} |")
    hours = (f"{run['planning_cpu_seconds'] * count / rows / 60:,.3g} min" for count in sets)
    return [*lines, f"| listing and planning, CPU | {' | '.join(hours)} |"]


def _size(count: float) -> str:
    """Bytes for people.

    >>> _size(3400), _size(4.53e11)
    ('3.4 kB', '453 GB')
    """
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.0f} GB" if count >= 10 else f"{count:.2g} GB"


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    peaks = {count: report["memory"][str(count)]["peak_mib"] for count in MEMORY}
    few, many = peaks.values()
    lines = [
        *costs(report["memory"][str(MEMORY[-1])]),
        "",
        f"Peak memory of an encode of synthetic 32x32 images (D = {DIMS}, a trivial encoder, without torch): "
        + ", ".join(f"{count:,} images {peak:,.0f} MiB" for count, peak in peaks.items())
        + f", {100 * (many / few - 1):+.1f} %.",
        "",
        "| array-like source, 28x28, one worker | images a CPU-second |",
        "|---|---:|",
        *(f"| {name} | {one['images_per_cpu_second']:,.0f} |" for name, one in report["sources"].items()),
        "",
        f"Float columns of a model trained on Fashion-MNIST for {report['train_minutes']:g} CPU-minutes "
        f"(D = {DIMS}, 70,000 rows), stored bytes over raw float32: "
        + ", ".join(f"{name} {share:.3f}" for name, share in report["latents"]["stored"].items())
        + ". The same columns under other settings: "
        + "; ".join(
            f"{name} {one['share']:.3f} ({one['cpu_seconds']:.2f} s of CPU)"
            for name, one in report["latents"]["settings"].items()
        )
        + ".",
        "",
        "| reading that table's ids and `mu` | CPU seconds | seconds | over `read_latents` |",
        "|---|---:|---:|---:|",
    ]
    ours = report["reading"]["read_latents"]["cpu_seconds"]
    titles = ("`read_latents(uri)`", "`pandas.read_parquet(uri)` + `np.stack`", "the same with `columns=`")
    for title, one in zip(titles, report["reading"].values(), strict=True):
        cpu, seconds = one["cpu_seconds"], one["seconds"]
        lines.append(f"| {title} | {cpu:.3f} | {seconds:.3f} | {cpu / ours:.1f}x |")
    return "\n".join([*lines, "", f"{rounds_told(report['rounds'])}; {place(report)}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-minutes", type=float, default=1.0)
    parser.add_argument("--fashion-mnist", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--files", type=Path, default=FILES / "tables", help="what it makes is kept here")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; see above")
    parser.add_argument("--table", action="store_true", help="write the table of the rounds that are there")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure, argument = options.measure
        print(json.dumps(MEASURES[measure](argument, options)))
        return
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in GIVEN]
    rounds, minutes = options.rounds, options.minutes

    def run(case: str) -> dict[str, Any]:
        return alone(__file__, *case.split(), *given)

    if options.table or play("tables", CASES, run, rounds=rounds, minutes=minutes, once=ONCE):
        report = results("tables")
        rounds, runs = whole_rounds(report["runs"], CASES, ONCE)
        report |= {"rounds": rounds, "train_minutes": options.train_minutes, **summary(runs)}
        keep("tables", report, table(report))


if __name__ == "__main__":
    main()
