"""Training that goes wrong: a loss that is no number, a machine without memory for its batches."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import bodies
from tests.faults.trials import NOTHING, Experiment, Found, found_in_child, in_child, unless

TRAININGS = 4  # a batch
TRIES = 4  # at a limit of memory that is met, each with less of it
SMALLEST, WHOLE = 2, 32  # images at once, where memory is least and where it is enough
# mallopt's M_ARENA_MAX and M_MMAP_THRESHOLD: what is reserved is in use, and what is freed given back
PLAIN_HEAP = ((-8, 1), (-3, 1 << 16))
WENT_BACK = re.compile(r"(?:by|after) step (\d+).*back to step (\d+), learning rate times ([\d.e-]+)")
Blobs = dict[int, bytes]


# -- a loss that is no number


def diverging(rng: np.random.Generator) -> tuple[Any, Any]:
    """A model and a training of it whose rate rises until something overflows."""
    from vae.config import FlatConfig, TrainConfig

    model = FlatConfig(
        height=8,
        width=8,
        channels=1,
        network="mlp",
        hidden=(32,),
        latent_dim=2,
        likelihood=str(rng.choice(["gaussian", "discretized_logistic"])),
    )
    training = TrainConfig(
        epochs=6,
        batch_size=16,
        learning_rate=float(10 ** rng.uniform(0.3, 1)),
        learning_rate_warmup_epochs=float(rng.uniform(0, 6)),
        gradient_skip=float(rng.choice([0, 20])),
        ema_decay=float(rng.choice([0, 0.9])),
        rollbacks=int(rng.choice([0, 1, 3, 12])),
        log_every=int(rng.integers(1, 5)),
        checkpoint_every=int(rng.integers(1, 5)),
        seed=int(rng.integers(1000)),
    )
    return model, training


def non_finite(seed: int, folder: Path, shared: Path, count: int = TRAININGS) -> Found:
    """Trainings that overflow: nothing of it is saved; back to a checkpoint and slower, or a clear end."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (64, 1, 8, 8), np.uint8)
    spoilt = int(rng.integers(TRAININGS))  # this one begins with weights that overflow at once
    return sum((overflowed(*diverging(rng), images, n == spoilt) for n in range(count)), Found(0))


def overflowed(model: Any, training: Any, images: np.ndarray, spoilt: bool) -> Found:
    """One training: what it saved, what it said, and what it ended with."""
    from vae.model import build
    from vae.train import NonFiniteLoss, fit

    initial = build(model, training.seed).state_dict()
    if spoilt:
        initial = {name: tensor + 1e30 for name, tensor in initial.items()}
    said, blobs, error = listen(), Blobs(), ""
    try:
        ended = fit(model, training, images, initial=initial, save=blobs.__setitem__)
    except NonFiniteLoss as raised:
        error = str(raised)
    back = [(int(m[1]), int(m[2]), m[3]) for line in said if (m := WENT_BACK.search(line))]
    found = Found(len(back) + bool(error)) + finite(blobs) + went_back(back, training.checkpoint_every)
    if error:
        clear = "\n" not in error and f"gone back {training.rollbacks} times" in error
        return found + unless(clear and len(back) == training.rollbacks, f"{len(back)} times, then {error}")
    if not back:
        return found
    expected = slower(model, training, images, initial, blobs.get(back[-1][1]), 0.5 ** len(back))
    return found + unless(_weights(ended.model) == expected, "not the weights of half the rate")


