"""Encode a folder of images to a table of latents: ours beside what people write today, and the limits.

    python benchmarks/encode.py [--small 50000] [--large 5000] [--rounds 3] [--minutes 8]

Every contender reads the same files, runs the same small convolutional encoder on the CPU and writes
Parquet, in a process of its own, interleaved over rounds. CPU time is that of the process and its
children after imports; the figure is images per CPU-second, the median of the rounds. `threads` and
`processes` read and decode alone, two of them. Results go to benchmarks/results/encode.json run by run, and
in the end their table into docs/tables.md. Stopped, or out of --minutes, the same command goes on.

Small images are Fashion-MNIST's, as 28x28 grey PNG files; large ones are JPEG crops of 500x375 pixels of
the two photographs that scikit-learn ships.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from report import FILES, alone, keep, medians, place, play, results, rounds_told, whole_rounds

BATCH = 256
DIMS = 64
GEOMETRY = {"small": (1, 28, 28), "large": (3, 64, 64)}
CONTENDERS = ("imagefolder", "datasets", "ours", "threads", "processes", "decode", "forward", "forward_kept")
CASES = [f"{kind} {contender}" for kind in GEOMETRY for contender in CONTENDERS]
# A round of `datasets` takes longer than one of all the others: it runs in the first alone.
ONCE = [case for case in CASES if case.endswith(" datasets")]
TITLES = {
    "imagefolder": "`ImageFolder` + `DataLoader` + `pandas.to_parquet`",
    "datasets": "`datasets.map` on the folder",
    "ours": "ours, whole: listing, hashes, lineage, commits",
    "threads": "ours, reading and decoding alone, two threads",
    "processes": "the same in two processes, batches sent back",
    "decode": "limit: read and decode only (OpenCV; simplejpeg)",
    "forward": "limit: forward only",
    "forward_kept": "forward only, with our setting of the allocator",
}


def make_files(folder: Path, kind: str, count: int) -> None:
    """Write `count` image files, in ten class folders."""
    make = small_images if kind == "small" else large_images
    suffix = "png" if kind == "small" else "jpg"
    for number, (image, label) in enumerate(make(count)):
        path = folder / str(label) / f"{number:06d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def small_images(count: int) -> Any:
    from PIL import Image

    from data.sources import open_source

    source = open_source("idx:/usr/share/datasets/fashion-mnist")
    made = 0
    for rows in source.listing():
        for pixels, label in zip(source.read(rows), rows["label"].to_pylist(), strict=True):
            if made == count:
                return
            yield Image.fromarray(np.asarray(pixels)[..., 0]), label
            made += 1


def large_images(count: int) -> Any:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % 2]
        top, left = rng.integers(0, [photograph.shape[0] - 375, photograph.shape[1] - 500])
        yield Image.fromarray(photograph[top : top + 375, left : left + 500]), number % 10


def build_model(kind: str) -> Any:
    """A small convolutional encoder: images uint8 (B, C, H, W) -> mean and log-variance (B, D)."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    channels, height, width = GEOMETRY[kind]
    body = nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 2 * DIMS),
    ).eval()

    def encode(images: Any) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            x = images if images.is_floating_point() else images.float() / 255
            mean, logvar = body(x).chunk(2, 1)
            return mean.contiguous().numpy(), logvar.contiguous().numpy()

    return encode


