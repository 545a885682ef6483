"""The pictures of docs/models.md, from the models that `table.py` trained and a few trained here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from table import BUILD, PAGE, RESULTS, ROOT, ROWS, SHAPE, Plan
from training import Images, keep, train_for, write_section

import vae
from flows.jobs import digest
from flows.mixture import fit_mixture
from vae import pixels
from vae.compress import CodeQuality, compression_curve
from vae.config import AutoencoderConfig, ModelConfig, TrainConfig
from vae.edit import attribute_direction, decode, interpolate, move
from vae.encode import Encoder
from vae.model import Model
from vae.sample import sample, sample_mixture

mpl.use("Agg")
from matplotlib import pyplot as plt

PICTURES = ROOT / "docs/pictures"
ENLARGE = 3  # screen pixels a pixel
CODES = (4, 8, 16, 32, 64)  # latent dimensions of the compression curves
SHIRT, PULLOVER, BAG = 6, 2, 8
MLP = ROWS["mlp"].train
SHOWN = 10
COMPONENTS = 20  # of the mixture fitted to latents
DEGREES = np.linspace(-0.5, 1.5, 9).tolist()


def draw_all(splits: dict[str, Images], data: str, plan: Plan) -> None:
    """Draw every picture of a set whose runs are done."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    models = {row: vae.load(BUILD / plan.run(data, row).name) for row in ROWS}
    train, test = splits["train"], splits["test"]
    reconstructions(models, test)
    prior_samples(models)
    mixture_samples(models, train)
    interpolation(models, test)
    shirt_to_pullover(models["conv"], splits)
    short = replace(plan, minutes=plan.minutes / 2)
    bar_added(splits, data, short)
    compression(splits, data, replace(plan, minutes=plan.minutes / 4))
    upscaled(splits, data, short)


def grid(rows: list[np.ndarray], name: str) -> None:
    """Write rows of images, each (N, 1, H, W) uint8, as one picture with a thin white border around each."""
    padded = [np.pad(row[:, 0], ((0, 0), (1, 1), (1, 1)), constant_values=255) for row in rows]
    picture = np.concatenate([np.concatenate(list(row), 1) for row in padded], 0)
    image = Image.fromarray(picture)
    image.resize((ENLARGE * image.width, ENLARGE * image.height), Image.Resampling.NEAREST).save(
        PICTURES / f"{name}.png", optimize=True
    )


def encode(model: Model, images: np.ndarray) -> np.ndarray:
    """Posterior means (N, D), of each image's fixed binarisation."""
    encoder, parts = Encoder(model), []
    for start in range(0, len(images), 500):
        rows = range(start, min(start + 500, len(images)))
        parts.append(encoder.encode(images[rows.start : rows.stop], list(rows)).mu)
    return np.concatenate(parts)


def moved(model: Model, z: np.ndarray, direction: np.ndarray, sign: int = 1) -> list[np.ndarray]:
    """The images of each row of latents (N, D) moved by every degree: N rows of pictures."""
    return [decode(model, row) for row in move(z, sign * direction, DEGREES)]


def reconstructions(models: dict[str, Model], test: Images) -> None:
    """One row of originals, then one a model, in the table's order."""
    shown = test.pixels[:SHOWN]
    grid([shown, *(decode(m, encode(m, shown)) for m in models.values())], "reconstructions")


def prior_samples(models: dict[str, Model]) -> None:
    """A row a model that has a prior, in the table's order; the ladder's last row at temperature 0.8."""
    rows = [sample(m, range(SHOWN), seed=0)[1] for m in models.values() if m.generative]
    cool = sample(models["ladder"], range(SHOWN), seed=0, temperature=0.8)[1]
    grid([*rows, cool], "prior_samples")


def mixture_samples(models: dict[str, Model], train: Images) -> None:
    """A row a model, in the table's order, from a Gaussian mixture fitted to training images' latents."""
    rows = []
    for model in models.values():
        mixture = fit_mixture(encode(model, train.pixels[:10_000]).astype(np.float64), COMPONENTS)
        rows.append(sample_mixture(model, *mixture, range(SHOWN), seed=0)[1])
    grid(rows, "mixture_samples")


def interpolation(models: dict[str, Model], test: Images) -> None:
    """From a shirt to a bag in the flat model and the ladder: the ends are the two reconstructions."""
    ends = np.stack([test.pixels[test.labels == label][0] for label in (SHIRT, BAG)])
    degrees = np.linspace(0, 1, SHOWN).tolist()
    rows = []
    for name in ("conv", "ladder"):
        first, last = encode(models[name], ends)
        rows.append(decode(models[name], interpolate(first, last, degrees)))
    grid(rows, "interpolation")


def shirt_to_pullover(model: Model, splits: dict[str, Images]) -> None:
    """Shirts of the test set moved along the training set's direction, by degree."""
    train, test = splits["train"], splits["test"]
    rows = np.isin(train.labels, (SHIRT, PULLOVER))
    pullover = attribute_direction(encode(model, train.pixels[rows]), train.labels[rows] == PULLOVER)
    shirts = encode(model, test.pixels[test.labels == SHIRT][:5])
    grid(moved(model, shirts, pullover), "shirt_to_pullover")


def add_bar(images: np.ndarray) -> np.ndarray:
    """A white bar with a black rim across rows 8 to 12: the dark glasses of a set without faces."""
    barred = images.copy()
    barred[..., 7:13, 2:26] = 0
    barred[..., 8:12, 3:25] = 255
    return barred


