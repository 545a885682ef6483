"""Where the shards of an encode are worked on: here, by several processes, by a Ray cluster.

Whoever works on a shard commits it to the table's store, whose records are the truth: a worker that dies
leaves its shard pending, one that comes too late finds it done. So nothing here has to be reliable, and the
same command may run anywhere else at the same time.

This module is all that a worker imports of `flows`: it must load neither Prefect nor MLflow.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.clock import spent
from data.commit import Part, Progress, Tally, in_turn
from data.sources import limited, open_source
from data.store import open_store
from data.tables import EncodeJob, LatentColumns, TableResult, encode_shard, finish_encode, join_encode

if TYPE_CHECKING:
    from vae.encode import Encoder

logger = logging.getLogger("vae_flows.encode")
POLL_SECONDS = 1.0
ATTEMPTS = 5  # rounds without a single shard done, after which the machine is at fault
KINDS = "here, processes:N, ray or ray://HOST:PORT"


@dataclass(frozen=True)
class Order:
    """All that a worker needs to know, picklable; `bundle` is the model's files by name."""

    table: str
    number: int
    source: str
    limit: int | None
    downloads: Path
    bundle: Mapping[str, bytes] = field(repr=False)
    device: str
    scores: bool
    seed: int


class Worker:
    """One process's model and plan, made once, for any of the order's shards."""

    def __init__(self, order: Order):
        self.order = order
        source = limited(open_source(order.source, downloads=order.downloads), order.limit)
        self.job = join_encode(open_store(order.table), order.number, source)
        encoder = load_encoder(order.bundle, order.device)
        self.encode = batch_encoder(encoder, order, self.job.columns)
        self.shards = {shard.index: shard for shard in self.job.plan.shards}

    def work(self, index: int) -> int:
        """Encode a shard and commit it; its index."""
        encode_shard(self.job, self.shards[index], self.encode)
        return index


def load_encoder(bundle: Mapping[str, bytes], device: str) -> Encoder:
    """The model of a bundle's files on its device, ready to encode."""
    from flows.devices import pick_device
    from vae.bundle import from_files
    from vae.encode import Encoder

    return Encoder(from_files(bundle), pick_device(device))


def batch_encoder(
    encoder: Encoder, order: Order, columns: LatentColumns
) -> Callable[[np.ndarray, list[str]], dict[str, np.ndarray]]:
    """Images and ids to the columns of a latent table."""

    def encode(images: np.ndarray, ids: list[str]) -> dict[str, np.ndarray]:
        with spent("model"):
            latents = encoder.encode(images, ids, scores=order.scores, seed=order.seed)
        return kept(vars(latents), columns)

    return encode


def kept(latents: dict[str, np.ndarray | None], columns: LatentColumns) -> dict[str, np.ndarray]:
    """What the table takes of a batch's latents: what there is, of the dimensions that it holds."""
    found = {name: value for name, value in latents.items() if value is not None}
    if columns.dimensions:
        dimensions = list(columns.dimensions)
        found |= {name: found[name][:, dimensions] for name in ("mu", "logvar") if name in found}
    return found


_own: list[Worker] = []  # this process's, where a pool or a cluster started it


def _begin(order: Order) -> None:
    _own[:] = [Worker(order)]


def _work(index: int) -> int:
    return _own[0].work(index)


def _work_on_ray(order: Order, index: int) -> int:
    """A cluster's process serves several tasks, and makes the model for the first of an order."""
    if not _own or _own[0].order != order:
        _begin(order)
    return _work(index)


def parse(runner: str) -> tuple[str, str]:
    """('processes', 'N'), ('ray', address or '') or ('here', ''); ValueError for anything else.

    >>> parse("processes:4"), parse("ray"), parse("ray://head:10001")
    (('processes', '4'), ('ray', ''), ('ray', 'ray://head:10001'))
    """
    kind, _, rest = runner.partition(":")
    if kind == "ray" and (not rest or rest.startswith("//")):
        return "ray", runner if rest else ""
    if (kind == "processes" and rest.isdigit() and int(rest)) or runner == "here":
        return kind, rest
    raise ValueError(f"runner {runner!r} is not {KINDS}")


