"""Training beside its peers and its limit: one process a variant, an epoch each in turn, on the same images.

    python benchmarks/train.py --data DIR --examples main.py --pythae PYTHON --rounds 5

DIR holds Fashion-MNIST's idx files; main.py is pytorch/examples' vae/main.py; PYTHON is an interpreter that
has pythae and torch. Neither peer is part of this repository: their own training loops run, from where they
are installed. Every variant trains the same network (Kingma and Welling's MLP 784-400-20, or convolutions
32-64-128) on the same statically binarised images, with the same batch and optimizer (Adam, 1e-3), on as many
threads as OMP_NUM_THREADS says. Only one process works at a time: it takes an epoch and waits, so that what
two of them are compared by lies seconds apart, on machines whose speed changes from minute to minute.

Rounds go on where an earlier call stopped; `--elbo` scores each variant after equal epochs instead; `--table`
prints the table of what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/train.json"
BATCH, RATE, LATENT = 128, 1e-3, 20
SETTINGS: dict[str, Any] = {"batch_size": BATCH, "learning_rate": RATE}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"network": "mlp", "hidden": (400,)},
    "conv": {"network": "conv", "hidden": (32, 64, 128)},
}
IMAGES = {"mlp": 19_200, "conv": 2_560}  # trained on in a timed epoch, of which there are
EPOCHS = {"mlp": 10, "conv": 4}
ELBO_EPOCHS = {"mlp": 2, "conv": 1}
ELBO_IMAGES = {"mlp": 60_000, "conv": 15_000}
VARIANTS = ("examples", "pythae", "ours", "limit", "bare", "ours_bfloat16", "limit_bfloat16")
PRECISIONS = ("", "_bfloat16")  # of ours: float32, which is the default on a CPU, and products in bfloat16
GOALS = {
    "mlp": {"examples": 3.0, "pythae": 1.5, "limit": 0.95},
    "conv": {"examples": 1.4, "pythae": 1.25, "limit": 0.95},
}


def binarised(folder: str, split: str) -> np.ndarray:
    """One split as uint8 (N, 1, 28, 28), 0 or 255."""
    plain = Path(folder, f"{split}-images-idx3-ubyte")
    data = plain.read_bytes() if plain.exists() else gzip.decompress(Path(f"{plain}.gz").read_bytes())
    images = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return (images > 127) * np.uint8(255)


def our_config(name: str) -> Any:
    from vae.config import FlatConfig

    geometry = {"height": 28, "width": 28, "channels": 1, "latent_dim": LATENT}
    return FlatConfig(**geometry, likelihood="bernoulli", **MODELS[name])


class Turns:
    """The epochs of a process, each begun when the other end of the line says so, and their seconds."""

    def __init__(self, line: int):
        self.line = socket.socket(fileno=line)
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._began: tuple[float, float] | None = None

    def next(self) -> None:
        """An epoch begins, and the one before it has ended."""
        self.end()
        self.line.recv(1)
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """The epoch has ended; before the first, all is ready."""
        if self._began is not None:
            self.wall.append(time.perf_counter() - self._began[0])
            self.cpu.append(time.process_time() - self._began[1])
            self._began = None
        self.line.send(b".")


# A variant: (model, training images, epochs, what to call before each) -> its trained network, x in [0, 1]
# (B, 1, 28, 28) -> (probabilities (B, 784) with noise eps (B, D), mean, log-variance).
Network = Callable[[Any, Any], tuple[Any, Any, Any]]


def ours(
    name: str, images: np.ndarray, epochs: int, turn: Callable[[], None], precision: str = "float32"
) -> Network:
    """`fit`, as `vae-flows train --precision` calls it."""
    from data.heap import keep_freed_memory
    from vae.config import TrainConfig
    from vae.train import fit

    keep_freed_memory()
    asked, steps = itertools.count(), -(-len(images) // BATCH)

    def stop() -> bool:
        if next(asked) % steps == 0:
            turn()
        return False

    config = TrainConfig(epochs=epochs, precision=precision, **SETTINGS)
    model = fit(our_config(name), config, images, stop=stop).model
    return lambda x, eps: _through_ours(model, x, eps)


def _through_ours(model: Any, x: Any, eps: Any) -> tuple[Any, Any, Any]:
    found = model.infer((x * 255).round(), eps)
    return found.likelihood.mean.flatten(1), found.mean, found.logvar


def limit(
    name: str, images: np.ndarray, epochs: int, turn: Callable[[], None], precision: str = "float32"
) -> Network:
    """Our step on one batch that stays where it is, its noise drawn once: no data, no order, no draws."""
    import torch

    from vae.config import TrainConfig
    from vae.optimizer import Optimizer
    from vae.progress import Meter
    from vae.ranks import Ranks
    from vae.step import Stepper

    config = TrainConfig(precision=precision, **SETTINGS)
    model = _ready(name)
    stepper, meter = Stepper(model, config, Optimizer(model, config), Ranks()), Meter("cpu")
    x, noise = torch.from_numpy(images[:BATCH]), torch.randn(BATCH, 1, LATENT)
    _repeat(lambda: meter.add(*stepper.act(x, x, noise, RATE)), len(images) // BATCH, epochs, turn)
    return lambda x, eps: _through_ours(model, x, eps)


def bare(name: str, images: np.ndarray, epochs: int, turn: Callable[[], None]) -> Network:
    """The same without our figures and without the guard against exploding gradients."""
    import torch

    from vae.config import TrainConfig
    from vae.objective import training_loss

    model, config = _ready(name), TrainConfig()
    adam = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    x, noise = torch.from_numpy(images[:BATCH]), torch.randn(BATCH, LATENT)

    def step() -> None:
        loss, _ = training_loss(config, 1.0, model.infer(x, noise), x)
        adam.zero_grad()
        loss.backward()
        adam.step()

    _repeat(step, len(images) // BATCH, epochs, turn)
    return lambda x, eps: _through_ours(model, x, eps)


def _ready(name: str) -> Any:
    """Our model, in a process whose allocator is set as `vae-flows train` sets it."""
    from data.heap import keep_freed_memory
    from vae.model import build

    keep_freed_memory()
    return build(our_config(name)).train()


def _repeat(step: Callable[[], object], steps: int, epochs: int, turn: Callable[[], None]) -> None:
    for _ in range(epochs):
        turn()
        for _ in range(steps):
            step()


def peer_network(name: str) -> Any:
    """Our network as the peers' users write it, of torch's own layers: x in [0, 1] -> (probabilities, mean,
    log-variance)."""
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, features = {"mlp": mlp, "conv": convolutions}[name](nn)
            self.posterior_head = nn.Linear(features, 2 * LATENT)

        def encode(self, x: Any) -> tuple[Any, Any]:
            mean, logvar = self.posterior_head(self.encoder(x.view(-1, 1, 28, 28))).chunk(2, 1)
            return mean, logvar

        def decode(self, z: Any) -> Any:
            return torch.sigmoid(self.decoder(z)).flatten(1)

        def forward(self, x: Any) -> tuple[Any, Any, Any]:
            mean, logvar = self.encode(x)
            return self.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)), mean, logvar

    return Network()


def mlp(nn: Any) -> tuple[Any, Any, int]:
    """(encoder, decoder, features between encoder and latent)."""
    (hidden,) = MODELS["mlp"]["hidden"]
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU())
    decoder = nn.Sequential(nn.Linear(LATENT, hidden), nn.ReLU(), nn.Linear(hidden, 784))
    return encoder, nn.Sequential(decoder, nn.Unflatten(1, (1, 28, 28))), hidden


def convolutions(nn: Any) -> tuple[Any, Any, int]:
    """The same: 28 -> 14 -> 7 -> 4 by pooling, and back by transposed convolutions, cropped."""

    class Crop(nn.Module):  # type: ignore[misc]
        def __init__(self, size: int):
            super().__init__()
            self.size = size

        def forward(self, x: Any) -> Any:
            return x[..., : self.size, : self.size]

    channels = (1, *MODELS["conv"]["hidden"])
    down = [
        (nn.Conv2d(i, o, 3, padding=1), nn.MaxPool2d(2, ceil_mode=True), nn.SiLU())
        for i, o in itertools.pairwise(channels)
    ]
    up = [
        (nn.SiLU(), nn.ConvTranspose2d(i, o, 4, stride=2, padding=1), Crop(size))
        for (i, o), size in zip(itertools.pairwise(channels[::-1]), (7, 14, 28), strict=True)
    ]
    features = channels[-1] * 4 * 4
    start = [nn.Linear(LATENT, features), nn.Unflatten(1, (channels[-1], 4, 4))]
    encoder = nn.Sequential(*itertools.chain.from_iterable(down), nn.Flatten())
    return encoder, nn.Sequential(*start, *itertools.chain.from_iterable(up)), features


def examples(name: str, images: np.ndarray, epochs: int, turn: Callable[[], None], program: str) -> Network:
    """pytorch/examples' program, its own loader, loss and loop; the convolutions are put into it."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        put_mnist(Path(folder, "data/MNIST/raw"), images)
        Path(folder, "run").mkdir()
        os.chdir(Path(folder, "run"))
        example = load_program(program)
        if name != "mlp":
            example.model = peer_network(name)
            example.optimizer = torch.optim.Adam(example.model.parameters(), lr=RATE)
        for epoch in range(epochs):
            turn()
            example.train(epoch)
        os.chdir("/")
    return lambda x, eps: _through_peer(example.model, x, eps)


