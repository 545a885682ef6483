"""docs/reliability.md: each promise beside its experiment and its figures, written from the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from tests.faults.ledger import HEADS, HOME, Ledger, cells
from tests.faults.trials import Experiment

PAGE = HOME / "docs/reliability.md"
BEGIN, END = "<!-- begin figures: written by `make faults` -->", "<!-- end figures -->"


def write(ledger: Ledger, experiments: Sequence[Experiment]) -> None:
    """Write the figures between the page's two comments."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{figures(ledger, experiments)}\n\n{END}{after}")


def figures(ledger: Ledger, experiments: Sequence[Experiment]) -> str:
    """The table, then what it was measured on, then what has not been reached."""
    lines = [
        f"| fault | what must hold | {' | '.join(HEADS)} |",
        "| --- | --- " + "| ---: " * len(HEADS) + "|",
    ]
    lines += [f"| {' | '.join([one.name, one.promise, *cells(ledger, one)])} |" for one in experiments]
    return "\n".join([*lines, "", where(ledger), "", missing(ledger, experiments)])


def where(ledger: Ledger) -> str:
    """Dates and machines of the trials."""
    dates, seconds = (
        sorted({line["date"] for line in ledger.lines}),
        sum(line["seconds"] for line in ledger.lines),
    )
    machines = " and ".join(sorted({line["machine"] for line in ledger.lines}))
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "never"
    return (
        f"Measured {when} on {machines}, shared with other work, in {seconds / 60:.0f} CPU minutes of trials."
    )


def missing(ledger: Ledger, experiments: Sequence[Experiment]) -> str:
    """What falls short of its goal, with its number."""
    short = [
        f"{one.name} ({ledger.total(one.name).trials:,} of {one.goal:,})"
        for one in experiments
        if ledger.total(one.name).trials < one.goal
    ]
    return f"Not reached yet: {'; '.join(short)}." if short else "Every goal has been reached."
