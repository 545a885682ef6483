"""The table of docs/models.md: every model trained for the same CPU time and scored on the same test images.

    python benchmarks/table.py --data fashion_mnist=DIR mnist=DIR --minutes 2

What each row trains with was chosen by `search.py` on validation images held out of the training split; no
test image had a part in it. The two rows that are compared train in turn, a second each, and so do the
others. Bundles and per-image scores are kept under build/table, and what is there is not made again, so the
same command goes on after a stop. Each run's record is a JSON file under benchmarks/results/table. At the end
the table is written into docs/models.md and the pictures into docs/pictures.
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
from training import Images, Training, in_turn, keep, machine, read_idx, write_section

import vae
from vae.config import AutoencoderConfig, FlatConfig, LadderConfig, ModelConfig, TrainConfig, model_config
from vae.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/table"
CHOICES = ROOT / "benchmarks/results/search.json"
BUILD = ROOT / "build/table"
PAGE = ROOT / "docs/models.md"
TRAINED = "trained.json"
EVALUATION_SEED = 0

BINARY = {"likelihood": "bernoulli", "binarize": "sampled"}
CONV: dict[str, Any] = {"network": "strided", "hidden": (16, 32)}
LADDER: dict[str, Any] = {
    "strides": (4, 7),
    "hidden": (16, 128),
    "levels": (1, 1),
    "latents": (2, 32),
    "overlap": True,
}
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
        # A warm-up of 3 epochs of 20 is 15 % of the time.
        replace(TUNED, beta_schedule="warmup", warmup_epochs=3.0, gradient_clip=2.0),
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
        return f"{self.data}-{self.row}-seed{self.seed}-{self.minutes:g}min"

    @property
    def record(self) -> Path:
        return RESULTS / f"{self.name}-k{self.k}.json"

    @property
    def settings(self) -> tuple[ModelConfig, TrainConfig]:
        """What it is to train."""
        row = ROWS[self.row]
        return row.model, replace(row.train, seed=self.seed)

    @property
    def asked(self) -> dict[str, Any]:
        """The settings, as they come back from JSON."""
        model, train = self.settings
        found: dict[str, Any] = json.loads(json.dumps({"model": model.to_dict(), "train": train.to_dict()}))
        return found

    def trained(self) -> dict[str, Any]:
        """What the training of just these settings left beside its bundle; empty if it was none."""
        facts = read(BUILD / self.name / TRAINED)
        given = facts and (model_config(facts["model"]), TrainConfig.from_dict(facts["train"]))
        return facts if given == self.settings else {}

    def scored(self) -> bool:
        """Whether the record and the scores of each image are there, of this very training."""
        return self.per_image.exists() and read(self.record).get("trained") == self.trained()

    @property
    def per_image(self) -> Path:
        return BUILD / self.name / f"per_image-k{self.k}.npz"


def read(file: Path) -> dict[str, Any]:
    """A JSON file's record, empty where there is no file."""
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return record


@dataclass(frozen=True)
class Plan:
    """What the command line asks of every set."""

    seeds: tuple[int, ...]
    minutes: float
    k: int

    def run(self, data: str, row: str, seed: int | None = None) -> Run:
        """A row's run under a seed, by default the first."""
        return Run(data, row, self.seeds[0] if seed is None else seed, self.minutes, self.k)

    def groups(self, data: str, compared: bool) -> list[list[Run]]:
        """What trains in turn: the pair; the other rows; of what is compared, the pair by further seeds."""
        rest = [row for row in ROWS if row not in PAIR]
        first = [[self.run(data, row) for row in rows] for rows in (PAIR, rest)]
        seeds = self.seeds[1:] if compared else ()
        return first + [[self.run(data, row, seed) for row in PAIR] for seed in seeds]


def run_group(runs: list[Run], splits: dict[str, Images]) -> None:
    """Train runs in turn and score each; what is there already, of just these settings, is kept."""
    if not all(one.trained() for one in runs):
        train(runs, splits["train"].pixels)
    for one in runs:
        if not one.scored():
            score(one, splits["test"])


