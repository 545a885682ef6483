"""The table of docs/models.md: every model trained for the same CPU time and scored on the same test images.

    python benchmarks/table.py --data fashion_mnist=DIR mnist=DIR --minutes 1

What each row trains with was chosen by `search.py` on validation images held out of the training split; no
test image had a part in it. Each finished run is a JSON file under benchmarks/results/table and is not run
again, so the same command goes on after a stop. The models' bundles and per-image scores are kept under
build/table. At the end the table is written into docs/models.md and the pictures into docs/pictures.
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

from vae.config import AutoencoderConfig, FlatConfig, LadderConfig, ModelConfig, TrainConfig, model_config
from vae.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/table"
CHOICES = ROOT / "benchmarks/results/search.json"
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

    def changed(self, fields: dict[str, Any]) -> Row:
        """The row with fields of its training, or of its model, set anew."""
        train = {name: value for name, value in fields.items() if name in self.train.to_dict()}
        model = {name: value for name, value in fields.items() if name not in train}
        return replace(
            self,
            train=TrainConfig.from_dict(self.train.to_dict() | train),
            model=model_config(self.model.to_dict() | model),
        )


BASE = {
    "autoencoder": Row("autoencoder", AutoencoderConfig(**SHAPE, **BINARY, **CONV)),
    "mlp": Row("flat, MLP", FlatConfig(**SHAPE, **BINARY, network="mlp")),
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
CHOSEN: dict[str, dict[str, Any]] = json.loads(CHOICES.read_text())["chosen"] if CHOICES.exists() else {}
ROWS = {name: row.changed(CHOSEN.get(name, {})) for name, row in BASE.items()}
PAIR = ("ladder", "conv")


@dataclass(frozen=True)
class Run:
    """One training and its score."""

    data: str
    row: str
    seed: int
    minutes: float
    k: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.row}-seed{self.seed}-{self.minutes:g}min-k{self.k}"

    @property
    def record(self) -> Path:
        return RESULTS / f"{self.name}.json"


@dataclass(frozen=True)
class Plan:
    """What the command line asks of every set."""

    seeds: tuple[int, ...]
    minutes: float
    k: int

    def run(self, data: str, row: str, seed: int | None = None) -> Run:
        """A row's run under a seed, by default the first."""
        return Run(data, row, self.seeds[0] if seed is None else seed, self.minutes, self.k)

    def runs(self, data: str, compared: bool) -> Iterator[Run]:
        """Of a set that is compared, the pair under every seed, in turn; then each row under the first."""
        if compared:
            yield from (self.run(data, row, seed) for seed in self.seeds for row in PAIR)
        yield from (self.run(data, row) for row in ROWS)


