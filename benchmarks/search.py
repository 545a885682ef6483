"""Choose what each row of `table.py` trains with, on images held out of the training split.

    python benchmarks/search.py --data DIR --seconds 20

Every candidate trains for the same CPU seconds on 55,000 training images and is scored on the other 5,000;
the test split is not read. The scores and the choice go to benchmarks/results/search.json, from which
`table.py` takes its settings. A candidate that is there already is not trained again: delete the file to
begin anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
from typing import Any

import numpy as np
import torch
from table import BASE, CHOICES
from training import Images, machine, read_idx, train_for

from vae.evaluate import evaluate
from vae.model import Model
from vae.random import permutation

VALIDATION = 5000
SEED = 0
K = 20
SCORE = {"autoencoder": "log_likelihood", "iwae": "iw_bound"}  # of the others, the ELBO


def rates(*values: float) -> list[dict[str, Any]]:
    """A candidate a learning rate."""
    return [{"learning_rate": value} for value in values]


CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "mlp": rates(1e-3, 2e-3, 4e-3, 6e-3),
    "conv": rates(2e-3, 4e-3, 6e-3, 9e-3),
    "ladder": [{"overlap": False} | rate for rate in rates(4e-3, 6e-3)]
    + [{"overlap": True} | rate for rate in rates(4e-3, 6e-3, 9e-3)],
} | dict.fromkeys(("vamp", "iwae", "beta", "autoencoder"), rates(4e-3, 8e-3))


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


def candidate(row: str, change: dict[str, Any], train: Images, seconds: float) -> dict[str, Any]:
    """Train and score one candidate."""
    changed = BASE[row].changed(change | {"seed": SEED})
    seen, kept = held_out(train)
    trained = train_for(seconds, changed.model, changed.train, train.pixels[seen])
    name = SCORE.get(row, "elbo")
    value = score(trained.model, name, train.pixels[kept], [train.ids[i] for i in kept])
    return {
        "row": row,
        "change": change,
        "score": name,
        "value": value,
        "seconds": seconds,
        "images_seen": trained.images_seen,
    }


def best(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The change with the highest score of each row, among those that were trained for longest."""
    chosen = {}
    for row in CANDIDATES:
        ones = [one for one in found if one["row"] == row and one["value"]]
        longest = [one for one in ones if one["seconds"] == max(one["seconds"] for one in ones)]
        if longest:
            chosen[row] = max(longest, key=lambda one: one["value"][0])["change"]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="an idx folder; its test split is not used"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of training, for each")
    parser.add_argument("--rows", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    train = read_idx(chosen.data)["train"]
    for row, change in [(name, change) for name in chosen.rows for change in CANDIDATES[name]]:
        asked = row, change, chosen.seconds
        if not any((one["row"], one["change"], one["seconds"]) == asked for one in known()):
            one = candidate(row, change, train, chosen.seconds)
            write([*known(), one])  # read only now: another process may serve other rows


def _order(one: dict[str, Any]) -> tuple[int, float, int]:
    row = one["row"]
    return list(CANDIDATES).index(row), one["seconds"], CANDIDATES[row].index(one["change"])


def known() -> list[dict[str, Any]]:
    """The candidates that are scored."""
    found: list[dict[str, Any]] = json.loads(CHOICES.read_text())["candidates"] if CHOICES.exists() else []
    return found


def write(found: list[dict[str, Any]]) -> None:
    """Record the candidates, in the order of `CANDIDATES`, and the choice among them."""
    print(found[-1], flush=True)
    found.sort(key=_order)
    record = {
        "validation_images": VALIDATION,
        "seed": SEED,
        "k": K,
        "machine": machine(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "candidates": found,
        "chosen": best(found),
    }
    CHOICES.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
