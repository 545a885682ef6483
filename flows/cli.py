"""`vae-flows`: one command per flow, its options made from the flow's configuration.

Standard output carries the result and nothing else; everything on the way goes to standard error.
Exit codes: 0 done, 1 failed on the way, 2 refused before any work, 130 and 143 interrupted (resumable),
141 done, but whoever read the result had gone.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from data.secrets import redact

if TYPE_CHECKING:
    from pydantic import ValidationError

    from flows.config import Command, Setting

PIPE_CLOSED = 141  # a shell's exit code for SIGPIPE

# Command -> (its configuration in flows.config, its one line of help); it is flows.<command>.<command>.
COMMANDS = {
    "retrain": ("Retrain", "images in; a registered champion, a latent table and samples out"),
    "ingest": ("Ingest", "decode a source into an immutable snapshot"),
    "train": ("Train", "train a model; stopped, the same command resumes"),
    "evaluate": ("Evaluate", "score a model on held-out images"),
    "encode": ("Encode", "images -> a Parquet table of latents"),
    "drift": ("Drift", "do new images differ from those that a model came from?"),
    "sample": ("Sample", "the prior -> a Parquet table of images"),
    "report": ("Report", "what a model has learned, as one HTML page with figures"),
    "reconstruct": ("Reconstruct", "images over their reconstructions, as a picture"),
    "interpolate": ("Interpolate", "the way from one image to another, as a picture"),
    "edit": ("Edit", "an image with an attribute added by degree, as a picture"),
    "promote": ("Promote", "make a version the champion by hand; its tables follow"),
    "rollback": ("Rollback", "make the previous champion the champion again, latents included"),
    "follow": ("Follow", "bring the tables that follow a champion up to date"),
    "lineage": ("Lineage", "what a table, model or dataset was made of, and what was made of it"),
    "serve": ("Serve", "retrain, encode and report on a schedule and on events, until stopped"),
    "bootstrap": ("Bootstrap", "set up a Prefect server: GPU limit, zombies, notifications"),
    "reconcile": ("Reconcile", "close what a kill has left open"),
    "clean": ("Clean", "remove old checkpoints, challengers and their tables; --dry-run shows them"),
    "doctor": ("Doctor", "check devices, servers, credentials and versions, and say what to do"),
    "pull": ("Pull", "a model's bundle from the registry to a folder"),
    "sign": ("Sign", "sign a registered version, for whoever has your public key"),
    "export": ("Export", "a model as torch.export programs and ONNX, to a folder"),
    "show": ("Show", "some rows of a table, with thumbnails of their images"),
    "nearest": ("Nearest", "the images whose latents lie closest to one"),
    "tables": ("Tables", "list, show, verify and sweep tables"),
}


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest valid option."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:  # `vae-flows ... | head` has seen enough; what is left would be told at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _main(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except ValueError as error:
        print(f"vae-flows: {_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        sys.stdout.flush()


def _run(arguments: list[str]) -> int:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown command {command!r}: did you mean {nearest!r}? (see vae-flows --help)")
    parser = _parser(command)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(_unknown(unknown[0], options.command))
    config = _configuration(options)
    from flows import commands

    if options.dry_run:
        return commands.dry_run(options.command, config, as_json=options.json)
    return commands.run(options.command, config, as_json=options.json)


def _parser(chosen: str | None) -> Parser:
    parser = Parser(
        prog="vae-flows", description="Images in; a trained, registered VAE, latents and samples out."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (_, line) in COMMANDS.items():
        sub = subparsers.add_parser(
            command,
            help=line,
            description=line,
            allow_abbrev=False,
            formatter_class=argparse.RawTextHelpFormatter,
        )
        if command == chosen:  # only the chosen one needs its options, and so the configuration's import
            _add_options(sub, command)
    return parser


def _add_options(parser: Parser, command: str) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML settings; the command line goes over them"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the complete configuration and do nothing"
    )
    groups: dict[str, Any] = {"": parser}
    for setting in _settings(command):
        if setting.section not in groups:
            groups[setting.section] = parser.add_argument_group(setting.section, _explain(setting.section))
        if setting.argument:
            parser.add_argument(f".{setting.name}", **_place(setting))
        else:
            groups[setting.section].add_argument(_flag(setting.name), **_kind(setting))


def _place(setting: Setting) -> dict[str, Any]:
    """How argparse reads a setting that is taken by its place."""
    choices = "|".join(get_args(setting.annotation)) if get_origin(setting.annotation) is Literal else ""
    common = {"metavar": choices or setting.name.upper(), "help": setting.help}
    if "tuple" in str(setting.annotation):
        return common | {"nargs": "+"}
    return common | ({"nargs": "?", "default": setting.default} if setting.default == "" else {})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(setting: Setting) -> dict[str, Any]:
    """How argparse reads a setting; values stay text, which pydantic converts and checks."""
    common = {
        "dest": f"{setting.section}.{setting.name}",
        "default": argparse.SUPPRESS,
        "help": _help(setting),
    }
    if setting.annotation is bool:
        return common | {"action": argparse.BooleanOptionalAction}
    if "tuple" in str(setting.annotation):
        return common | {"type": lambda text: tuple(filter(None, text.split(","))), "metavar": "N,N,..."}
    choices = (
        "|".join(map(str, get_args(setting.annotation))) if get_origin(setting.annotation) is Literal else ""
    )
    return common | {"metavar": choices or setting.name.rsplit("_", 1)[-1].upper()}


def _help(setting: Setting) -> str:
    shown = f"default: {setting.default}" if isinstance(setting.default, str | int | float) else ""
    shown = shown if setting.default != "" else ""
    return f"{setting.help} ({shown})" if setting.help and shown else setting.help or shown


def _explain(section: str) -> str:
    """A section's fields are explained by the docstring of the record that holds them."""
    from flows.config import SECTIONS

    return "\n\n".join(
        inspect.cleandoc(record.__doc__ or "").split("\n>>>")[0] for record in SECTIONS[section]
    )