def load_program(program: str) -> ModuleType:
    """The program's definitions, data and model, without its main loop; what it prints is not shown."""
    sys.argv = [program, "--batch-size", str(BATCH), "--no-accel"]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end of this process
    spec = importlib.util.spec_from_file_location("example", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_mnist(folder: Path, images: np.ndarray) -> None:
    """The images where torchvision looks for MNIST that it has downloaded."""
    folder.mkdir(parents=True)
    for split, part in (("train", images), ("t10k", images[:BATCH])):
        sizes = np.array([0x803, len(part), 28, 28], ">i4").tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(sizes + part.tobytes())
        labels = np.array([0x801, len(part)], ">i4").tobytes() + bytes(len(part))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)


def _through_peer(model: Any, x: Any, eps: Any) -> tuple[Any, Any, Any]:
    import torch

    mean, logvar = model.encode(x.flatten(1))
    return model.decode(mean + torch.exp(0.5 * logvar) * eps), mean, logvar


def pythae(name: str, images: np.ndarray, epochs: int, turn: Callable[[], None]) -> Network:
    """pythae's VAE and BaseTrainer, its own loader, loss and loop, with this network in it."""
    import logging

    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.WARNING)
    network = peer_network(name)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.head = network.encoder, network.posterior_head

        def forward(self, x: Any) -> Any:
            mean, logvar = self.head(self.network(x)).chunk(2, 1)
            return ModelOutput(embedding=mean, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.decoder

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.network(z)))

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce")
    pixels = torch.from_numpy(images).float() / 255
    with tempfile.TemporaryDirectory() as folder:
        settings = BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, learning_rate=RATE, no_cuda=True
        )
        trainer = BaseTrainer(
            model=VAE(config, encoder=Encoder(), decoder=Decoder()),
            train_dataset=BaseDataset(pixels, torch.zeros(len(pixels))),
            training_config=settings,
        )
        trainer.prepare_training()
        for epoch in range(1, epochs + 1):
            turn()
            trainer.train_step(epoch)
        return lambda x, eps: _through_peer(network, x, eps)


