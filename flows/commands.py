"""Run a command: check, prepare the environment, run its flow, print its result."""

from __future__ import annotations

import importlib
import json
import logging
import signal
import sys
import traceback
from contextlib import nullcontext
from types import FrameType
from typing import Any

from data.secrets import redact
from flows.checks import check
from flows.config import Clean, Command, Encode, Serve, Tables, to_toml
from flows.environment import make_root, prepare

# Commands that are no flow.
DRAWING = {"reconstruct", "interpolate", "edit", "show", "nearest"}
KEEPING = {"serve", "bootstrap", "clean", "doctor"}
TOOLS = {"pull", "sign", "export", "lineage", "tables", *DRAWING, *KEEPING}
INTERRUPTED, TERMINATED = 130, 143  # a shell's exit codes for SIGINT and SIGTERM


def run(command: str, config: Command, *, as_json: bool) -> int:
    """Run the command's flow and print its result; the exit code. ValueErrors before any work are raised."""
    # What a served run logs goes to Prefect's server too; other commands say themselves what happens.
    prepare(config.root, log_level="INFO" if isinstance(config, Serve) else "CRITICAL")
    check(config)
    if config.writes:
        make_root(config.root)
    log_to_stderr()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = _call(command, config)
    except KeyboardInterrupt:
        return _say(f"{command} interrupted: the same command goes on from here", INTERRUPTED)
    except SystemExit:
        return _say(f"{command} terminated: the same command goes on from here", TERMINATED)
    except Exception as error:
        if not isinstance(error, ValueError):  # of ours or of the machine: whoever looks into it wants all
            sys.stderr.write(redact(traceback.format_exc()))
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


def _call(command: str, config: Command) -> Any:
    """flows.<command>.<command>, a flow unless it is a tool: a tool needs no Prefect."""
    from flows.local_server import prefect_api

    with nullcontext() if command in TOOLS else prefect_api():
        return getattr(importlib.import_module(f"flows.{command}"), command)(config)


class _Redacting(logging.Formatter):
    """A log line, its traceback included, without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to_stderr() -> None:
    """What happens on the way, a line each, with the time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("vae_flows", "vae"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


def _say(message: str, code: int) -> int:
    print(f"vae-flows: {redact(message)}", file=sys.stderr)
    return code
