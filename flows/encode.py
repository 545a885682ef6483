"""Encode: every image of a source, streamed through a model into its latent table."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import cache as cached
from itertools import islice
from typing import Any

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.batches import stream
from data.commit import Progress
from data.images import DecodePath
from data.sources import limited
from data.store import open_store
from data.tables import EncodeJob, LatentColumns, TableResult, encode_table, plan_encode
from flows.config import Encode
from flows.followers import subscribe
from flows.ingest import open_images
from flows.lineage import remember_table
from flows.progress import progress
from flows.registry import Located, locate
from flows.results import Table, told
from flows.runners import Order, batch_encoder, encode_elsewhere, load_encoder, parse_part
from flows.tracking import Run, tracked

logger = logging.getLogger("vae_flows.encode")
MEASURED_BATCHES = 8  # that an estimate of the time is made on
OTHER_BYTES = 64  # a row's id, source, hash, split, label and size, about


@flow(name="encode")
def encode(config: Encode) -> Table:
    """The latent table of a source and a model: found where it is complete, else the shards it lacks."""
    with tracked(config) as run:
        model = locate(config.model)
        logger.info("encode: %s with %s", config.source, model.uri)
        table = encode_images(config, model, run)
        _tell(table)
        remember_table(config.root, table.uri)
        if config.follow:
            subscribe(model.name, config, config.source)
        if run.wants(table):
            run.log_metrics({"encode/rows": table.rows, "encode/rejected": table.rejected})
            run.log_json("latents.json", table.model_dump())
        return run.sign(table)


@task(cache_policy=NO_CACHE)
def encode_images(config: Encode, model: Located, run: Run) -> Table:
    """Plan, then read, decode, encode and commit shard after shard."""
    started = time.monotonic()
    job = plan(config, model)
    logger.info("encode: %d images in %d shards, %s", job.plan.rows, len(job.plan.shards), config.runner)
    with progress("encode", run) as advance:
        result = work(
            config,
            model,
            job,
            lambda at: advance(at.rows_done, at.rows, f"images, {at.rejected} rejected"),
        )
    return Table.of(result, time.monotonic() - started, model.uri)


def work(config: Encode, model: Located, job: EncodeJob, tell: Callable[[Progress], None]) -> TableResult:
    """Work on the shards where the configuration says, beside whoever else does."""
    order = order_of(config, model, job)
    part, share = parse_part(config.shard), config.max_reject_share
    if config.runner != "here":
        return encode_elsewhere(job, order, config.runner, max_reject_share=share, progress=tell, part=part)
    encoder = cached(lambda: batch_encoder(load_encoder(order.bundle, order.device), order, job.columns))
    return encode_table(  # a complete table needs no encoder
        job, lambda images, ids: encoder()(images, ids), max_reject_share=share, progress=tell, part=part
    )


def order_of(config: Encode, model: Located, job: EncodeJob) -> Order:
    """What a worker needs to know of a planned encode."""
    return Order(
        table=job.plan.store.url,
        number=job.plan.number,
        source=config.source,
        limit=config.limit,
        downloads=config.root.resolve() / "torchvision",
        bundle=model.files(),
        device=config.device,
        scores=config.scores,
        seed=config.seed,
    )


def plan(config: Encode, model: Located) -> EncodeJob:
    """The table's plan: found where it is, decoded as the model's own images were."""
    facts = model.facts()
    source = limited(open_images(config), config.limit)
    given = columns(facts, config.scores, config.min_kl)
    chosen = {"min_kl": config.min_kl, "dimensions": given.dimensions} if given.dimensions else {}
    return plan_encode(
        open_store(config.out or config.root.resolve() / "latents"),
        source,
        DecodePath.from_dict(facts["extra"]["decode"]),
        given,
        name=model.name or source.name,
        weights_sha256=facts["weights"],
        lineage={"model": model.uri, "dataset": facts["extra"]["dataset"], **chosen},
        shard_rows=config.shard_rows,
        seed=config.seed,
    )


def columns(facts: dict[str, Any], scores: bool, min_kl: float | None = None) -> LatentColumns:
    """What this model gives for an image; with min_kl, of its dimensions those that carry more than that."""
    levels = tuple(tuple(level) for level in facts["levels"])
    generative = facts["extra"]["generative"]
    dimensions = () if min_kl is None else informative_dimensions(facts, min_kl)
    if dimensions:
        levels = tuple((count,) for count in per_level(dimensions, levels))
    return LatentColumns(
        dims=sum(math.prod(level) for level in levels),
        levels=levels,
        logvar=generative,
        kl=generative,
        kl_levels=len(levels) > 1,
        scores=scores and generative,
        dimensions=dimensions,
    )


def informative_dimensions(facts: dict[str, Any], min_kl: float) -> tuple[int, ...]:
    """The dimensions whose mean KL, measured on validation images when the model was trained, is above."""
    from vae.ladder import informative

    measured = facts["extra"].get("kl_per_dim")
    if measured is None:
        raise ValueError(
            f"--min-kl {min_kl:g}: the model's bundle states no KL of each dimension, which an autoencoder "
            "and a VampPrior do not have; encode all dimensions, or train a ladder or a normal prior"
        )
    chosen = tuple(informative(measured, min_kl))
    if not chosen:
        raise ValueError(f"--min-kl {min_kl:g} leaves no dimension: the largest KL is {max(measured):.3g}")
    return chosen


def per_level(dimensions: tuple[int, ...], levels: tuple[tuple[int, ...], ...]) -> list[int]:
    """How many of the dimensions are in each level.

    >>> per_level((0, 2, 3), ((2,), (1, 2, 2)))
    [1, 2]
    """
    ends = np.cumsum([math.prod(level) for level in levels])
    return np.bincount(np.searchsorted(ends, dimensions, side="right"), minlength=len(levels)).tolist()


def estimate(config: Encode) -> dict[str, Any]:
    """What an encode would do: shards, bytes and seconds, the time measured on the first images."""
    model = locate(config.model)
    facts, encoder = model.facts(), load_encoder(model.files(), config.device)
    source = limited(open_images(config), config.limit)
    rows = sum(batch.num_rows for batch in source.listing())
    started, measured = time.monotonic(), 0
    for batch in islice(stream(source, DecodePath.from_dict(facts["extra"]["decode"])), MEASURED_BATCHES):
        encoder.encode(batch.images, batch.ids, scores=config.scores)
        measured += len(batch.images)
    seconds = (time.monotonic() - started) * rows / max(measured, 1)
    fields = columns(facts, config.scores, config.min_kl).fields()
    width = OTHER_BYTES + sum((size or 1) * np.dtype(dtype).itemsize for _, size, dtype in fields)
    shards = math.ceil(rows / config.shard_rows)
    return {"images": rows, "shards": shards, "bytes": rows * width, "seconds": round(seconds, 1)}


def _tell(table: Table) -> None:
    state = "written" if table.changed else "unchanged"
    logger.info("encode: %d rows %s: %s", table.rows, state, table.uri)
    if table.rejected:
        logger.warning("encode: %s", told(table))