def run(run: Run, splits: dict[str, Images]) -> None:
    """Train, score and record one run, unless the record of just this is there."""
    row = ROWS[run.row]
    config = replace(row.train, seed=run.seed)
    asked = {"model": row.model.to_dict(), "train": config.to_dict()}
    if run.record.exists() and json.loads(json.dumps(asked)).items() <= _read(run).items():
        return
    trained = train_for(60 * run.minutes, row.model, config, splits["train"].pixels)
    keep(trained.model, BUILD / run.name)
    test, began = splits["test"], time.process_time()
    result = evaluate(
        trained.model, test.pixels, test.ids, seed=EVALUATION_SEED, k=run.k, batch_size=100, chunk=20
    )
    np.savez(BUILD / run.name / "per_image.npz", **result.per_image)
    record = {
        "data": run.data,
        "row": run.row,
        **asked,
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


def _read(run: Run) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(run.record.read_text())
    return record


def paired(data: str, plan: Plan, score: str) -> dict[str, Any]:
    """The ladder's gain over the flat convolution, image by image, averaged over seeds, in nats.

    The interval is over test images, of each image's mean over the seeds; `by_seed` shows the seeds' spread.
    """
    ladder, flat = (
        np.stack([_per_image(plan.run(data, row, seed), score) for seed in plan.seeds]) for row in PAIR
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


def search_table() -> str:
    """What `search.py` found, in Markdown: a line a candidate, the chosen ones bold."""
    found = json.loads(CHOICES.read_text())
    lines = [
        "| row | change | CPU seconds | images seen | score | value |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    longest = {one["row"]: one["seconds"] for one in found["candidates"]}  # they are in order of it
    for one in found["candidates"]:
        chosen = found["chosen"][one["row"]] == one["change"] and one["seconds"] == longest[one["row"]]
        bold = "**" if chosen else ""
        change = ", ".join(f"{name} {setting}" for name, setting in one["change"].items())
        value = "{:.2f} ± {:.2f}".format(*one["value"]) if one["value"] else "diverged"
        lines.append(
            f"| {one['row']} | {bold}{change}{bold} | {one['seconds']:g} | {one['images_seen']:,} "
            f"| {one['score']} | {value} |"
        )
    foot = (
        f"In nats, on {found['validation_images']:,} validation images of Fashion-MNIST, seed "
        f"{found['seed']}; iw_bound with K = {found['k']}; {found['finished'][:10]}, one thread of "
        f"{found['machine']['cpu']}."
    )
    return "\n".join([*lines, "", foot])


def table(sets: list[str], plan: Plan) -> str:
    """The generated section of the page, in Markdown."""
    records = [_read(plan.run(data, row)) for data in sets for row in ROWS]
    lines = [
        "| set | model | parameters | images seen | CPU seconds | −ELBO | NLL | PSNR, dB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *map(_line, records),
    ]
    where, protocol = records[0]["machine"], records[-1]["protocol"]
    foot = (
        f"Nats an image, ± standard error over the {protocol['images']:,} test images, binarised and scored "
        f"under seed {protocol['seed']}; NLL by importance weighting with K = {protocol['k']}. Training "
        f"seed {plan.seeds[0]}; measured {records[0]['finished'][:10]} on one thread of {where['cpu']} "
        f"({where['cores']} cores, shared), torch {where['torch']}, Python {where['python']}."
    )
    return "\n".join([*lines, "", foot, "", *_pair_lines(sets[0], plan)])


def _line(record: dict[str, Any]) -> str:
    scores, title = record["scores"], ROWS[record["row"]].title
    elbo, bound = (_nats(scores[name]) if name in scores else "none" for name in ("elbo", "iw_bound"))
    return (
        f"| {record['data']} | {title} | {record['parameters']:,} | {record['images_seen']:,} "
        f"| {record['train_cpu_seconds']:.0f} | {elbo} | {bound} | {scores['psnr'][0]:.2f} |"
    )


def _nats(score: list[float]) -> str:
    return f"{-score[0]:.2f} ± {score[1]:.2f}"


def _pair_lines(data: str, plan: Plan) -> Iterator[str]:
    gains = [paired(data, plan, score) for score in ("elbo", "iw_bound")]
    (RESULTS / "paired.json").write_text(
        json.dumps({"data": data, "seeds": plan.seeds, "gains": gains}, indent=1) + "\n"
    )
    yield f"The ladder against the flat convolution on {data}, seeds {list(plan.seeds)}, image by image:"
    yield ""
    for gain in gains:
        low, high = gain["interval"]
        name = {"elbo": "ELBO", "iw_bound": "importance-weighted bound"}[gain["score"]]
        spread = ", ".join(f"{g:.2f}" for g in gain["by_seed"])
        interval = f"95 % interval {low:.2f} to {high:.2f}; by seed {spread}"
        yield f"- {name}: higher by **{gain['mean']:.2f} nats**, {interval}."


def write_page(section: str, text: str) -> None:
    """Put text between the page's markers of a section."""
    begin, end = f"<!-- {section}: make table -->", f"<!-- end of {section} -->"
    head, rest = PAGE.read_text().split(begin)
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
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, help="only run these, and write no page: for several processes"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    plan = Plan(tuple(chosen.seeds), chosen.minutes, chosen.k)
    sets = dict(pair.split("=", 1) for pair in chosen.data)
    splits = {name: read_idx(folder) for name, folder in sets.items()}
    asked = [one for number, data in enumerate(sets) for one in plan.runs(data, compared=number == 0)]
    for one in asked:
        if not chosen.rows or one.row in chosen.rows:
            run(one, splits[one.data])
    if chosen.rows:
        return
    write_page("search", search_table())
    write_page("table", table(list(sets), plan))
    if not chosen.no_pictures:
        from pictures import draw_all

        first = next(iter(sets))
        draw_all(splits[first], first, plan)


if __name__ == "__main__":
    main()