def parse_part(shard: str) -> Part | None:
    """'2/4' as the second of four parts, '' as none.

    >>> parse_part("2/4")
    Part(number=1, of=4)
    """
    if not shard:
        return None
    number, _, of = shard.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise ValueError(f"shard {shard!r} is not I/N with I in 1..N, as in 2/4")
    return Part(int(number) - 1, int(of))


def encode_elsewhere(
    job: EncodeJob,
    order: Order,
    runner: str,
    *,
    max_reject_share: float,
    progress: Callable[[Progress], None],
    part: Part | None = None,
) -> TableResult:
    """Encode what a planned job still lacks with other processes, commit it and return the table."""
    if job.plan.store.url.startswith("memory:"):
        raise ValueError(f"runner {runner!r} can't share {job.plan.store.url}: give --out DIR")
    kind, where = parse(runner)
    crew = (lambda: processes(order, int(where))) if kind == "processes" else (lambda: ray(order, where))
    before, complete = len(job.plan.done()), job.plan.store.exists(job.plan.manifest)
    tally, idle = Tally(job.plan, max_reject_share), 0
    with contextlib.ExitStack() as stack:
        run: Callable[[list[int]], Iterator[None]] | None = None
        while pending := in_turn(job.plan, part):
            run = run or stack.enter_context(crew())
            try:
                for _ in run([shard.index for shard in pending]):
                    tally.check(progress)
            except WorkersLostError as error:
                idle = idle + 1 if len(job.plan.pending()) == len(pending) else 0
                if idle == ATTEMPTS:
                    raise
                logger.warning("encode: %s; going on with what is left", error)
        tally.check(progress)
    return finish_encode(job, shards_done_before=before, changed=not complete)


class WorkersLostError(RuntimeError):
    """Workers ended without an error of their own: killed, out of memory, their machine gone."""


@contextlib.contextmanager
def processes(order: Order, count: int) -> Iterator[Callable[[list[int]], Iterator[None]]]:
    """Several processes on this machine, each with its own model; on GPUs, one each in turn."""
    context = get_context("spawn")  # a fork would share torch's threads and the store's connections

    def run(indices: list[int]) -> Iterator[None]:
        # A pool that lost one process is of no more use: each round has its own.
        pool = ProcessPoolExecutor(min(count, len(indices)), context, _begin, (order,))
        try:
            waiting: set[Future[int]] = {pool.submit(_work, index) for index in indices}
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                yield
        except BrokenProcessPool as error:
            raise WorkersLostError("a process ended") from error
        finally:
            pool.shutdown(cancel_futures=True)

    yield run


@contextlib.contextmanager
def ray(order: Order, address: str) -> Iterator[Callable[[list[int]], Iterator[None]]]:
    """A Ray cluster: that of the address, of RAY_ADDRESS, or one of this machine alone, for this job."""
    try:
        import ray as engine
    except ImportError as error:
        raise ValueError(f"{error}: --runner ray needs vae-flows[ray]") from None
    address = address or os.environ.get("RAY_ADDRESS", "")
    try:
        engine.init(address or None, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from error
    try:
        gpus = 1 if order.device != "cpu" and engine.cluster_resources().get("GPU") else 0
        remote = engine.remote(num_cpus=1, num_gpus=gpus, max_retries=ATTEMPTS)(_work_on_ray)
        shared = engine.put(order)

        def run(indices: list[int]) -> Iterator[None]:
            waiting = [remote.remote(shared, index) for index in indices]
            try:
                while waiting:
                    done, waiting = engine.wait(waiting, timeout=POLL_SECONDS)
                    engine.get(done)
                    yield
            except (engine.exceptions.WorkerCrashedError, engine.exceptions.ObjectLostError) as error:
                raise WorkersLostError(str(error).splitlines()[0]) from error
            finally:
                for task in waiting:
                    engine.cancel(task)

        yield run
    finally:
        engine.shutdown()
