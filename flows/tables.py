"""Tables: what is there, what made it, whether it is intact, and what can go."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from data import upkeep
from data.tables import table_files
from flows.config import Tables
from flows.results import Files, Found, Removed, Result, Shown, Verified


def tables(config: Tables) -> Result:
    """Do what the configuration's action says, on a folder of tables or on one."""
    actions = {"list": _list, "show": _show, "verify": _verify, "gc": _sweep, "files": _files}
    return actions[config.action](config)


def _list(config: Tables) -> Found:
    found = upkeep.list_tables(config.table or str(config.root.resolve()))
    return Found(tables=[_facts(table) for table in found])


def _show(config: Tables) -> Shown:
    table = upkeep.show(config.table)
    return Shown(table=_facts(table), about=table.about)


def _verify(config: Tables) -> Verified:
    manifest = upkeep.verify(config.table)
    files = len(manifest.parts) + len(manifest.rejects)
    return Verified(uri=manifest.store.url, snapshot=manifest.number, rows=manifest.rows, files=files)


def _sweep(config: Tables) -> Removed:
    swept = upkeep.gc(config.table)
    return Removed(uri=config.table, paths=list(swept.paths), bytes=swept.bytes, changed=bool(swept.paths))


def _files(config: Tables) -> Files:
    return Files(files=table_files(config.table))


def _facts(table: upkeep.TableInfo) -> dict[str, Any]:
    return {name: value for name, value in asdict(table).items() if name != "about"}