def imagefolder(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """What people write today: ImageFolder, DataLoader, pandas."""
    import pandas as pd
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    encode = build_model(kind)
    shape = (
        [transforms.Grayscale()] if kind == "small" else [transforms.Resize(64), transforms.CenterCrop(64)]
    )

    def run() -> int:
        files = datasets.ImageFolder(str(folder), transforms.Compose([*shape, transforms.ToTensor()]))
        loader = DataLoader(files, batch_size=BATCH, num_workers=2)
        means, logvars = zip(*(encode(images) for images, _ in loader), strict=True)
        frame = pd.DataFrame({"path": [path for path, _ in files.samples]})
        frame["mu"], frame["logvar"] = list(np.concatenate(means)), list(np.concatenate(logvars))
        frame.to_parquet(out / "latents.parquet")
        return len(frame)

    return run


def hugging_face(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """datasets.map over the folder, then to_parquet."""
    import datasets
    import torch
    from torchvision import transforms

    encode = build_model(kind)
    shape = (
        [transforms.Grayscale()] if kind == "small" else [transforms.Resize(64), transforms.CenterCrop(64)]
    )
    prepare = transforms.Compose([*shape, transforms.ToTensor()])

    def step(batch: dict[str, Any]) -> dict[str, Any]:
        mu, logvar = encode(torch.stack([prepare(image.convert("RGB")) for image in batch["image"]]))
        return {"mu": mu, "logvar": logvar}

    def run() -> int:
        cache = str(out / "cache")
        rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
        rows = rows.map(step, batched=True, batch_size=BATCH, remove_columns=["image"])
        rows.to_parquet(str(out / "latents.parquet"))
        return len(rows)

    return run


def ours(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """plan_encode and encode_table, with hashes, lineage, rejects and the commit protocol."""
    import cv2  # noqa: F401  imported before the clock starts, as every contender's libraries are
    import pandas  # noqa: F401  pyarrow imports it with its first array
    import torch

    from data.store import open_store
    from data.tables import LatentColumns, encode_table, plan_encode

    encode = build_model(kind)

    def numbers(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
        mu, logvar = encode(torch.from_numpy(images))
        return {"mu": mu, "logvar": logvar}

    def run() -> int:
        job = plan_encode(
            open_store(out),
            *our_source(kind, folder),
            LatentColumns(DIMS, kl=False),
            name="benchmark",
            weights_sha256="0",
            batch_size=BATCH,
        )
        return encode_table(job, numbers).rows

    return run


def threads(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """The reading half of ours: listed, read, hashed and decoded into batches, in two threads."""
    import cv2  # noqa: F401

    from data.batches import stream

    source, path = our_source(kind, folder)
    return lambda: sum(len(batch.images) for batch in stream(source, path, BATCH, workers=2))


def processes(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """The same in two processes, each batch of pixels sent back."""
    import cv2  # noqa: F401

    from data.batches import rebatch

    source, _ = our_source(kind, folder)

    def run() -> int:
        with ProcessPoolExecutor(2) as pool:
            pieces = [(kind, folder, rows) for rows in rebatch(source.listing(), BATCH)]
            return sum(len(batch.images) for batch in pool.map(read_piece, pieces))

    return run


def read_piece(piece: tuple[str, Path, Any]) -> Any:
    """A worker process's batch."""
    from data.batches import read_rows

    kind, folder, rows = piece
    source, path = our_source(kind, folder)
    return read_rows(source, rows, path)


@cache
def our_source(kind: str, folder: Path) -> tuple[Any, Any]:
    from data.images import DecodePath
    from data.sources import open_source

    channels, height, width = GEOMETRY[kind]
    return open_source(f"folder:{folder}"), DecodePath(height, width, channels)


def decode_only(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """The limit of reading: the fastest decoder on each file, and Pillow's resize where one is needed."""
    import cv2
    import simplejpeg
    from PIL import Image

    cv2.setNumThreads(0)
    files = sorted(folder.rglob("*.*"))

    def decode(data: bytes) -> Any:
        if kind == "small":
            return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
        # Its fastest too: at 3/8 of the size, still at least twice the geometry.
        scaled = Image.fromarray(simplejpeg.decode_jpeg(data, min_height=128, min_width=128))
        edge = (scaled.width - scaled.height) / 2
        box = (edge, 0, scaled.width - edge, scaled.height)
        return np.asarray(scaled.resize((64, 64), Image.Resampling.BILINEAR, box=box))

    return lambda: len([decode(path.read_bytes()).shape for path in files])


def forward_only(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """The limit of the model: batches that are in memory already."""
    import torch

    encode = build_model(kind)
    count = sum(1 for _ in folder.rglob("*.*"))
    batch = torch.randint(0, 256, (BATCH, *GEOMETRY[kind]), dtype=torch.uint8)

    def run() -> int:
        for _ in range(0, count, BATCH):
            encode(batch)
        return count

    return run


def forward_kept(kind: str, folder: Path, out: Path) -> Callable[[], int]:
    """Forward only in a process whose allocator keeps what is freed, as ours does."""
    from data.heap import keep_freed_memory

    keep_freed_memory()
    return forward_only(kind, folder, out)


MAKERS = dict(
    zip(
        CONTENDERS,
        (imagefolder, hugging_face, ours, threads, processes, decode_only, forward_only, forward_kept),
        strict=True,
    )
)


def measure(contender: str, kind: str, folder: Path) -> dict[str, float]:
    """Run one contender here and say what it took."""
    with tempfile.TemporaryDirectory() as out:
        run = MAKERS[contender](kind, folder, Path(out))
        before, start = _cpu(), time.perf_counter()
        images = run()
        seconds, cpu = time.perf_counter() - start, _cpu() - before
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "images": images,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "images_per_cpu_second": images / cpu,
        "images_per_second": images / seconds,
        "peak_mib": peak / 1024,
    }


def _cpu() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ratios(result: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours over each peer, and over what decode and forward together allow."""
    speed = {name: figures["images_per_cpu_second"] for name, figures in result.items()}
    bounds = {name: 1 / (1 / speed["decode"] + 1 / speed[name]) for name in ("forward", "forward_kept")}
    return {
        "over_imagefolder": speed["ours"] / speed["imagefolder"],
        "over_datasets": speed["ours"] / speed["datasets"],
        "of_the_bound": speed["ours"] / bounds["forward"],
        "of_the_bound_kept": speed["ours"] / bounds["forward_kept"],
        "threads_over_processes": speed["threads"] / speed["processes"],
    }


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    kinds = {"small": "28x28 PNG", "large": "500x375 JPEG to 64x64"}
    kinds = {kind: title for kind, title in kinds.items() if kind in report}
    counts = [f"{report[kind]['ours']['images']:,.0f} of {title}" for kind, title in kinds.items()]
    heads = [f"{title}: images a CPU-second | a second | peak MiB" for title in kinds.values()]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * 3 * len(kinds)]
    for name in CONTENDERS:
        cells = (report[kind][name] for kind in kinds)
        shown = [
            f"{c['images_per_cpu_second']:,.0f} | {c['images_per_second']:,.0f} | {c['peak_mib']:,.0f}"
            for c in cells
        ]
        lines.append(f"| {TITLES[name]} | {' | '.join(shown)} |")
    ratios = [f"{title}: {tell(report[kind]['ratios'])}" for kind, title in kinds.items()]
    where = f"{rounds_told(report['rounds'])} (`datasets`: one); {' and '.join(counts)}; "
    return "\n".join([*lines, "", f"{where}{place(report)}.", "", *(f"* {line}" for line in ratios)])


def tell(ratios: dict[str, float]) -> str:
    return (
        f"ours is {ratios['over_imagefolder']:.1f}x ImageFolder, {ratios['over_datasets']:.1f}x `datasets`, "
        f"and {ratios['of_the_bound_kept']:.2f} of what decoding and forward pass together allow "
        f"({ratios['of_the_bound']:.2f} where that forward pass runs without our setting of the allocator)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", type=int, default=50_000)
    parser.add_argument("--large", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=Path, default=FILES, help="where the image files are, or are made")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; see above")
    parser.add_argument("--table", action="store_true", help="write the table of the rounds that are there")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        contender, kind, folder = options.measure
        print(json.dumps(measure(contender, kind, Path(folder))))
        return
    if not options.table and not run_all(options):
        return
    report = results("encode")
    rounds, runs = whole_rounds(report["runs"], CASES, ONCE)
    report |= {"rounds": rounds, **summary(runs)}
    keep("encode", report, table(report))
    print(table(report))


def run_all(options: argparse.Namespace) -> bool:
    """Make the files and run what is left of the rounds; False when the time was over before."""
    folders = {kind: options.files / kind for kind in GEOMETRY}
    for kind, folder in folders.items():
        if not folder.exists():
            make_files(folder, kind, getattr(options, kind))

    def run(case: str) -> dict[str, Any]:
        kind, contender = case.split()
        return alone(__file__, contender, kind, str(folders[kind]))

    rounds, minutes = options.rounds, options.minutes
    return play("encode", CASES, run, rounds=rounds, minutes=minutes, once=ONCE) is not None


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By kind of images, each contender's medians and the ratios of all."""
    found: dict[str, Any] = {kind: {} for kind in GEOMETRY}
    for case, rounds in runs.items():
        kind, contender = case.split()
        found[kind][contender] = medians(rounds)
    return {kind: {**speeds, "ratios": ratios(speeds)} for kind, speeds in found.items()}


if __name__ == "__main__":
    main()
