"""The model as MLflow's consumers load it: this file and `vae/` travel with it, this repository doesn't.

MLflow runs this file when a consumer loads or serves the model. No flow of ours does.
"""

import hashlib
from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext

OUTPUTS = ("mean", "logvar", "sample", "reconstruction", "score", "generated")


class Latents(PythonModel):
    """Images, uint8 (B, C, H, W), to posterior means, float32 (B, D); or what the param `output` names.

    mean, logvar: of the posterior, float32 (B, D). sample: a draw from it, (B, D). reconstruction: from the
    mean, uint8 (B, C, H, W). score: the ELBO in nats, or an autoencoder's log-likelihood, float32 (B,).
    generated: images from the prior, as many as were given, uint8 (B, C, H, W). Draws are a function of the
    param `seed` and the image; for `generated`, of its place in the batch.
    """

    def load_context(self, context: PythonModelContext) -> None:
        from vae.bundle import load
        from vae.encode import Encoder

        self.encoder = Encoder(load(context.artifacts["bundle"]), device="cpu")

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        images = np.ascontiguousarray(model_input)
        chosen = {"output": "mean", "seed": 0, **(params or {})}
        return self.output(images, str(chosen["output"]), int(chosen["seed"]))

    def output(self, images: np.ndarray, name: str, seed: int) -> np.ndarray:
        """What a request asks for; ValueError for what this model has not."""
        from vae import edit
        from vae.sample import sample

        model = self.encoder.model
        if name not in OUTPUTS:
            raise ValueError(f"output {name!r} is not one of {', '.join(OUTPUTS)}")
        if name == "generated":
            return sample(model, range(len(images)), seed)[1]
        # Draws, where a model binarises by sampling, are a function of the image: its batch doesn't matter.
        ids = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        if name == "sample":
            return self.encoder.sample(images, ids, seed=seed)
        found = self.encoder.encode(images, ids, scores=name == "score", seed=seed)
        if name == "reconstruction":
            return edit.decode(model, found.mu)
        if name == "logvar" and found.logvar is None:
            raise ValueError("an autoencoder has codes and no log-variance")
        score = found.log_likelihood if found.elbo is None else found.elbo
        return np.asarray({"mean": found.mu, "logvar": found.logvar, "score": score}[name])


mlflow.models.set_model(Latents())
