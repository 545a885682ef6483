"""`vae-flows tables`: what a user of tables asks, as the command line answers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_tables import folder_of, run

from flows.cli import main


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["tables", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A table of 13 rows, two of the same image, and one reject."""
    folder = folder_of(tmp_path / "in", range(13))
    (folder / "0003.png").write_bytes(b"")
    (folder / "0012.png").write_bytes((folder / "0011.png").read_bytes())
    return run(folder, tmp_path / "root" / "latents", share=0.2, lineage={"model": "models:/toy/1"}).uri


def test_list_and_show(capsys: pytest.CaptureFixture[str], tmp_path: Path, table: str) -> None:
    (listed,) = answer(capsys, "list", "--root", tmp_path / "root")["tables"]
    assert answer(capsys, "list", tmp_path / "root" / "latents")["tables"] == [listed]
    assert (listed["uri"], listed["rows"], listed["rejected"], listed["duplicates"]) == (table, 12, 1, 1)
    assert answer(capsys, "list", "--root", tmp_path / "new")["tables"] == []
    assert main(["tables", "list", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
    shown = answer(capsys, "show", table)
    assert shown["table"] == listed
    assert shown["about"]["lineage"]["model"] == "models:/toy/1"
    assert main(["tables", "show", table]) == 0
    printed = capsys.readouterr().out
    for words in ("snapshot 1, 12 rows, 1 rejected, 1 duplicate", "models:/toy/1", "pyarrow"):
        assert words in printed


def test_files_are_those_of_the_snapshot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, table: str
) -> None:
    (tmp_path / "in" / "0001.png").unlink()
    run(tmp_path / "in", tmp_path / "root" / "latents", share=0.2, lineage={"model": "models:/toy/1"})
    files = answer(capsys, "files", table)["files"]
    assert main(["tables", "files", table]) == 0
    assert capsys.readouterr().out.split() == files
    assert set(map(Path, files)) < set(Path(table).rglob("part-*.parquet"))


def test_verify_names_what_is_damaged(capsys: pytest.CaptureFixture[str], table: str) -> None:
    assert answer(capsys, "verify", table)["rows"] == 12
    part = Path(table) / "000001" / "part-000000.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert main(["tables", "verify", table]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "part-000000.parquet is damaged" in captured.err


def test_gc_says_what_it_would_remove_then_removes_it(capsys: pytest.CaptureFixture[str], table: str) -> None:
    stray = Path(table) / "000001" / "part-999999.parquet"
    stray.write_bytes(b"of no manifest")
    would = answer(capsys, "gc", table, "--dry-run")["would_remove"]
    assert would == ["000001/part-999999.parquet"]
    assert stray.exists()
    assert answer(capsys, "gc", table)["paths"] == would
    assert not stray.exists()
    assert answer(capsys, "verify", table)["rows"] == 12
    assert not answer(capsys, "gc", table)["changed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show",), "no table given: vae-flows tables show TABLE"),
        (("show", "/no/such"), "no table at /no/such"),
        (("verify", "ftp://host/x"), "unknown store 'ftp://host/x'"),
        (
            ("lst",),
            "action='lst' is not one of 'list', 'show', 'verify', 'gc', 'files': did you mean 'list'?",
        ),
        ((), "the following arguments are required"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert main(["tables", *arguments, "--root", str(tmp_path / "root")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "root").exists()
