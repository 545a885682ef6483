"""The model as MLflow's consumers load it: this file and `vae/` travel with it, this repository doesn't.

MLflow runs this file when somebody calls `mlflow.pyfunc.load_model`. No flow of ours does.
"""

import hashlib
from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext


class Latents(PythonModel):
    """Images, uint8 (B, C, H, W), to posterior means, float32 (B, D)."""

    def load_context(self, context: PythonModelContext) -> None:
        from vae.bundle import load
        from vae.encode import Encoder

        self.encoder = Encoder(load(context.artifacts["bundle"]), device="cpu")

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        images = np.ascontiguousarray(model_input)
        # Draws, where a model binarises by sampling, are a function of the image: its batch doesn't matter.
        ids = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        return self.encoder.encode(images, ids).mu


mlflow.models.set_model(Latents())