def bar_added(splits: dict[str, Images], data: str, plan: Plan) -> None:
    """An attribute that is no class: drawn onto half of the real images, then added and removed by degree.

    A logistic classifier, trained on the pixels of held-out images with and without the bar, scores the
    edits: the share it finds a bar in, at each degree.
    """
    train, test = splits["train"], splits["test"]
    half = np.random.default_rng(plan.seeds[0]).random(len(train.pixels)) < 0.5
    images = np.where(half[:, None, None, None], add_bar(train.pixels), train.pixels)
    config = replace(ROWS["conv"].model, likelihood="continuous_bernoulli", binarize="none")
    # The rate that serves binarised pixels is too high for grey values, whose gradients are longer.
    train_config = replace(ROWS["conv"].train, learning_rate=4e-3, gradient_clip=2.0)
    model = trained_once("bar", config, train_config, images, data, plan)
    bar = attribute_direction(encode(model, images[:10_000]), half[:10_000])
    held, edited = test.pixels[:5000], test.pixels[5000:6000]
    judge = LogisticRegression(max_iter=200).fit(
        _flat(np.concatenate([held, add_bar(held)])), np.repeat([0, 1], len(held))
    )
    plain, barred = encode(model, edited), encode(model, add_bar(edited))
    shares = {
        "degrees": DEGREES,
        "added": _found(judge, model, plain, bar),
        "removed": _found(judge, model, barred, -bar),
        "judge_on_originals": [_share(judge, edited), _share(judge, add_bar(edited))],
    }
    (RESULTS / "bar.json").write_text(json.dumps(shares, indent=1) + "\n")
    grid([*moved(model, plain[:3], bar), *moved(model, barred[:3], bar, -1)], "bar")
    _plot_bar(shares)


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255


def _share(judge: LogisticRegression, images: np.ndarray) -> float:
    return float(judge.predict(_flat(images)).mean())


def _found(judge: LogisticRegression, model: Model, z: np.ndarray, direction: np.ndarray) -> list[float]:
    """The share of latents whose image has a bar, at each degree."""
    return [_share(judge, decode(model, rows)) for rows in move(z, direction, DEGREES).swapaxes(0, 1)]


def _plot_bar(shares: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(shares["degrees"], shares["added"], "o-", label="added to images without")
    axes.plot(shares["degrees"], shares["removed"], "o-", label="removed from images with")
    axes.set(xlabel="degree", ylabel="share with a bar", ylim=(-0.03, 1.03))
    axes.legend(loc="center left")
    _save(figure, "bar_by_degree")


def compression(splits: dict[str, Images], data: str, plan: Plan) -> None:
    """PSNR and SSIM of the test images against the bytes of their quantised codes, a curve a code's size."""
    curves = {}
    for size in CODES:
        config = autoencoder(latent_dim=size)
        model = trained_once(f"code{size}", config, MLP, splits["train"].pixels, data, plan)
        curves[size] = compression_curve(model, splits["test"].pixels, splits["train"].pixels[:5000])
    points = {size: [asdict(point) for point in curve] for size, curve in curves.items()}
    (RESULTS / "compression.json").write_text(json.dumps(points, indent=1) + "\n")
    write_section(PAGE, "compression", "make table", compression_table(curves))
    figure, panels = plt.subplots(1, 2, figsize=(8, 3))
    for axes, name, unit in zip(panels, ("psnr", "ssim"), ("PSNR, dB", "SSIM"), strict=True):
        for size, curve in curves.items():
            axes.plot(
                [p.bytes_per_image for p in curve],
                [getattr(p, name) for p in curve],
                "o-",
                label=f"{size} dimensions",
            )
        axes.set(xlabel="bytes an image (784 as pixels)", ylabel=unit)
    panels[0].legend()
    _save(figure, "compression")


def compression_table(curves: dict[int, list[CodeQuality]]) -> str:
    """A row a code's size and a column a depth: bytes an image, PSNR in dB and SSIM."""
    depths = [point.bits for point in next(iter(curves.values()))]
    lines = [
        "| dimensions | " + " | ".join(f"{bits} bits" for bits in depths) + " |",
        "| ---: |" + " ---: |" * len(depths),
    ]
    for size, curve in curves.items():
        cells = [f"{p.bytes_per_image} B: {p.psnr:.1f} dB, {p.ssim:.2f}" for p in curve]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def upscaled(splits: dict[str, Images], data: str, plan: Plan) -> None:
    """Rows: the image shrunk to a quarter of its sides, what the autoencoder makes of it, the original."""
    config = autoencoder(latent_dim=64, corruption="downscale", corruption_strength=4.0)
    model = trained_once("upscale", config, MLP, splits["train"].pixels, data, plan)
    original = splits["test"].pixels[:SHOWN]
    small = pixels.to_uint8(pixels.downscale(torch.from_numpy(original), 4) / 255).numpy()
    grid([small, decode(model, encode(model, small)), original], "upscaled")


def autoencoder(**fields: object) -> AutoencoderConfig:
    """An autoencoder of grey values, scored as PSNR is: by squared error."""
    return AutoencoderConfig.from_dict({**SHAPE, "network": "mlp", "likelihood": "gaussian", **fields})


def trained_once(
    name: str, config: ModelConfig, train: TrainConfig, images: np.ndarray, data: str, plan: Plan
) -> Model:
    """The bundle of this name and these settings, trained for the plan's minutes if it is not there yet."""
    seed = plan.seeds[0]
    settings = digest(config.to_dict(), train.to_dict())
    folder: Path = BUILD / f"{data}-picture-{name}-{settings}-seed{seed}-{plan.minutes:.2g}min"
    if not folder.exists():
        keep(train_for(60 * plan.minutes, config, replace(train, seed=seed), images).model, folder)
    return vae.load(folder)


def _save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.png", dpi=110)
    plt.close(figure)