def _settings(command: str) -> list[Setting]:
    from flows import config

    return config.settings(getattr(config, COMMANDS[command][0]))


def _unknown(option: str, command: str) -> str:
    """The message for an option that no setting has, with the nearest that one has."""
    if not option.startswith("-"):
        return f"unexpected argument {option!r} of {command}"
    option, settings = option.split("=")[0], _settings(command)
    places = [setting.name for setting in settings if setting.argument]
    if option in map(_flag, places):
        return f"{option!r} is given by its place: vae-flows {command} {' '.join(places).upper()}"
    flags = [_flag(setting.name) for setting in settings if not setting.argument]
    flags += ["--config", "--json", "--dry-run"]
    nearest = difflib.get_close_matches(option, flags, n=1, cutoff=0.0)[0]
    return f"unknown option {option!r} of {command}: did you mean {nearest!r}?"


def _configuration(options: argparse.Namespace) -> Command:
    """TOML, and over it the command line, checked as one configuration."""
    from pydantic import ValidationError

    from flows import config

    values = _read_toml(options.config) if options.config else {}
    for dotted, value in vars(options).items():
        section, _, name = dotted.rpartition(".")
        if section:
            values.setdefault(section, {})[name] = value
        elif dotted.startswith("."):
            values[name] = value
    try:
        return getattr(config, COMMANDS[options.command][0])(**values)
    except ValidationError as error:
        raise ValueError(_first(error)) from error


def _first(error: ValidationError) -> str:
    """The first of pydantic's errors as one line."""
    import vae.config

    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "literal_error":
        choices = re.findall("'([^']*)'", first["ctx"]["expected"])
        return vae.config.no_choice(str(first["loc"][-1]), first["input"], choices)
    message = first["msg"].removeprefix("Value error, ")
    return message if first["type"] == "value_error" else f"{where}={first['input']!r}: {message}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {str(path)!r} can't be read as TOML: {error}") from error


def _one_line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
