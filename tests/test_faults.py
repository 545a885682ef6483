"""The short run of the fault harness: a batch of each quick experiment keeps every promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.experiments import EXPERIMENTS
from tests.faults.ledger import Ledger, table
from tests.faults.trials import Experiment, Found

HOME = Path(__file__).parents[1]


def harness(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The harness forks, so it has a process of its own, with no thread in it yet."""
    line = [sys.executable, "-m", "tests.faults", *map(str, arguments)]
    return subprocess.run(line, cwd=HOME, capture_output=True, text=True, env=dict(os.environ))


def test_every_quick_experiment_keeps_its_promise(tmp_path: Path) -> None:
    done = harness("--quick", "--ledger", tmp_path / "ledger.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    wanted = {one.name for one in EXPERIMENTS if one.quick and not one.lacks()}
    assert {line["fault"] for line in lines if line["trials"]} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a bit flipped in a table", "a mutated image"])
def test_no_rot_goes_unseen(fault: str, tmp_path: Path) -> None:
    """10,000 flipped bits, 100,000 mutated images: minutes, so not among the quick ones."""
    (one,) = (one for one in EXPERIMENTS if one.name == fault)
    done = harness("--only", fault, "--minutes", 60, "--ledger", tmp_path / "ledger.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert sum(line["trials"] for line in lines) >= one.goal


def refuted(found: Found, ledger: Ledger) -> Experiment:
    """An experiment that the ledger says found something."""
    one = Experiment("a fault", "a promise", 10, lambda seed, folder, shared: found)
    ledger.append(one.name, 7, found, 0.1)
    return one


@pytest.mark.parametrize("how", ["lost", "duplicate", "torn", "hung", "broken"])
def test_the_table_shows_what_was_broken_and_the_seed(tmp_path: Path, how: str) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    one = refuted(Found(trials=3, **{how: 2}), ledger)
    heads, row = (line.split() for line in table(ledger, [one]).replace("a fault", "fault").splitlines())
    found = dict(zip(heads, row, strict=True))
    assert (found["trials"], found[how], found["seed"]) == ("3", "2", "7")


def test_a_ledger_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    one = refuted(Found(trials=3), Ledger(path))
    again = Ledger(path)
    assert (again.total(one.name).trials, again.next_seed(one.name, 7), again.next_seed(one.name, 0)) == (
        3,
        8,
        0,
    )


def test_what_is_mended_stays_and_counts_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    one = refuted(Found(trials=3, lost=2), ledger)
    ledger.append(one.name, 8, Found(trials=3, torn=1), 0.1)
    ledger.append(one.name, 7, Found(trials=3), 0.1)
    again = Ledger(ledger.path)
    total = again.total(one.name)
    assert (total.trials, total.lost, total.torn, again.mended(one.name)) == (9, 0, 1, 2)
    assert again.bad_seeds(one.name) == [8]
    ledger.append(one.name, 7, Found(trials=3, lost=1), 0.1)
    assert (ledger.total(one.name).lost, ledger.mended(one.name)) == (3, 0), "broken anew, nothing is mended"


def test_bad_seeds_are_run_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("a mutated image", 5, Found(trials=500, broken=1), 0.1)
    ledger.append("a mutated image", 6, Found(trials=500), 0.1)
    done = harness("--again", "--ledger", ledger.path)
    assert done.returncode == 0, done.stderr
    assert [line["seed"] for line in Ledger(ledger.path).lines] == [5, 6, 5]


def test_a_seed_is_repeated_and_an_unknown_name_refused(tmp_path: Path) -> None:
    only = ("--only", "mutated image", "--minutes", "0", "--seed", "3")
    done = harness(*only, "--ledger", tmp_path / "ledger.jsonl")
    assert done.returncode == 0, done.stderr
    (line,) = Ledger(tmp_path / "ledger.jsonl").lines
    assert (line["seed"], line["trials"]) == (3, 500)
    assert "no experiment has 'nothing'" in harness("--only", "nothing").stderr
