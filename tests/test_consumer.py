"""Consumers: environments of their own, this repository nowhere on their path."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from parts import need
from PIL import Image
from pipeline import SHORT, run_json

HOME = Path(__file__).parent.parent

FROM_MLFLOW = """
import mlflow, numpy, sys
from PIL import Image
model = mlflow.pyfunc.load_model("models:/vae-digits@champion")
pixels = numpy.asarray(Image.open(sys.argv[1]).convert("L").resize((8, 8)))
latents = model.predict(pixels[None, None])
assert not any(name.split(".")[0] in ("flows", "data", "prefect") for name in sys.modules)
numpy.save(sys.argv[2], latents)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    root = tmp_path_factory.mktemp("consumed")
    run_json("retrain", *SHORT, root=root)
    return root


@pytest.fixture(scope="module")
def consumer(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has only what the model's own requirements.txt lists, and Pillow, which MLflow brings."""
    uv = shutil.which("uv") or shutil.which(HOME / ".uv/bin/uv")
    need(uv, "uv")
    (requirements,) = (root / "mlartifacts").rglob("requirements.txt")
    folder = tmp_path_factory.mktemp("consumer") / "venv"
    subprocess.run([uv, "venv", "--quiet", folder], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", folder, "-r", requirements], check=True)
    return folder / "bin" / "python"


def test_the_registered_model_needs_only_what_it_lists(root: Path, consumer: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "image.jpg")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [consumer, "-c", FROM_MLFLOW, tmp_path / "image.jpg", tmp_path / "latents.npy"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    latents = np.load(tmp_path / "latents.npy")
    assert latents.shape == (1, 16)
    assert latents.dtype == np.float32
    assert np.isfinite(latents).all()
