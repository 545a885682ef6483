"""Numbered records in the store, put if absent: a history that nobody overwrites, the last one in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.store import Store, seal, unseal


@dataclass(frozen=True)
class Ledger:
    """Records 1, 2, 3, ... in one folder of a store.

    >>> from data.store import open_store
    >>> ledger = Ledger(open_store("memory://a-ledger"))
    >>> ledger.append({"version": "1"}, 1), ledger.append({"version": "2"}, 1)
    (True, False)
    >>> ledger.entries()
    [{'version': '1'}]
    """

    store: Store

    def entries(self) -> list[dict[str, Any]]:
        """Every record, oldest first, each checked against its own digest."""
        return [
            unseal(self.store.get(entry.path), self.store.uri(entry.path))
            for entry in sorted(self.store.entries())
        ]

    def append(self, body: dict[str, Any], number: int) -> bool:
        """Put the record of this number; False where another process took the number first."""
        return self.store.put_if_absent(f"{number:06d}.json", seal(body))
