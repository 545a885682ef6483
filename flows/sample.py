"""Sample: latents from the prior, or from a mixture fitted to latents, decoded into a table of images."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from data.clock import spent
from data.store import open_store
from data.tables import write_samples
from flows.config import Sample
from flows.devices import pick_device
from flows.encode import columns
from flows.figures import grid
from flows.lineage import remember_table
from flows.mixture import Mixture, mixture_of, table_key
from flows.progress import progress
from flows.registry import Located, locate
from flows.results import Table
from flows.tracking import Run, tracked

if TYPE_CHECKING:
    import vae

logger = logging.getLogger("vae_flows.sample")
SHOWN = 64  # images in the picture


@flow(name="sample")
def sample(config: Sample) -> Table:
    """The table of `count` images that a prior gives: found where it is complete, else written."""
    with tracked(config) as run:
        model = locate(config.model)
        if config.prior == "model" and not model.facts()["extra"]["generative"]:
            raise ValueError(
                f"{model.uri} is an autoencoder, which has no prior to sample from: fit one to its codes "
                "with --prior mixture --table TABLE"
            )
        logger.info("sample: %d images from %s", config.count, model.uri)
        table = sample_images(config, model, run)
        remember_table(config.root, table.uri)
        state = "written" if table.changed else "unchanged"
        logger.info("sample: %d rows %s: %s", table.rows, state, table.uri)
        if run.wants(table):
            _, images = Sampler(config, model)(np.arange(min(config.count, SHOWN)))
            run.log_bytes("samples.png", grid(images))
            run.log_metrics({"sample/rows": table.rows})
            run.log_json("samples.json", table.model_dump())
        return run.sign(table)


@task(cache_policy=NO_CACHE)
def sample_images(config: Sample, model: Located, run: Run) -> Table:
    """Draw, decode and commit shard after shard."""
    started = time.monotonic()
    facts = model.facts()
    prior = table_key(config, model) if config.prior == "mixture" else {}
    with progress("sample", run) as advance:
        result = write_samples(
            open_store(config.out or config.root.resolve() / "samples"),
            Sampler(config, model),
            config.count,
            name=model.name or "samples",
            key={"weights_sha256": facts["weights"], "temperature": config.temperature, **prior},
            seed=config.seed,
            dims=columns(facts, scores=False).dims,
            lineage={"model": model.uri, "dataset": facts["extra"]["dataset"]},
            progress=lambda at: advance(at.rows_done, at.rows, "images"),
        )
    return Table.of(result, time.monotonic() - started, model.uri)


class Sampler:
    """The samples of given indices; loads the model when first asked, since a complete table needs none."""

    def __init__(self, config: Sample, model: Located):
        self.config, self.model = config, model

    @cached_property
    def network(self) -> vae.Model:
        import vae

        return vae.load(self.model.folder)

    @cached_property
    def mixture(self) -> Mixture:
        return mixture_of(self.config.table, self.config.mixture_components)

    def __call__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """z (n, D) float32 and images (n, C, H, W) uint8."""
        from vae.sample import sample as draw
        from vae.sample import sample_mixture

        config, device = self.config, pick_device(self.config.device)
        with spent("model"):
            if config.prior == "mixture":
                return sample_mixture(self.network, *self.mixture, indices, config.seed, device)
            return draw(self.network, indices, config.seed, config.temperature, device)
