"""The table of docs/models.md: every model trained for the same CPU time and scored on the same test images.

    python benchmarks/table.py --data fashion_mnist=DIR mnist=DIR --minutes 1

Each finished run is a JSON file under benchmarks/results/table and is not run again, so the same command
goes on after a stop. The models' bundles and per-image scores are kept under build/table. At the end the
table is written into docs/models.md and the pictures into docs/pictures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import Images, keep, machine, read_idx, train_for

from vae.config import AutoencoderConfig, FlatConfig, LadderConfig, ModelConfig, TrainConfig
from vae.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/table"
BUILD = ROOT / "build/table"
PAGE = ROOT / "docs/models.md"
EVALUATION_SEED = 0

BINARY = {"likelihood": "bernoulli", "binarize": "sampled"}
CONV: dict[str, Any] = {"network": "strided", "hidden": (16, 32)}
LADDER: dict[str, Any] = {"strides": (4, 7), "hidden": (16, 128), "levels": (1, 1), "latents": (2, 32)}
SHAPE = {"height": 28, "width": 28, "channels": 1}
TUNED = TrainConfig(batch_size=64, learning_rate=6e-3)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    title: str
    model: ModelConfig
    train: TrainConfig = TUNED


ROWS = {
    "autoencoder": Row("autoencoder", AutoencoderConfig(**SHAPE, **BINARY, **CONV)),
    "mlp": Row("flat, MLP", FlatConfig(**SHAPE, **BINARY, network="mlp"), replace(TUNED, learning_rate=1e-3)),
    "conv": Row("flat, convolution", FlatConfig(**SHAPE, **BINARY, **CONV)),
    "beta": Row("flat, convolution, β = 2", FlatConfig(**SHAPE, **BINARY, **CONV), replace(TUNED, beta=2.0)),
    "iwae": Row(
        "flat, convolution, IWAE K = 5 (DReG)",
        FlatConfig(**SHAPE, **BINARY, **CONV),
        replace(TUNED, objective="iwae", samples=5),
    ),
    "vamp": Row(
        "flat, convolution, VampPrior (50)",
        FlatConfig(**SHAPE, **BINARY, **CONV, prior="vamp", pseudo_inputs=50),
    ),
    "ladder": Row(
        "ladder",
        LadderConfig(**SHAPE, **BINARY, **LADDER),
        replace(TUNED, beta_schedule="warmup", warmup_epochs=3.0),  # of 20: 15 % of the time
    ),
}
PAIR = ("ladder", "conv")


@dataclass(frozen=True)
class Run:
    """One training and its score."""

    data: str
    row: str
    seed: int
    minutes: float

    @property
    def name(self) -> str:
        return f"{self.data}-{self.row}-seed{self.seed}-{self.minutes:g}min"

    @property
    def record(self) -> Path:
        return RESULTS / f"{self.name}.json"


def planned(data: str, seeds: list[int], minutes: float) -> Iterator[Run]:
    """The compared pair under every seed, in turn, then the other rows under the first."""
    if len(seeds) > 1:
        yield from (Run(data, row, seed, minutes) for seed in seeds for row in PAIR)
    yield from (Run(data, row, seeds[0], minutes) for row in ROWS)


def run(run: Run, splits: dict[str, Images], k: int) -> None:
    """Train, score and record one run, unless its record is there."""
    if run.record.exists():
        return
    row = ROWS[run.row]
    config = replace(row.train, seed=run.seed)
    trained = train_for(60 * run.minutes, row.model, config, splits["train"].pixels)
    keep(trained.model, BUILD / run.name)
    test, began = splits["test"], time.process_time()
    result = evaluate(
        trained.model, test.pixels, test.ids, seed=EVALUATION_SEED, k=k, batch_size=100, chunk=20
    )
    np.savez(BUILD / run.name / "per_image.npz", **result.per_image)
    record = {
        "data": run.data,
        "row": run.row,
        "model": row.model.to_dict(),
        "train": config.to_dict(),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "train_cpu_seconds": round(trained.cpu_seconds, 1),
        "score_cpu_seconds": round(time.process_time() - began, 1),
        "steps": trained.steps,
        "images_seen": trained.images_seen,
        "scores": {name: [s.value, s.stderr] for name, s in result.scores.items() if name != "kl_per_dim"},
        "protocol": result.protocol,
        "machine": machine(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    run.record.write_text(json.dumps(record, indent=1) + "\n")
    print(
        run.name,
        {n: record["scores"][n][0] for n in ("elbo", "iw_bound") if n in record["scores"]},
        flush=True,
    )


def paired(data: str, seeds: list[int], minutes: float, score: str) -> dict[str, Any]:
    """The ladder's gain over the flat convolution, image by image, averaged over seeds, in nats.

    The interval is over test images, of each image's mean over the seeds; `by_seed` shows the seeds' spread.
    """
    ladder, flat = (
        np.stack([_per_image(Run(data, row, seed, minutes), score) for seed in seeds]) for row in PAIR
    )
    gains = ladder - flat
    by_image = gains.mean(0)
    half = 1.96 * by_image.std(ddof=1) / np.sqrt(len(by_image))
    mean = float(by_image.mean())
    return {
        "score": score,
        "mean": mean,
        "interval": [mean - half, mean + half],
        "by_seed": gains.mean(1).tolist(),
    }


def _per_image(run: Run, score: str) -> np.ndarray:
    return np.load(BUILD / run.name / "per_image.npz")[score]


def table(sets: list[str], seeds: list[int], minutes: float) -> str:
    """The generated section of the page, in Markdown."""
    runs = [Run(data, row, seeds[0], minutes) for data in sets for row in ROWS]
    records = [json.loads(run.record.read_text()) for run in runs if run.record.exists()]
    lines = [
        "| set | model | parameters | images seen | CPU seconds | −ELBO | NLL | PSNR, dB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *map(_line, records),
    ]
    where, protocol = records[0]["machine"], records[-1]["protocol"]
    foot = (
        f"Nats an image, ± standard error over the {protocol['images']:,} test images, binarised and scored "
        f"under seed {protocol['seed']}; NLL by importance weighting with K = {protocol['k']}. Training "
        f"seed {seeds[0]}; measured {records[0]['finished'][:10]} on one thread of {where['cpu']} "
        f"({where['cores']} cores, shared), torch {where['torch']}, Python {where['python']}."
    )
    return "\n".join([*lines, "", foot, "", *_pair_lines(sets[0], seeds, minutes)])


def _line(record: dict[str, Any]) -> str:
    scores, title = record["scores"], ROWS[record["row"]].title
    elbo, bound = (_nats(scores[name]) if name in scores else "none" for name in ("elbo", "iw_bound"))
    return (
        f"| {record['data']} | {title} | {record['parameters']:,} | {record['images_seen']:,} "
        f"| {record['train_cpu_seconds']:.0f} | {elbo} | {bound} | {scores['psnr'][0]:.2f} |"
    )


def _nats(score: list[float]) -> str:
    return f"{-score[0]:.2f} ± {score[1]:.2f}"


def _pair_lines(data: str, seeds: list[int], minutes: float) -> Iterator[str]:
    gains = [paired(data, seeds, minutes, score) for score in ("elbo", "iw_bound")]
    (RESULTS / "paired.json").write_text(
        json.dumps({"data": data, "seeds": seeds, "gains": gains}, indent=1) + "\n"
    )
    yield f"The ladder against the flat convolution on {data}, seeds {seeds}, image by image:"
    yield ""
    for gain in gains:
        low, high = gain["interval"]
        name = {"elbo": "ELBO", "iw_bound": "importance-weighted bound"}[gain["score"]]
        spread = ", ".join(f"{g:.2f}" for g in gain["by_seed"])
        interval = f"95 % interval {low:.2f} to {high:.2f}; by seed {spread}"
        yield f"- {name}: higher by **{gain['mean']:.2f} nats**, {interval}."


def write_page(text: str) -> None:
    """Put the table between the page's markers."""
    begin, end = "<!-- table: make table -->", "<!-- end of table -->"
    page = PAGE.read_text()
    head, rest = page.split(begin)
    PAGE.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=DIR", help="idx folders; the first is compared"
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="CPU minutes of training, for each run")
    parser.add_argument("--k", type=int, default=20, help="importance samples of the NLL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-pictures", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    sets = dict(pair.split("=", 1) for pair in chosen.data)
    splits = {name: read_idx(folder) for name, folder in sets.items()}
    for number, data in enumerate(sets):
        for one in planned(data, chosen.seeds if number == 0 else chosen.seeds[:1], chosen.minutes):
            run(one, splits[data], chosen.k)
        write_page(table(list(sets)[: number + 1], chosen.seeds, chosen.minutes))
        if number == 0 and not chosen.no_pictures:
            from pictures import draw_all

            draw_all(splits[data], data, chosen.minutes, chosen.seeds[0])


if __name__ == "__main__":
    main()
