"""`python -m tests.faults --minutes N --seed S`: put faults in, keep count in the ledger, print the table."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # a forked process has none of its parent's threads
# Nobody's servers but those that an experiment starts.
for _name in [name for name in os.environ if name.startswith(("MLFLOW_", "PREFECT_", "AWS_", "VAE_FLOWS_"))]:
    del os.environ[_name]

from tests.faults.experiments import EXPERIMENTS  # noqa: E402
from tests.faults.ledger import HOME, Ledger, table  # noqa: E402
from tests.faults.trials import Ended, Experiment, Found, in_child  # noqa: E402


def main() -> int:
    options = _options()
    chosen = [one for one in EXPERIMENTS if options.only in one.name and (one.quick or not options.quick)]
    if not chosen:
        names = "\n  ".join(one.name for one in EXPERIMENTS)
        raise SystemExit(f"no experiment has {options.only!r} in its name; there are\n  {names}")
    able = [one for one in chosen if not _lacks(one)]
    ledger, end = Ledger(options.ledger), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="vae-flows-faults-") as folder:
        runner = Runner(ledger, Path(folder))
        for one, seed in due(options, ledger, able):
            runner.run(one, seed, one.few if options.quick else {})
            if not options.quick and time.monotonic() > end:
                break
    print(table(ledger, chosen))
    if options.page:
        from tests.faults.page import write

        write(ledger, EXPERIMENTS)
    return int(any(ledger.total(one.name).bad for one in chosen))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="end with the batch that goes past: 0, one")
    parser.add_argument("--seed", type=int, default=0, help="first seed; those in the ledger are passed over")
    parser.add_argument("--only", default="", help="only experiments with this in their name")
    parser.add_argument("--quick", action="store_true", help="one batch each of those in `make test`")
    parser.add_argument("--again", action="store_true", help="run the seeds again that broke a promise")
    parser.add_argument("--ledger", type=Path, default=HOME / "benchmarks/results/faults.jsonl")
    parser.add_argument("--page", action="store_true", help="write docs/reliability.md from the ledger")
    return parser.parse_args()


def _lacks(one: Experiment) -> bool:
    if lacking := one.lacks():
        print(f"{one.name}: left out, {lacking}", file=sys.stderr)
    return bool(lacking)


def due(
    options: argparse.Namespace, ledger: Ledger, able: Sequence[Experiment]
) -> Iterator[tuple[Experiment, int]]:
    """What to run next, and the seed: what has been broken, each once, or what is furthest from its goal."""
    if options.again:
        yield from [(one, seed) for one in able for seed in ledger.bad_seeds(one.name)]
        return
    each = iter(able)
    while one := next(each, None) if options.quick else least(ledger, able):
        yield one, ledger.next_seed(one.name, options.seed)


def least(ledger: Ledger, experiments: Sequence[Experiment]) -> Experiment | None:
    """The experiment that is furthest from its goal; None when all have reached theirs."""
    open_ones = [one for one in experiments if ledger.total(one.name).trials < one.goal]
    return min(open_ones, key=lambda one: ledger.total(one.name).trials / one.goal, default=None)


class Runner:
    """Runs batches, each in a process of its own, and prepares an experiment before its first."""

    def __init__(self, ledger: Ledger, folder: Path):
        self.ledger, self.folder = ledger, folder
        self.batches = 0
        self.prepared: dict[object, Path] = {}

    def run(self, one: Experiment, seed: int, size: dict[str, int]) -> None:
        """One batch, into the ledger; of this size, where it is not its own."""
        for name in one.imports:
            importlib.import_module(name)
        shared = self._prepare(one)
        self.batches += 1
        folder = self.folder / f"batch-{self.batches}"
        folder.mkdir()
        try:
            ended = in_child(
                lambda: vars(one.batch(seed, folder, shared, **size)), folder / "log", deadline=one.deadline
            )
            found = _found(ended)
        except TimeoutError as error:
            ended, found = Ended(0, None, one.deadline), Found(hung=1, note=str(error))
        self.ledger.append(one.name, seed, found, ended.seconds)
        if found.bad:
            print(f"{one.name}, seed {seed}: {found.note}", file=sys.stderr)
            print((folder / "log").read_text()[-3000:] if (folder / "log").exists() else "", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)

    def _prepare(self, one: Experiment) -> Path:
        if one.prepare not in self.prepared:
            shared = self.folder / f"shared-{len(self.prepared)}"
            shared.mkdir()
            self.prepared[one.prepare] = shared
            if one.prepare is not None:
                prepare = one.prepare
                in_child(lambda: prepare(shared), shared / "log", deadline=one.deadline).given()
            self._import_what_was_used(shared)
        return self.prepared[one.prepare]

    def _import_what_was_used(self, shared: Path) -> None:
        """Modules that `prepare` found out about are imported here once, not in every process again."""
        listed = shared / "modules"
        for name in listed.read_text().split() if listed.exists() else []:
            if name not in sys.modules:
                importlib.import_module(name)


def _found(ended: Ended) -> Found:
    """What a batch found; one that raised, or died, has broken a promise."""
    if ended.code == 0 and ended.value is not None:
        return Found(**ended.value)
    return Found(broken=1, note=f"ended with {ended.code}: {ended.value}"[:300])


if __name__ == "__main__":
    sys.exit(main())