def elbo_of(network: Network, images: np.ndarray) -> tuple[float, float]:
    """(mean, standard error) over the images in nats, of one draw each, the same for every variant."""
    import torch
    import torch.nn.functional as F

    noise = torch.randn(len(images), LATENT, generator=torch.Generator().manual_seed(0))
    found = []
    with torch.no_grad():
        for start in range(0, len(images), 500):
            x = torch.from_numpy(images[start : start + 500]).float() / 255
            p, mean, logvar = network(x, noise[start : start + 500])
            error = F.binary_cross_entropy(p, x.flatten(1), reduction="none").sum(1)
            found.append(-error + 0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1))
    values = torch.cat(found).double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def one(options: argparse.Namespace, turns: Turns) -> dict[str, Any]:
    """What one process measures."""
    import torch

    images = binarised(options.data, "train")
    warm, timed = (0, ELBO_EPOCHS[options.model]) if options.elbo else (1, EPOCHS[options.model])
    images = images[: (ELBO_IMAGES if options.elbo else IMAGES)[options.model]]
    torch.manual_seed(options.round)
    kind, _, precision = options.one.partition("_")
    play: dict[str, Callable[..., Network]] = {
        "examples": partial(examples, program=str(Path(options.examples).resolve())),
        "pythae": pythae,
        "ours": partial(ours, precision=precision or "float32"),
        "limit": partial(limit, precision=precision or "float32"),
        "bare": bare,
    }
    network = play[kind](options.model, images, warm + timed, turns.next)
    turns.end()
    result = {
        "model": options.model,
        "variant": options.one,
        "round": options.round,
        "images": len(images),  # of an epoch, each of which took
        "seconds": turns.wall[warm:],
        "cpu_seconds": turns.cpu[warm:],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if options.elbo:
        result["elbo"], result["error"] = elbo_of(network, binarised(options.data, "t10k"))
    return result


class Contender:
    """A variant in a process of its own, which works only while `take_turn` waits for it."""

    def __init__(self, options: argparse.Namespace, model: str, variant: str, number: int):
        self.name = f"{variant} on {model}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as this object
        self.line, theirs = socket.socketpair()
        command = [options.pythae if variant == "pythae" else sys.executable, __file__, "--one", variant]
        settings = {
            "--data": options.data,
            "--model": model,
            "--round": number,
            "--examples": options.examples,
            "--line": theirs.fileno(),
        }
        command += [str(part) for setting in settings.items() for part in setting]
        self.process = subprocess.Popen(
            [*command, *(["--elbo"] if options.elbo else [])],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )
        theirs.close()
        self.line.recv(1)  # it is ready, or has failed

    def take_turn(self) -> None:
        """One epoch, if it lives."""
        with contextlib.suppress(OSError):
            self.line.send(b".")
            self.line.recv(1)

    def result(self) -> dict[str, Any] | None:
        """What it measured; None where it failed, with the reason on standard error."""
        with self.line.makefile() as line:
            result = line.read()
        if self.process.wait():
            self.errors.seek(0)
            print(f"{self.name} failed: {self.errors.read().strip()[-800:]}", file=sys.stderr)
            return None
        found: dict[str, Any] = json.loads(result)
        return found


def measure(options: argparse.Namespace, model: str, variants: list[str], number: int) -> None:
    """A round of these variants, which take an epoch each in turn."""
    contenders = [Contender(options, model, variant, number) for variant in variants]
    epochs = ELBO_EPOCHS[model] if options.elbo else 1 + EPOCHS[model]
    for _ in range(epochs):
        for contender in contenders:
            contender.take_turn()
    for contender in contenders:
        if (run := contender.result()) is not None:
            add(run)
            print(json.dumps(run), flush=True)


def read() -> list[dict[str, Any]]:
    """What was measured before."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def add(run: dict[str, Any]) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.report import machine

    runs = [*read(), run | {"at": datetime.now(UTC).isoformat(timespec="minutes")}]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**machine(), "runs": runs}, indent=1) + "\n")


def table(runs: list[dict[str, Any]]) -> str:
    """Medians over the turns, of ours to each in the same turn too; goals; the ELBO after equal epochs."""
    lines = [
        "| model | threads | variant | rounds | images/s | per CPU-s | ours is | in bfloat16 | goal "
        "| peak MiB | test ELBO |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    scored = {(run["model"], run["variant"]): run for run in runs if "elbo" in run}
    for model in MODELS:
        for threads in sorted({run["threads"] for run in runs}):
            mine = [run for run in runs if (run["model"], run["threads"]) == (model, threads)]
            there = [variant for variant in VARIANTS if _timed_runs(mine, variant)]
            lines += [_line(model, threads, one, mine, scored.get((model, one))) for one in there]
    return "\n".join(lines)


def _line(
    model: str, threads: int, variant: str, runs: list[dict[str, Any]], scored: dict[str, Any] | None
) -> str:
    wall, cpu, peak = _speeds(runs, variant)
    ratios = [_ratio(runs, f"ours{precision}", variant) for precision in PRECISIONS]
    elbo = f"{scored['elbo']:.2f} ± {scored['error']:.2f}" if scored else ""
    goal = GOALS[model].get(variant.partition("_")[0], "")
    cells = [model, threads, variant, len(_timed_runs(runs, variant)), f"{wall:,.0f}", f"{cpu:,.0f}", *ratios]
    return f"| {' | '.join(map(str, [*cells, goal, f'{peak:,.0f}', elbo]))} |"


def _ratio(runs: list[dict[str, Any]], mine: str, variant: str) -> str:
    """How many times as many images a second, the median of the turns that both took, one after the other.

    Empty beside itself and beside a limit of another precision.
    """
    kind, _, precision = variant.partition("_")
    same = mine.partition("_")[2] == precision
    ours, theirs = ({run["round"]: run["seconds"] for run in _timed_runs(runs, v)} for v in (mine, variant))
    both = ours.keys() & theirs.keys()
    if kind == "ours" or (kind in ("limit", "bare") and not same) or not both:
        return ""
    turns = [turn for number in both for turn in zip(theirs[number], ours[number], strict=True)]
    return f"{statistics.median(their / our for their, our in turns):.2f} x"


def _timed_runs(runs: list[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["variant"] == variant and "elbo" not in run]


def _speeds(runs: list[dict[str, Any]], variant: str) -> tuple[float, float, float]:
    """Medians: images a second, images a CPU-second, peak MiB."""
    timed = _timed_runs(runs, variant)
    wall, cpu = (
        statistics.median(run["images"] / seconds for run in timed for seconds in run[clock])
        for clock in ("seconds", "cpu_seconds")
    )
    return wall, cpu, statistics.median(run["peak_mib"] for run in timed)


def variants(options: argparse.Namespace) -> list[str]:
    """Those whose programs were given; the limits have no ELBO to score."""
    found = [v for v in options.variants if getattr(options, v, True)]
    return [v for v in found if not (options.elbo and v.startswith(("limit", "bare")))]


def main() -> None:
    options = _options()
    if options.one:
        turns = Turns(options.line)
        turns.line.sendall(json.dumps(one(options, turns)).encode())
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for number, model in itertools.product(range(1, options.rounds + 1), options.models):
        if not options.table and (missing := _missing(options, model, number)):
            measure(options, model, missing, number)
    print(table(read()))


def _missing(options: argparse.Namespace, model: str, number: int) -> list[str]:
    """The variants that no earlier call has measured in this round."""
    threads = int(os.environ["OMP_NUM_THREADS"])
    kind = [run for run in read() if ("elbo" in run) == options.elbo]
    there = {
        run["variant"]
        for run in kind
        if (run["model"], run["round"], run["threads"]) == (model, number, threads)
    }
    return [variant for variant in variants(options) if variant not in there]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="folder of idx files")
    parser.add_argument("--examples", default="", help="pytorch/examples' vae/main.py")
    parser.add_argument("--pythae", default="", help="a Python interpreter that has pythae")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--elbo", action="store_true", help="score after equal epochs, instead of timing")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    for internal in ("--one", "--model"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    for internal in ("--round", "--line"):
        parser.add_argument(internal, type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
