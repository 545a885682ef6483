"""Choose what each row of `table.py` trains with, on images held out of the training split.

    python benchmarks/search.py --data DIR --seconds 45

Every candidate trains for the same CPU seconds on 55,000 training images, those of a row in turn, and is
scored on the other 5,000; the test split is not read. The candidates of the pair that is compared do so under
two seeds, and one that is lost under either is out. The scores and the choice go to
benchmarks/results/search.json, from which `table.py` takes its settings. A candidate that is there already
is not trained again: delete the file to begin anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from table import BASE, CHOICES, PAIR
from training import Images, Training, in_turn, machine, read_idx

from vae.evaluate import evaluate
from vae.model import Model
from vae.random import permutation

VALIDATION = 5000
SEED = 0  # of the split and of the scores
K = 20
SEEDS = dict.fromkeys(PAIR, (0, 1))  # of training; of the other rows 0 alone
SCORE = {"autoencoder": "log_likelihood", "iwae": "iw_bound"}  # of the others, the ELBO


def each(*changes: dict[str, Any], rates: Sequence[float]) -> list[dict[str, Any]]:
    """Every change at every learning rate."""
    return [change | {"learning_rate": rate} for change in changes for rate in rates]


WIDE: dict[str, Any] = {"hidden": (32, 128), "latents": (4, 32)}  # others by hand: benchmarks/README.md
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "mlp": each({}, rates=(1e-3, 2e-3, 4e-3)),
    "conv": each({}, rates=(6e-3, 9e-3, 14e-3, 20e-3))
    + each({"batch_size": 32}, rates=(9e-3,))
    + each({"hidden": (32, 64)}, rates=(6e-3,)),
    "ladder": each(WIDE, rates=(4e-3, 6e-3)),
    "vamp": each({}, rates=(4e-3, 8e-3)),
    "iwae": each({}, rates=(6e-3, 14e-3)),
    "beta": each({}, rates=(9e-3, 14e-3)),
    "autoencoder": each({}, rates=(4e-3, 8e-3)),
}


def held_out(train: Images) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) rows of the training split, by a permutation that is f(SEED)."""
    order = permutation(SEED, 0, len(train.pixels)).numpy()
    return np.sort(order[VALIDATION:]), np.sort(order[:VALIDATION])


def score(model: Model, name: str, images: np.ndarray, ids: list[str]) -> list[float] | None:
    """A score of the model and its standard error, higher is better; None if it diverged."""
    k = K if name == "iw_bound" else 1
    try:
        result = evaluate(model, images, ids, seed=SEED, k=k, batch_size=100, chunk=20).scores[name]
    except ArithmeticError:
        return None
    assert isinstance(result.value, float)
    assert isinstance(result.stderr, float)
    return [round(result.value, 3), round(result.stderr, 3)]


def train_all(row: str, changes: list[dict[str, Any]], train: Images, seconds: float) -> list[dict[str, Any]]:
    """Train candidates of a row in turn, under each of its seeds, and score them."""
    seen, kept = held_out(train)
    name, ids, seeds = SCORE.get(row, "elbo"), [train.ids[i] for i in kept], SEEDS.get(row, (0,))
    rows = [BASE[row].changed(change | {"seed": seed}) for change in changes for seed in seeds]
    trained = in_turn([Training(seconds, one.model, one.train, train.pixels[seen]) for one in rows])
    scores = [score(one.model, name, train.pixels[kept], ids) for one in trained]
    return [
        {
            "row": row,
            "change": listed(change),
            "score": name,
            "values": scores[first : first + len(seeds)],
            "seconds": seconds,
            "images_seen": trained[first].images_seen,
            "steps_skipped": [one.steps_skipped for one in trained[first : first + len(seeds)]],
            "cpu": machine()["cpu"],
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        for change, first in zip(changes, range(0, len(rows), len(seeds)), strict=True)
    ]


def best(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The change with the highest mean score of each row, among those that were trained for longest."""
    chosen = {}
    for row in CANDIDATES:
        ones = [one for one in found if one["row"] == row and all(one["values"])]
        longest = [one for one in ones if one["seconds"] == max(one["seconds"] for one in ones)]
        if longest:
            chosen[row] = max(longest, key=lambda one: sum(value[0] for value in one["values"]))["change"]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="an idx folder; its test split is not used"
    )
    parser.add_argument("--seconds", type=float, default=45.0, help="CPU seconds of training, for each")
    parser.add_argument("--rows", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    train = read_idx(chosen.data)["train"]
    for row in chosen.rows:
        there = [one["change"] for one in known() if (one["row"], one["seconds"]) == (row, chosen.seconds)]
        missing = [change for change in CANDIDATES[row] if listed(change) not in there]
        found = train_all(row, missing, train, chosen.seconds) if missing else []
        write([*known(), *found])  # read only now: another process may serve other rows


def _order(one: dict[str, Any]) -> tuple[int, float, int]:
    row = one["row"]
    return (
        list(CANDIDATES).index(row),
        one["seconds"],
        list(map(listed, CANDIDATES[row])).index(one["change"]),
    )


def listed(change: dict[str, Any]) -> dict[str, Any]:
    """A change as it comes back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps(change))
    return found


def known() -> list[dict[str, Any]]:
    """The candidates that are scored."""
    found: list[dict[str, Any]] = json.loads(CHOICES.read_text())["candidates"] if CHOICES.exists() else []
    return found


def write(found: list[dict[str, Any]]) -> None:
    """Record the candidates, in the order of `CANDIDATES`, and the choice among them."""
    print(*found, sep="\n", flush=True)
    found.sort(key=_order)
    record = {
        "validation_images": VALIDATION,
        "seed": SEED,
        "k": K,
        "candidates": found,
        "chosen": best(found),
    }
    CHOICES.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
