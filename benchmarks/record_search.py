"""Choose what a CPU row of `record.py` trains, on images held out of the training split.

    python benchmarks/record_search.py --data DIR --epochs 10

Each candidate trains on 55,000 training images for a fifth of the row's epochs, with the row's schedules
drawn together, and is scored on 2,000 of the other 5,000; the test split is not read. What each gave goes to
benchmarks/results/record_search.json and, as a table, into benchmarks/record.md. A candidate that is there
already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import torch
from record import ON_CPU, PAGE, ladder
from search import held_out
from table import ROOT, read
from training import machine, read_idx, write_section

from vae.config import TrainConfig
from vae.evaluate import evaluate
from vae.train import fit

RESULTS = ROOT / "benchmarks/results/record_search.json"
SCORED, K, SEED = 2000, 50, 0
BASE: dict[str, Any] = {"learning_rate": 4e-3}
TWO: dict[str, Any] = {"strides": (4, 7), "levels": (1, 2), "latents": (4, 32)}
CANDIDATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "16 and 128 channels, one level a stage": (
        {"strides": (4, 7), "hidden": (16, 128), "levels": (1, 1), "latents": (2, 32)},
        {},
    ),
    "32 and 192 channels, two levels at the top": ({**TWO, "hidden": (32, 192)}, {}),
    "... at 0.006": ({**TWO, "hidden": (32, 192)}, {"learning_rate": 6e-3}),
    "... in batches of 64": ({**TWO, "hidden": (32, 192)}, {"batch_size": 64}),
    "... two blocks before each level": ({**TWO, "hidden": (32, 192), "blocks": 2}, {}),
    "64 and 256 channels": ({**TWO, "hidden": (64, 256)}, {}),
    "28 to 7 to 4 to 1": (
        {"strides": (4, 2, 4), "hidden": (32, 96, 192), "levels": (1, 1, 1), "latents": (4, 8, 32)},
        {},
    ),
}


def attempt(model: dict[str, Any], train: dict[str, Any], epochs: int, data: str) -> dict[str, Any]:
    """Train one candidate and score it."""
    images = read_idx(data)["train"]
    seen, kept = held_out(images)
    kept, share = kept[:SCORED], epochs / ON_CPU.epochs
    config = ladder(**model)
    settings: TrainConfig = replace(
        ON_CPU,
        epochs=epochs,
        warmup_epochs=ON_CPU.warmup_epochs * share,
        **{**BASE, "learning_rate_warmup_epochs": 0.5 * share, **train},
    )
    began = time.process_time()
    trained = fit(config, settings, images.pixels[seen]).model
    spent = time.process_time() - began
    ids = [images.ids[i] for i in kept]
    scores = evaluate(trained, images.pixels[kept], ids, seed=SEED, k=K, batch_size=100).scores
    return {
        "parameters": sum(p.numel() for p in trained.parameters()),
        "images_per_cpu_second": round(epochs * len(seen) / spent),
        **{
            name: [round(scores[name].value, 3), round(scores[name].stderr, 3)]
            for name in ("elbo", "iw_bound")
        },
        "model": config.to_dict(),
        "train": settings.to_dict(),
        "machine": machine(),
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        "| candidate | parameters | images a CPU-second | −ELBO | NLL |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, one in found.items():
        elbo, nll = (f"{-one[s][0]:.2f} ± {one[s][1]:.2f}" for s in ("elbo", "iw_bound"))
        speed = one["images_per_cpu_second"]
        lines.append(f"| {name} | {one['parameters']:,} | {speed:,} | {elbo} | {nll} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="the idx folder of MNIST")
    parser.add_argument("--epochs", type=int, default=10)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = read(RESULTS)
    for name, (model, train) in CANDIDATES.items():
        if name in found:
            continue
        found[name] = attempt(model, train, chosen.epochs, chosen.data)
        print(name, *(f"{key} {found[name][key]}" for key in ("elbo", "iw_bound")), flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write_section(PAGE, "search", "record_search.py", table(found))


if __name__ == "__main__":
    main()