def listen() -> list[str]:
    """What `vae` warns of from now on."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vae").handlers = [handler]
    return lines


def finite(blobs: Blobs) -> Found:
    """Torn if a checkpoint has a tensor that is not."""
    from vae import checkpoint

    bad = [
        s for s, b in blobs.items() if not all(t.isfinite().all() for t in checkpoint.unpack(b)[0].values())
    ]
    return Found(0, torn=len(bad), note=f"checkpoints of steps {bad} are not finite" if bad else "")


def went_back(back: list[tuple[int, int, str]], every: int) -> Found:
    """Each time to the newest checkpoint before the step that failed, at half the rate of before."""
    wanted = [
        (step, (step - 1) // every * every, f"{0.5**n:g}") for n, (step, _, _) in enumerate(back, start=1)
    ]
    return unless(back == wanted, f"went back {back}, not {wanted}")


def slower(
    model: Any, training: Any, images: np.ndarray, initial: Any, blob: bytes | None, factor: float
) -> str:
    """The weights of a training of this lower rate from a checkpoint on, or from the start."""
    from vae import checkpoint
    from vae.train import fit

    lower = dataclasses.replace(training, learning_rate=training.learning_rate * factor)
    candidates = []
    if blob is not None:
        tensors, facts = checkpoint.unpack(blob)
        facts |= {"rollbacks": 0, "run": facts["run"] | {"train": lower.to_dict()}}
        candidates = [checkpoint.pack(tensors, facts)]
    return _weights(fit(model, lower, images, initial=initial, restore=lambda: iter(candidates)).model)


def _weights(model: Any) -> str:
    from vae import checkpoint

    return str(checkpoint.digest(model.state_dict()))


# -- a training that never gets a finite loss, as a whole flow


def never_finite(seed: int, folder: Path, shared: Path) -> Found:
    """A retrain that overflows however often it goes back: FAILED, and nothing of it is used."""
    rng, root = np.random.default_rng(seed), folder / "root"
    shutil.copytree(shared / "empty", root)
    training = bodies.SETTINGS["training"] | {
        "learning_rate": 10.0,
        "gradient_skip": 0.0,
        "rollbacks": int(rng.integers(0, 4)),
        "checkpoint_every": int(rng.integers(1, 5)),
        "epochs": 20,
        "seed": int(rng.integers(1000)),
    }
    ended = in_child(lambda: bodies.retrain(root, training=training), folder / "log")
    told = str(ended.value)
    clear = ended.code == 1 and told.startswith("NonFiniteLoss: ") and "\n" not in told
    found = Found() + unless(clear, f"ended with {ended.code}: {told}")
    return found + found_in_child(lambda: nothing_used(root), folder / "log")


def nothing_used(root: Path) -> Found:
    """The run FAILED, its checkpoints finite, no bundle, no version."""
    import mlflow

    from tests.faults.machine import _statuses

    blobs = {
        int(path.stem): path.read_bytes() for path in root.glob("jobs/train-*/checkpoints/*.safetensors")
    }
    versions = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db").search_model_versions()
    left = [path.name for path in root.glob("jobs/train-*/bundle")] + [v.name for v in versions]
    statuses = _statuses(root)
    return finite(blobs) + unless(not left and statuses == ["FAILED"], f"{statuses}, there are {left}")


# -- out of memory


def configurations(seed: int, micro_batch: int = 0) -> tuple[Any, Any, np.ndarray]:
    """A model, a training whose many draws an image need memory, and images."""
    from vae.config import FlatConfig, TrainConfig

    hidden = (16,) * (1 + seed % 2)
    model = FlatConfig(height=32, width=32, channels=1, network="mlp", hidden=hidden, latent_dim=2)
    training = TrainConfig(
        epochs=1,
        batch_size=WHOLE,
        micro_batch=micro_batch,
        objective="iwae",
        samples=64,
        gradient=("dreg", "plain")[seed // 2 % 2],
        checkpoint_every=1,
        seed=seed,
    )
    return model, training, np.random.default_rng(seed).integers(0, 256, (3 * WHOLE, 1, 32, 32), np.uint8)


def out_of_memory(seed: int, folder: Path, shared: Path) -> Found:
    """An address space too small for a whole batch: smaller parts, and the weights that these give."""
    rng = np.random.default_rng(seed)
    low, high = (
        in_child(lambda size=size: trained(seed, size)["bytes"], folder / "log").given()
        for size in (SMALLEST, WHOLE)
    )
    share = rng.uniform(0.2, 0.7)
    for _ in range(TRIES):  # a library may have mapped what it can do without
        room = int(low + share * (high - low))
        ended = in_child(lambda room=room: trained(seed, 0, room), folder / "log")
        if ended.code or ended.value["parts"][-1] < WHOLE:
            break
        share /= 2
    if ended.code:
        return Found(broken=1, note=f"with {room >> 20} MB of {high >> 20}: {ended.code}, {ended.value}")
    parts = ended.value["parts"]
    if parts[-1] == WHOLE:
        return NOTHING
    expected = in_child(lambda: in_parts(seed, parts), folder / "log").given()
    same = unless(ended.value["weights"] == expected, f"parts of {parts}: other weights than of these parts")
    return Found(int(np.log2(WHOLE / parts[-1]))) + same


def trained(seed: int, micro_batch: int, room: int = 0) -> dict[str, Any]:
    """Train in so many bytes beside those in use: the parts of each step, the weights, the bytes taken."""
    from vae.train import fit

    for setting in PLAIN_HEAP:
        ctypes.CDLL(None).mallopt(*setting)
    before, said, told = _mapped("VmSize"), listen(), []
    if room:
        resource.setrlimit(resource.RLIMIT_AS, (before + room, before + room))
    model, training, images = configurations(seed, micro_batch)
    # No checkpoint is made beside a step: its memory would be at stake as well.
    training = dataclasses.replace(training, checkpoint_every=99)
    # `stop` is asked before each step, and told how often parts had been halved by then.
    ended = fit(model, training, images, stop=lambda: bool(told.append(len(said))))
    halved = [int(line.rpartition(" ")[2]) for line in said]
    parts = [[WHOLE, *halved][count] for count in [*told[1:], len(said)]]
    return {"parts": parts, "weights": _weights(ended.model), "bytes": _mapped("VmPeak") - before}


def in_parts(seed: int, parts: list[int]) -> str:
    """The weights of a training whose steps are told their parts, from the start or from a checkpoint."""
    from vae import checkpoint
    from vae.train import fit

    blobs: Blobs = {}
    for step in [n for n, size in enumerate(parts) if n == 0 or size != parts[n - 1]]:
        model, training, images = configurations(seed, 0 if step else parts[0])
        candidates = []
        if step:
            tensors, facts = checkpoint.unpack(blobs[step])
            facts["run"]["train"]["micro_batch"] = 0
            candidates = [checkpoint.pack(tensors, facts | {"micro_batch": parts[step]})]
        ended = fit(
            model, training, images, restore=lambda found=candidates: iter(found), save=blobs.__setitem__
        )
    return _weights(ended.model)


def _mapped(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


IMPORTS = ("vae.train", "torch._dynamo")  # which an optimizer's first step loads
EXPERIMENTS = (
    Experiment(
        "a loss that is NaN or infinite",
        "Never in a checkpoint; back to the last good one at half the rate, to bitwise the weights of a "
        "training of that rate; after the set number of times a clear failure.",
        goal=200,
        batch=non_finite,
        few={"count": 2},
        imports=IMPORTS,
    ),
    Experiment(
        "a loss that stays infinite, in a whole flow",
        "One line, the run FAILED, no checkpoint that is not finite, no version.",
        goal=20,
        batch=never_finite,
        prepare=bodies.prepare,
        imports=bodies.IMPORTS,
        quick=False,
    ),
    Experiment(
        "out of memory",
        "The same batch in smaller parts, to bitwise the weights that these parts give from the start.",
        goal=60,
        batch=out_of_memory,
        imports=IMPORTS,
    ),
)
