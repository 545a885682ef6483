"""Run a command: check, prepare the environment, run its flow, print its result."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from types import FrameType
from typing import Any

from data.sources import open_source
from flows.config import (
    Bootstrap,
    Clean,
    Command,
    Encode,
    Follow,
    Images,
    Ingest,
    Lineage,
    Promote,
    Pull,
    Rollback,
    Serve,
    Tables,
    Train,
    WithModel,
)
from flows.environment import make_root, prepare

# Commands that are no flow.
DRAWING = {"reconstruct", "interpolate", "edit"}
KEEPING = {"serve", "bootstrap", "clean", "doctor"}
TOOLS = {"pull", "export", "lineage", "tables", *DRAWING, *KEEPING}
INTERRUPTED, TERMINATED = 130, 143  # a shell's exit codes for SIGINT and SIGTERM


def run(command: str, config: Command, *, as_json: bool) -> int:
    """Run the command's flow and print its result; the exit code. ValueErrors before any work are raised."""
    # What a served run logs goes to Prefect's server too; other commands say themselves what happens.
    prepare(config.root, log_level="INFO" if isinstance(config, Serve) else "CRITICAL")
    check(config)
    if not isinstance(config, Tables):  # which are wherever they are, and may be read only
        make_root(config.root)
    _log_to_stderr()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = _call(command, config)
    except KeyboardInterrupt:
        return _say(f"{command} interrupted: the same command goes on from here", INTERRUPTED)
    except SystemExit:
        return _say(f"{command} terminated: the same command goes on from here", TERMINATED)
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()  # an error of ours or of the machine: whoever looks into it wants all of it
        return _say(f"{command} failed: {' '.join(str(error).split()) or type(error).__name__}", 1)
    print(json.dumps(result.model_dump(mode="json"), indent=2) if as_json else result.summary())
    return int(result.exit_code)


def dry_run(command: str, config: Command, *, as_json: bool) -> int:
    """Print the complete configuration, and for an encode or a removal what it would do."""
    prepare(config.root)
    check(config)
    values = config.model_dump(mode="json")
    if isinstance(config, Encode):
        from flows.encode import estimate

        values["estimate"] = estimate(config)
    if isinstance(config, Tables) and config.action == "gc":
        from data.upkeep import gc

        values["would_remove"] = list(gc(config.table, remove=False).paths)
    if isinstance(config, Clean):
        from flows.clean import plan

        values["removes"] = plan(config).told()
    print(json.dumps(values, indent=2) if as_json else to_toml(values))
    return 0


def check(config: Command) -> None:
    """Refuse what can be known to fail before anything is written: the source, the geometry, the model."""
    if isinstance(config, Images):
        source = open_source(config.source, downloads=config.root.resolve() / "torchvision")
        if isinstance(config, Ingest):
            channels, height, width = config.decode.resolved(source.native).geometry
            if isinstance(config, Train):
                config.model_of(height, width, channels)
    if isinstance(config, WithModel | Pull):
        _check_model(config)
    if isinstance(config, Tables):
        _check_table(config)
    else:
        _check_root(config)
    if isinstance(config, Promote | Rollback | Follow):
        _check_registry(config, config.name)
        from flows import promotion

        promotion.check(config)
    if isinstance(config, Lineage):
        _check_registry(config)
        from flows import lineage

        lineage.check(config)
    _check_upkeep(config)


def _check_upkeep(config: Command) -> None:
    if isinstance(config, Bootstrap):
        _check_server()
    if isinstance(config, Clean):
        _check_registry(config)
    if isinstance(config, Serve):
        from flows.deployments import check_schedules

        check_schedules(config)


def _check_table(config: Tables) -> None:
    from data.store import open_store
    from data.upkeep import read_about

    if config.action == "list":
        open_store(config.table or config.root).check()
    else:
        read_about(open_store(config.table).check())


def _check_model(config: WithModel | Pull) -> None:
    from flows.registry import locate, parse

    if config.model.startswith("models:/"):
        parse(config.model)
        _check_registry(config, config.model)
    locate(config.model)


def _check_registry(config: Command, model: str = "") -> None:
    """Looking into a registry that is not there yet would create it."""
    database = os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")
    elsewhere = "MLFLOW_REGISTRY_URI" in os.environ or "://" in database
    if not elsewhere and not os.path.exists(database):
        wanted = f"no model {model!r}: " if model else ""
        raise ValueError(f"{wanted}there is no registry under root {str(config.root)!r} yet")


def _check_server() -> None:
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise ValueError("no Prefect server to set up: set PREFECT_API_URL")


def _check_root(config: Command) -> None:
    root = config.root.resolve()
    nearest = next(folder for folder in (root, *root.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"root {str(config.root)!r} can't be read and written: give another --root")


def to_toml(values: dict[str, Any]) -> str:
    """A configuration as TOML that --config reads back; what is not set stands as a comment."""
    import tomli_w

    unset = [f"# {name}: not set" for name, value in values.items() if value is None]
    return "\n".join([*unset, tomli_w.dumps(_without_none(values)).rstrip()])


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if value is not None}
    return {name: _without_none(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _call(command: str, config: Command) -> Any:
    """flows.<command>.<command>, a flow unless it is a tool: a tool needs no Prefect."""
    from flows.local_server import prefect_api

    with nullcontext() if command in TOOLS else prefect_api():
        return getattr(importlib.import_module(f"flows.{command}"), command)(config)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("vae_flows", "vae"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _say(message: str, code: int) -> int:
    print(f"vae-flows: {message}", file=sys.stderr)
    return code