def train(runs: list[Run], images: np.ndarray) -> None:
    """Train runs in turn and keep their bundles, each with what was asked and what it took."""
    trainings = [Training(60 * one.minutes, *one.settings, images) for one in runs]
    for one, result in zip(runs, in_turn(trainings), strict=True):
        keep(result.model, BUILD / one.name)
        facts = {
            **one.asked,
            "parameters": sum(p.numel() for p in result.model.parameters()),
            "train_cpu_seconds": round(result.cpu_seconds, 1),
            "steps": result.steps,
            "steps_skipped": result.steps_skipped,
            "images_seen": result.images_seen,
            "machine": machine(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        (BUILD / one.name / TRAINED).write_text(json.dumps(facts, indent=1) + "\n")


def score(run: Run, test: Images) -> None:
    """Score a trained run on the test split and record it."""
    began = time.process_time()
    result = evaluate(
        vae.load(BUILD / run.name),
        test.pixels,
        test.ids,
        seed=EVALUATION_SEED,
        k=run.k,
        batch_size=100,
        chunk=20,
    )
    np.savez(run.per_image, **result.per_image)
    scores = {name: [s.value, s.stderr] for name, s in result.scores.items() if name != "kl_per_dim"}
    record = {
        "data": run.data,
        "row": run.row,
        "trained": run.trained(),
        "score_cpu_seconds": round(time.process_time() - began, 1),
        "scores": scores,
        "protocol": result.protocol,
    }
    run.record.write_text(json.dumps(record, indent=1) + "\n")
    print(run.name, {n: scores[n][0] for n in ("elbo", "iw_bound") if n in scores}, flush=True)


def paired(data: str, plan: Plan, score: str) -> dict[str, Any]:
    """The ladder's gain over the flat convolution, image by image, averaged over seeds, in nats.

    The interval is over test images, of each image's mean over the seeds; `by_seed` shows the seeds' spread.
    """
    ladder, flat = (
        np.stack([np.load(plan.run(data, row, seed).per_image)[score] for seed in plan.seeds]) for row in PAIR
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
        value = ", ".join("{:.2f} ± {:.2f}".format(*one) if one else "diverged" for one in one["values"])
        lines.append(
            f"| {one['row']} | {bold}{change}{bold} | {one['seconds']:g} | {one['images_seen']:,} "
            f"| {one['score']} | {value} |"
        )
    places = sorted({f"{one['finished'][:10]} on {one['cpu']}" for one in found["candidates"]})
    foot = (
        f"In nats, on {found['validation_images']:,} validation images of Fashion-MNIST; of the pair that is "
        "compared a value for each of two training seeds; images seen under the first; iw_bound with "
        f"K = {found['k']}; one thread, {', and '.join(places)}."
    )
    return "\n".join([*lines, "", foot])


def table(sets: list[str], plan: Plan) -> str:
    """The generated section of the page, in Markdown."""
    records = [read(plan.run(data, row).record) for data in sets for row in ROWS]
    lines = [
        "| set | model | parameters | images seen | CPU seconds | −ELBO | NLL | PSNR, dB | measured |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *map(_line, records),
    ]
    protocol, places = records[-1]["protocol"], {_place(record): None for record in records}
    foot = (
        f"Nats an image, ± standard error over the {protocol['images']:,} test images, binarised and scored "
        f"under seed {protocol['seed']}; NLL by importance weighting with K = {protocol['k']}. Training "
        f"seed {plan.seeds[0]}. Measured, as the last column says, on one thread of {'; of '.join(places)}."
    )
    return "\n".join([*lines, "", foot, "", *_pair_lines(sets[0], plan)])


def _line(record: dict[str, Any]) -> str:
    scores, trained, title = record["scores"], record["trained"], ROWS[record["row"]].title
    elbo, bound = (_nats(scores[name]) if name in scores else "none" for name in ("elbo", "iw_bound"))
    return (
        f"| {record['data']} | {title} | {trained['parameters']:,} | {trained['images_seen']:,} "
        f"| {trained['train_cpu_seconds']:.0f} | {elbo} | {bound} | {scores['psnr'][0]:.2f} "
        f"| {trained['finished'][:10]} |"
    )


def _place(record: dict[str, Any]) -> str:
    day, where = record["trained"]["finished"][:10], record["trained"]["machine"]
    return f"{where['cpu']} ({where['cores']} cores, shared), torch {where['torch']} ({day})"


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=DIR", help="idx folders; the first is compared"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="CPU minutes of training, for each run")
    parser.add_argument("--k", type=int, default=20, help="importance samples of the NLL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-pictures", action="store_true")
    parser.add_argument(
        "--table", action="store_true", help="train nothing, write the page from what is there"
    )
    parser.add_argument(
        "--groups",
        type=int,
        nargs="+",
        help="run these alone, counted from 0, and write no page: for several processes",
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    plan = Plan(tuple(chosen.seeds), chosen.minutes, chosen.k)
    sets = dict(pair.split("=", 1) for pair in chosen.data)
    splits = {name: read_idx(folder) for name, folder in sets.items()}
    groups = [group for i, data in enumerate(sets) for group in plan.groups(data, compared=i == 0)]
    for number in [] if chosen.table else chosen.groups or range(len(groups)):
        run_group(groups[number], splits[groups[number][0].data])
    if chosen.groups:
        return
    write_section(PAGE, "search", "make table", search_table())
    write_section(PAGE, "table", "make table", table(list(sets), plan))
    if not chosen.no_pictures:
        from pictures import draw_all

        first = next(iter(sets))
        draw_all(splits[first], first, plan)


if __name__ == "__main__":
    main()
