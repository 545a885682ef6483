"""Training, encoding and sampling on one GPU, beside its roofline, in at most nine minutes.

    python benchmarks/gpu.py --minutes 9 --out gpu.json

Needs torch, numpy and safetensors, and this repository's folder; no installation, no data: pixels are random.
For each model and batch size: the step as it comes, recorded as a CUDA graph, and compiled, in float32 and
with bfloat16 products; the images a second of each and its share of the roofline, beside the plainest loop (a
`loss.item()` each step, Adam not fused, float images indexed one by one on the host, as tutorials have it).
Then the kernels that the time goes to, and the rates of encoding and sampling. What the minutes don't reach
is named.

On a CPU (`--device cpu`) everything but the CUDA graph runs as well: that proves the program, and its figures
mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vae.config import FlatConfig, LadderConfig, ModelConfig, TrainConfig
from vae.encode import Encoder
from vae.feed import Array, Feed
from vae.linear import linear
from vae.model import Model, build
from vae.objective import training_loss
from vae.optimizer import Optimizer
from vae.progress import Meter
from vae.ranks import Ranks
from vae.sample import sample
from vae.step import Stepper

GREY: dict[str, Any] = {"height": 28, "width": 28, "channels": 1}
COLOUR: dict[str, Any] = {"height": 64, "width": 64, "channels": 3}
BLACK_AND_WHITE: dict[str, Any] = {**GREY, "likelihood": "bernoulli", "binarize": "threshold"}
MODELS: dict[str, ModelConfig] = {
    "mlp 28x28": FlatConfig(**BLACK_AND_WHITE, network="mlp", hidden=(400,), latent_dim=20),
    "conv 28x28": FlatConfig(**BLACK_AND_WHITE, hidden=(32, 64, 128), latent_dim=20),
    "conv 64x64x3": FlatConfig(**COLOUR, hidden=(32, 64, 128, 256), latent_dim=64),
    "ladder 28x28": LadderConfig(**GREY),
}
BATCHES = (128, 512, 2048)
WAYS = ("none", "graph", "compile")
PRECISIONS = ("float32", "bfloat16")
KERNELS = 12  # of a profile, that are shown


class Timer:
    """Seconds that the device was at work, by the wall clock between two moments when it was idle."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, work: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclasses.dataclass
