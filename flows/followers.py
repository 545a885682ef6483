"""Which latent tables follow a champion: a ledger of encodes under the root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.store import open_store
from flows.config import Encode
from flows.jobs import lock
from flows.ledger import Ledger

LEFT_OPEN = {"root", "model", "device", "follow"}  # of an encode: settled when it is done again


def following(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """The encodes that follow the champion, by the source that each began with."""
    latest = {entry["origin"]: entry["encode"] for entry in _ledger(root, name).entries()}
    return {origin: settings for origin, settings in latest.items() if settings is not None}


def subscribe(name: str, config: Encode, source: str) -> None:
    """From now on this encode follows the champion, in place of an earlier one of the same source.

    A retrain's stands under the source it was given, whatever snapshot it encodes today.
    """
    origin = f"{source} -> {config.out}" if config.out else source
    _append(config.root, name, origin, config.model_dump(mode="json", exclude=LEFT_OPEN))


def unsubscribe(root: Path, name: str, origin: str) -> None:
    """Let a table follow no more; ValueError where none of this source does."""
    require(root, name, origin)
    _append(root, name, origin, None)


def require(root: Path, name: str, origin: str) -> None:
    """Refuse a source of which no table follows the champion, naming those that do."""
    if origin not in following(root, name):
        known = ", ".join(map(repr, following(root, name))) or "none"
        raise ValueError(f"no table of {origin!r} follows the champion of {name!r}; these do: {known}")


def _append(root: Path, name: str, origin: str, settings: dict[str, Any] | None) -> None:
    with lock(root, f"followers-{name}"):
        if following(root, name).get(origin) != settings:
            ledger = _ledger(root, name)
            ledger.append({"origin": origin, "encode": settings}, len(ledger.entries()) + 1)


def _ledger(root: Path, name: str) -> Ledger:
    return Ledger(open_store(root.resolve() / "registry" / name / "followers"))
