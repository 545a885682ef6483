"""Named starting points. Each function returns what differs from the defaults of `vae.config`, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# On Fashion-MNIST a rate that falls to zero ends better than a constant one; on the few digits it does not.
# It rises first, over a twentieth of the textbook's run: on 3,000 photographs of 64x64 pixels in colour the
# posterior collapsed in the first ten steps of a full rate. And ten epochs of so few are too few steps.
ANNEALED = {"learning_rate_schedule": "cosine", "learning_rate_warmup_epochs": 0.5, "min_steps": 1000}


def textbook() -> dict[str, Any]:
    """The convolutional VAE of the textbook: convolution and pooling, two branches, a mirrored decoder."""
    return {
        "model": {"model": "flat", "network": "conv", "latent_dim": 32},
        "training": {**ANNEALED, "epochs": 10},
    }


def digits() -> dict[str, Any]:
    """The textbook's, for the 1,451 small training images that scikit-learn ships: more and smaller steps."""
    return {
        "model": {"model": "flat", "network": "conv", "latent_dim": 16},
        "training": {"epochs": 60, "batch_size": 64, "checkpoint_every": 200},
    }


def mlp() -> dict[str, Any]:
    """The VAE of Kingma & Welling (2014): one hidden layer each way; the fastest to train."""
    return {
        "model": {"model": "flat", "network": "mlp", "latent_dim": 20},
        "training": {**ANNEALED, "epochs": 50},
    }


def autoencoder() -> dict[str, Any]:
    """The deterministic autoencoder: reconstruction and compression, no sampling."""
    return {"model": {"model": "autoencoder", "latent_dim": 32}, "training": {**ANNEALED, "epochs": 10}}


def ladder() -> dict[str, Any]:
    """The hierarchical VAE: levels of spatial latents, each conditioned on those above; the better model."""
    steady = {"gradient_clip": 2.0}  # prior and posterior both move: a few long steps can end a training
    return {"model": {"model": "ladder"}, "training": {**ANNEALED, **steady, "epochs": 20}}


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (textbook, digits, mlp, autoencoder, ladder)
}
