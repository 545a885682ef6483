"""What can be known to fail is refused before anything is written: a check for each part of a config."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from data.sources import open_source
from flows.config import (
    Bootstrap,
    Browse,
    Clean,
    Command,
    Follow,
    Images,
    Ingest,
    Lineage,
    Promote,
    Pull,
    Reconcile,
    Registered,
    Rollback,
    Serve,
    Sign,
    Tables,
    Train,
    WithModel,
)


def check(config: Command) -> None:
    """Raise a ValueError of one line for the first thing that can't be; writes nothing."""
    for kind, refuse in CHECKS:
        if isinstance(config, kind):
            refuse(config)


def _source(config: Images) -> None:
    source = open_source(config.source, downloads=config.root.resolve() / "torchvision")
    if isinstance(config, Ingest):
        channels, height, width = config.decode.resolved(source.native).geometry
        if isinstance(config, Train):
            config.model_of(height, width, channels)


def _model(config: WithModel | Pull) -> None:
    from flows.registry import locate, parse

    if config.model.startswith("models:/"):
        parse(config.model)
        _registry(config, config.model)
    locate(config.model)


def _warm_start(config: Train) -> None:
    """A champion may not be there yet; anything else must."""
    from flows.registry import CHAMPION, locate, parse

    start = config.warm_start
    if start and not (start.startswith("models:/") and parse(start)[1] == CHAMPION):
        if start.startswith("models:/"):
            _registry(config, start)
        locate(start)


def _devices(config: Train) -> None:
    """Each process has a GPU of its own, where they are on GPUs."""
    if config.devices == 1 or config.device == "cpu":
        return
    import torch

    found = torch.cuda.device_count()
    if (config.device == "cuda" or found) and config.devices > found:
        raise ValueError(
            f"devices={config.devices}, but torch finds {found} GPUs: use fewer, or --device cpu"
        )


def _registered(config: Sign) -> None:
    from flows.registry import locate

    _registry(config, config.model)
    locate(config.model, verified=False)


def _new_folder(config: Pull) -> None:
    from flows.pull import refuse_existing

    refuse_existing(config.directory)


def _table(config: Tables) -> None:
    from data.sources import check_folder
    from data.store import open_store
    from data.upkeep import read_about

    if config.action == "list":
        store = open_store(config.table or config.root).check()
        if config.table and store.local is not None:  # a root that is not made yet has no tables
            check_folder(store.local)
    else:
        read_about(open_store(config.table).check())


def _browsed(config: Browse) -> None:
    from data.tables import open_table

    open_table(config.table)


def _root(config: Command) -> None:
    if not config.writes:
        return
    root = config.root.resolve()
    nearest = next(folder for folder in (root, *root.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"root {str(config.root)!r} can't be read and written: give another --root")


def _registry(config: Command, model: str = "") -> None:
    """Looking into a registry that is not there yet would create it."""
    database = os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")
    elsewhere = "MLFLOW_REGISTRY_URI" in os.environ or "://" in database
    if not elsewhere and not os.path.exists(database):
        wanted = f"no model {model!r}: " if model else ""
        raise ValueError(f"{wanted}there is no registry under root {str(config.root)!r} yet")


def _named(config: Command) -> None:
    _registry(config, getattr(config, "name", ""))


def _champion(config: Promote | Rollback | Follow) -> None:
    from flows import promotion

    promotion.check(config)


def _thing(config: Lineage) -> None:
    from flows import lineage

    lineage.check(config)


def _server(config: Bootstrap) -> None:
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise ValueError("no Prefect server to set up: set PREFECT_API_URL")


def _schedules(config: Serve) -> None:
    from flows.deployments import check_schedules

    check_schedules(config)


# In this order: what is cheap to know, and to say, comes first.
CHECKS: tuple[tuple[Any, Callable[[Any], None]], ...] = (
    (Command, _root),
    (Images, _source),
    (Pull, _new_folder),
    (Sign, _registered),
    (WithModel | Pull, _model),
    (Train, _devices),
    (Train, _warm_start),
    (Tables, _table),
    (Browse, _browsed),
    (Registered | Lineage | Clean | Reconcile, _named),
    (Registered, _champion),
    (Lineage, _thing),
    (Bootstrap, _server),
    (Serve, _schedules),
)
