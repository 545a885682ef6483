"""Variational autoencoders of images: models, training, evaluation, encoding, sampling.

The names below are imported when first used, so that `import vae` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "AutoencoderConfig": "vae.config",
    "FlatConfig": "vae.config",
    "LadderConfig": "vae.config",
    "ModelConfig": "vae.config",
    "TrainConfig": "vae.config",
    "model_config": "vae.config",
    "Model": "vae.model",
    "build": "vae.model",
    "fit": "vae.train",
    "Encoder": "vae.encode",
    "load": "vae.bundle",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vae' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
