"""The champion alias as a transaction: the move on record, then the alias, the event, the tables that follow.

MLflow keeps no history of an alias, so ours is a ledger in the store and MLflow's alias is its projection. A
move is decided the moment its record is there; whatever was killed after that is finished by the next
command (`flows.follow`). An alias that somebody moved by hand is taken over into the ledger as 'external'.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data.store import Store, open_store
from flows import events, followers, registry
from flows.config import Follow, Promote, Rollback
from flows.jobs import job_store, put_record, read_record
from flows.ledger import Ledger
from flows.results import Scores

logger = logging.getLogger("vae_flows.promotion")
Kind = Literal["promote", "rollback", "external"]
CONSTANT = 0.1 / 255  # of a pixel over images, a tenth of a grey value: nobody sees it
EVEN_BITS = 8.0  # a dimension, of grey values that are all as likely


class PromotionLostError(RuntimeError):
    """Another process moved the alias first."""


@dataclass(frozen=True)
class Move:
    """One move of the champion alias; `number` counts from 1."""

    number: int
    version: str
    reason: str
    kind: Kind
    at: str


def history(root: Path, name: str) -> list[Move]:
    """Every move of the champion alias, oldest first."""
    return [Move(**entry) for entry in _ledger(root, name).entries()]


def reigns(moves: list[Move]) -> list[str]:
    """The versions that were champion one after the other, without those that were rolled back.

    >>> moves = [("1", "promote"), ("2", "promote"), ("1", "rollback"), ("3", "promote")]
    >>> reigns([Move(n, version, "", kind, "") for n, (version, kind) in enumerate(moves, 1)])
    ['1', '3']
    """
    stack: list[str] = []
    for move in moves:
        if move.kind == "rollback":
            stack.pop()
        else:
            stack.append(move.version)
    return stack


def previous(name: str, moves: list[Move]) -> str:
    """The champion before the present one; ValueError where there is none, or its model is gone."""
    champions = reigns(moves)
    if len(champions) < 2:
        only = f": version {champions[0]} is its first" if champions else ", and none now"
        raise ValueError(f"{name!r} has no champion to go back to{only}")
    registry.tags(name, champions[-2])
    return champions[-2]


def check(config: Promote | Rollback | Follow) -> None:
    """Refuse what can't be done to a champion, before anything is written."""
    registry.require(config.name)
    moves = history(config.root, config.name)
    if isinstance(config, Promote):
        require_sound(config.root, config.name, config.version)
    elif isinstance(config, Follow):
        if config.drop:
            followers.require(config.root, config.name, config.drop)
    elif not moves or moves[-1].kind != "rollback" or settled(config.root, config.name, moves[-1]):
        previous(config.name, moves)


def move(root: Path, name: str, version: str, reason: str, kind: Kind = "promote", *, after: int) -> Move:
    """Append a move to the history and make it true, if the history still ends with the move number `after`.

    Raises PromotionLostError where another process appended first: what was decided on is no longer so.
    """
    made = Move(after + 1, version, reason, kind, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    if not _ledger(root, name).append(asdict(made), made.number):
        winner = history(root, name)[after]
        raise PromotionLostError(
            f"{name} version {version} was not promoted: another promotion came first, version "
            f"{winner.version} is champion since {winner.at} ({winner.reason}); look again, then decide"
        )
    registry.set_champion(name, version)
    logger.info("gate: %s version %s is champion: %s", name, version, reason)
    return made


def reconcile(root: Path, name: str) -> list[Move]:
    """The history after alias and ledger agree: a killed move is finished, one by hand is recorded."""
    moves, current = history(root, name), registry.champion(name)
    last = moves[-1] if moves else None
    if last and not settled(root, name, last):
        registry.set_champion(name, last.version)
    elif current is not None and (last is None or last.version != current):
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        external = Move(len(moves) + 1, current, "moved by hand", "external", at)
        if not _ledger(root, name).append(asdict(external), external.number):
            return reconcile(root, name)
        moves.append(external)
    return moves


def settled(root: Path, name: str, made: Move) -> bool:
    """Whether everything that follows from a move has been done."""
    return read_record(_settled(root, name), f"{made.number:06d}.json") is not None


def announce(name: str, made: Move) -> None:
    """Emit the event of a move; after a kill it may come twice, never not at all."""
    uri = f"models:/{name}/{made.version}"
    events.emit(events.MODEL_PROMOTED, events.model(name), model=name, model_uri=uri, **asdict(made))


def settle(root: Path, name: str, made: Move, facts: dict[str, Any]) -> None:
    """Record that everything that follows from a move has been done."""
    put_record(_settled(root, name), f"{made.number:06d}.json", facts)


def require_sound(root: Path, name: str, version: str) -> None:
    """Refuse a version that doesn't exist, was never scored, or isn't sound, whoever wants it promoted."""
    job = registry.tags(name, version).get("evaluation", "")
    record = read_record(job_store(root, job), "scores.json") if job else None
    if record is None:
        raise ValueError(
            f"models:/{name}/{version} has no scores under root {str(root)!r}: retrain registers it with some"
        )
    if (fault := unsound(Scores(**record))) is not None:
        raise ValueError(f"models:/{name}/{version} can't be champion: {fault}")


def unsound(scores: Scores) -> str | None:
    """Why a model can't be champion whatever its rivals, or None."""
    value = scores.scores[scores.headline]["value"]
    if not math.isfinite(value):
        return f"the test score is {value}"
    if scores.scores.get("active_units", {}).get("value") == 0:
        return "collapsed: no latent dimension is active"
    if scores.scores.get("reconstruction_std", {}).get("value", 1.0) < CONSTANT:
        return "a constant output: all images are decoded to the same one"
    bits = scores.scores.get("bits_per_dim", {}).get("value", 0.0)
    if bits >= EVEN_BITS:
        return f"no better than guessing: {bits:.2f} bits/dim, and evenly drawn grey values cost {EVEN_BITS}"
    return None


def _ledger(root: Path, name: str) -> Ledger:
    return Ledger(_store(root, name, "history"))


def _settled(root: Path, name: str) -> Store:
    return _store(root, name, "settled")


def _store(root: Path, name: str, part: str) -> Store:
    return open_store(root.resolve() / "registry" / name / part)