class Bench:
    """What all measurements share: the device, how long each may take, and when to stop."""

    device: torch.device
    seconds: float
    until: float
    ways: tuple[str, ...]

    @property
    def timer(self) -> Timer:
        return Timer(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def over(self) -> bool:
        return time.perf_counter() > self.until

    def rate(self, work: Callable[[], object], images: int) -> float:
        """Images a second of repeated work, after two times that don't count."""
        once = min(self.timer(work) for _ in range(2))
        times = max(1, int(self.seconds / max(once, 1e-6)))
        return times * images / self.timer(lambda: [work() for _ in range(times)])


def pixels(config: ModelConfig, count: int) -> np.ndarray:
    """Random images."""
    return np.random.default_rng(0).integers(0, 256, (count, *config.image_shape), dtype=np.uint8)


def batches(feed: Feed) -> Iterator[torch.Tensor]:
    """Whole batches for ever."""
    epoch = 0
    while True:
        yield from (batch.images for batch in feed.epoch(epoch) if len(batch.images) == feed.batch_size)
        epoch += 1


def ours(bench: Bench, config: ModelConfig, train: TrainConfig) -> tuple[float, Callable[[], None]]:
    """(images a second, one step): batches picked on the device, the step, its figures."""
    model = build(config).to(bench.device).train()
    stepper = Stepper(model, train, Optimizer(model, train), Ranks())
    count = 8 * train.batch_size
    images = batches(Feed(Array(pixels(config, count)), 0, train.batch_size, 2**28, 2**40, bench.device))
    meter, step = Meter(bench.device), 0

    def one() -> None:
        nonlocal step
        meter.add(*stepper(next(images), step, 10**6, train.learning_rate))
        step += 1

    for _ in range(6):  # the first steps of a graph are taken as they come, and then recorded
        one()
    rate = bench.rate(one, train.batch_size)
    if not np.isfinite(meter.read_interval()).all():
        raise ArithmeticError(f"the loss of {config.model} is not finite after {step} steps")
    return rate, one


def plain(bench: Bench, config: ModelConfig, size: int) -> float:
    """Images a second of the plainest loop on the same network."""
    model = build(config).to(bench.device).train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)
    dataset = torch.from_numpy(pixels(config, 4 * size)).float()
    train = TrainConfig(batch_size=size)

    def one() -> None:
        batch = torch.stack([dataset[int(i)] for i in torch.randint(len(dataset), (size,))]).to(bench.device)
        if config.likelihood == "bernoulli":
            batch = (batch > 127).float() * 255
        noise = torch.randn(size, model.latent_dim, device=bench.device)
        loss, _ = training_loss(train, 1.0, model.infer(batch, noise), batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        loss.item()

    return bench.rate(one, size)


def work_of(model: Model, config: ModelConfig, size: int) -> tuple[float, float]:
    """(floating-point operations, bytes) that a step on a batch cannot do without.

    Operations of products and convolutions, there and back. Bytes: what the forward pass keeps for the
    backward pass, written and read once; weights, gradients and Adam's averages (read, written).
    """
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    device = model.device
    batch = torch.zeros((size, *config.image_shape), dtype=torch.uint8, device=device)
    noise = torch.zeros(size, model.latent_dim, device=device)
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # which torch's counter does not know
    counter = FlopCounterMode(display=False, custom_mapping={onednn: product_flops} if onednn else {})
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = training_loss(TrainConfig(), 1.0, model.infer(batch, noise), batch)
        loss.backward()
    weights = sum(p.numel() for p in model.parameters())
    return float(counter.get_total_flops()), float(2 * kept + 4 * weights * 9)


def product_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Of (N, I) and (O, I), by their shapes."""
    return 2 * x[0] * x[1] * weight[0]


def limits(bench: Bench) -> dict[str, float]:
    """What this device does at best, measured: products in either precision, and bytes moved."""
    side = 8192 if bench.on_gpu else 512
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(side, side, device=bench.device, dtype=dtype)
        found[f"{name} TFLOP/s"] = bench.rate(lambda a=a: linear(a, a), 2 * side**3) / 1e12  # type: ignore[misc]
    block = torch.empty(2**28 if bench.on_gpu else 2**22, device=bench.device)
    found["TB/s"] = bench.rate(lambda: block.add_(1.0), 2 * 4 * block.numel()) / 1e12
    return found


def training(bench: Bench, name: str, size: int, best: dict[str, float]) -> dict[str, Any]:
    """One model at one batch size, every way."""
    config = MODELS[name]
    flops, moved = work_of(build(config).to(bench.device), config, size)
    rows: dict[str, Any] = {"model": name, "batch": size, "MFLOP an image": flops / size / 1e6}
    rows["plain images/s"] = plain(bench, config, size)
    for precision, way in itertools.product(PRECISIONS, bench.ways):
        if bench.over() or (way == "graph" and not bench.on_gpu):
            rows[f"{way} {precision}"] = None  # not measured
            continue
        train = TrainConfig.from_dict({"batch_size": size, "acceleration": way, "precision": precision})
        rate, _ = ours(bench, config, train)
        seconds = max(flops / best[f"{precision} TFLOP/s"], moved / best["TB/s"]) / 1e12
        rows[f"{way} {precision}"] = {"images/s": rate, "of roofline": rate * seconds / size}
        torch.compiler.reset()
    return rows


def kernels(bench: Bench, name: str, size: int) -> list[dict[str, Any]]:
    """Where a step's time goes, by kernel (by operator on a CPU)."""
    from torch.profiler import ProfilerActivity, profile

    _, one = ours(bench, MODELS[name], TrainConfig(batch_size=size))
    kind = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        for _ in range(10):
            one()
        bench.timer(lambda: None)
    spent = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, spent))
    total = sum(getattr(row, spent) for row in rows) or 1
    return [{"kernel": row.key[:90], "share": getattr(row, spent) / total} for row in rows[:KERNELS]]


def using(bench: Bench, name: str, count: int) -> dict[str, Any]:
    """Encoding and sampling rates, images on the host to arrays on the host."""
    model = build(MODELS[name]).to(bench.device).eval()
    images, ids = pixels(MODELS[name], count), [str(number) for number in range(count)]
    encoder = Encoder(model)
    return {
        "model": name,
        "encoded images/s": bench.rate(lambda: encoder.encode(images, ids), count),
        "sampled images/s": bench.rate(lambda: sample(model, range(count)), count),
    }


def jobs(
    bench: Bench, options: argparse.Namespace, report: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is to be measured, each with its name, in the order of its worth."""

    def train(name: str, size: int) -> None:
        report["training"].append(training(bench, name, size, report["limits"]))

    for size in options.batches:
        for name in options.models:
            yield f"training {name} at {size}", partial(train, name, size)
    for name in options.models:
        yield f"using {name}", lambda: report["using"].append(using(bench, name, options.count))  # noqa: B023
    name, size = options.models[-1], options.batches[0]
    yield "kernels", lambda: report.update(kernels=kernels(bench, name, size))


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    bench = Bench(device, options.seconds, time.perf_counter() + 60 * options.minutes, tuple(options.ways))
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name() if bench.on_gpu else platform.processor() or "cpu",
        "torch": torch.__version__,
        "limits": limits(bench),
        "training": [],
        "using": [],
        "not reached": [],
    }
    for label, job in jobs(bench, options, report):
        if bench.over():
            report["not reached"].append(label)
            continue
        job()
        print(f"{label}: done", file=sys.stderr, flush=True)
    text = json.dumps(report, indent=1)
    Path(options.out).write_text(text + "\n") if options.out else None
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing is begun after these")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each rate is measured for")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--count", type=int, default=20_000, help="images to encode and sample")
    parser.add_argument("--out", default="", help="also write the JSON here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
