"""Models that learned nothing: a collapsed posterior, a constant output. The gate promotes none of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.trials import Experiment, Found, unless

SIZE, IMAGES, HELD_OUT = 8, 256, 64
Spoil = Callable[[Any, np.random.Generator], None]


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """Bright squares at random places on a dark ground, (N, 1, 8, 8): much to learn, soon learned."""
    images = np.full((count, 1, SIZE, SIZE), 20, np.uint8)
    for image, (y, x) in zip(images, rng.integers(0, SIZE - 3, (count, 2)), strict=True):
        image[0, y : y + 3, x : x + 3] = 200
    return images


# -- what is wrong with a model


def posterior_is_the_prior(model: Any, rng: np.random.Generator) -> None:
    model.posterior_head.weight.zero_()
    model.posterior_head.bias.zero_()


def posterior_is_constant(model: Any, rng: np.random.Generator) -> None:
    """A KL above zero that tells nothing of the image."""
    model.posterior_head.weight.zero_()
    model.posterior_head.bias.copy_(model.posterior_head.bias.new_tensor(rng.normal(size=8)))


def posterior_hardly_moves(model: Any, rng: np.random.Generator) -> None:
    model.posterior_head.weight.mul_(1e-3)


def output_is_constant(model: Any, rng: np.random.Generator) -> None:
    """The latents are as active as ever; the decoder does not look at them."""
    _last(model).weight.zero_()


def output_hardly_moves(model: Any, rng: np.random.Generator) -> None:
    _last(model).weight.mul_(1e-6)


def output_is_saturated(model: Any, rng: np.random.Generator) -> None:
    output_is_constant(model, rng)
    _last(model).bias.fill_(50.0 * rng.choice([-1, 1]))


def latents_are_cut_off(model: Any, rng: np.random.Generator) -> None:
    model.decoder.layers[0].weight.zero_()


def _last(model: Any) -> Any:
    return [module for module in model.decoder.layers if hasattr(module, "weight")][-1]


OF_THE_OUTPUT = (output_is_constant, output_hardly_moves, output_is_saturated, latents_are_cut_off)
OF_THE_POSTERIOR = (posterior_is_the_prior, posterior_is_constant, posterior_hardly_moves)


# -- before the gate


def batch(seed: int, folder: Path, shared: Path) -> Found:
    """A sound model and what can be made of it: alone, against a worse champion, against the sound one."""
    from flows.gate import judge
    from vae.model import build

    rng = np.random.default_rng(seed)
    images, held_out = pictures(rng, IMAGES), pictures(rng, HELD_OUT)
    model = trained(rng, images, beta=0.01)
    spoils: tuple[Spoil, ...] = OF_THE_OUTPUT + OF_THE_POSTERIOR * model.generative
    poor = build(model.config, seed)  # untrained: any model of the mean image is better
    champions = {"none": None, "poor": scored(poor, held_out, folder, "poor")}
    champions["sound"] = sound = scored(model, held_out, folder, "sound")
    verdict = judge(folder, "2", sound)
    found = unless(verdict.promoted, f"a sound {model.config} is not promoted: {verdict.reason}")
    rivals = [(spoil.__name__, spoilt(model, spoil, rng)) for spoil in spoils]
    if model.generative:
        rivals.append(("trained to collapse", trained(rng, images, beta=1e4)))
    for name, rival in rivals:
        scores = scored(rival, held_out, folder, name)
        for against, champion in champions.items():
            verdict = judge(folder, "2", scores, "1" if champion else "", champion)
            case = f"{name}, champion {against}, {model.config.model} {model.config.likelihood}"
            found += Found() + unless(not verdict.promoted, f"{case}: promoted as {verdict.reason}")
    return found


def trained(rng: np.random.Generator, images: np.ndarray, beta: float) -> Any:
    """A model that has learned to tell images apart, unless beta forbids it; every sixth an autoencoder."""
    from vae.config import AutoencoderConfig, FlatConfig, TrainConfig
    from vae.train import fit

    kind = AutoencoderConfig if beta < 1 and rng.random() < 1 / 6 else FlatConfig
    network = str(rng.choice(["mlp", "conv"]))
    # An MLP learns a mixture of logistics too slowly to be sound after these few steps.
    likelihoods = ["gaussian", "discretized_logistic"] if network == "conv" else ["gaussian"]
    config = kind(
        height=SIZE,
        width=SIZE,
        channels=1,
        network=network,
        hidden=(32, 64),
        latent_dim=4,
        likelihood=str(rng.choice(likelihoods)),
    )
    training = TrainConfig(
        epochs=25, batch_size=32, learning_rate=3e-3, beta=beta, seed=int(rng.integers(99))
    )
    return fit(config, training, images).model


def spoilt(model: Any, spoil: Spoil, rng: np.random.Generator) -> Any:
    import torch

    changed = copy.deepcopy(model)
    with torch.no_grad():
        spoil(changed, rng)
    return changed


def scored(model: Any, images: np.ndarray, folder: Path, name: str) -> Any:
    """A model's evaluation, on record as the flow puts it there."""
    from flows.config import Evaluate
    from flows.evaluate import commit
    from flows.results import Ingested
    from vae.evaluate import evaluate

    ids = [f"{index:03d}" for index in range(len(images))]
    found = evaluate(model, images, ids, k=4)
    config = Evaluate(root=folder, model=name, importance_samples=4)
    ingested = Ingested.model_construct(snapshot="held out", fingerprint="squares", decode={})
    return commit(config, name, ingested, f"evaluate-{name}", ids, found)


EXPERIMENTS = (
    Experiment(
        "a collapsed posterior or a constant output",
        "Never promoted by the gate: not as the first version, not over a champion that is worse or sound. "
        "The sound model that it was made of is.",
        goal=500,
        batch=batch,
        imports=(
            "flows.gate",
            "flows.evaluate",
            "scipy.special",
            "vae.train",
            "vae.evaluate",
            "torch._dynamo",
        ),
    ),
)
