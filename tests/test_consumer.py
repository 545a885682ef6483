"""Consumers: environments of their own, this repository nowhere on their path."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from parts import need
from PIL import Image
from pipeline import registry_of, run_json

import vae
from flows import registry
from flows.config import Train
from flows.tracking import Run
from vae.bundle import to_files
from vae.edit import reconstruct
from vae.model import build
from vae.sample import sample

HOME = Path(__file__).parent.parent

FROM_MLFLOW = """
import mlflow, numpy, sys
from PIL import Image
model = mlflow.pyfunc.load_model("models:/vae-digits@champion")
pixels = numpy.asarray(Image.open(sys.argv[1]).convert("L").resize((8, 8)))[None, None]
outputs = ("mean", "logvar", "sample", "reconstruction", "score", "generated")
found = {name: model.predict(pixels, params={"output": name, "seed": 3}) for name in outputs}
assert not any(name.split(".")[0] in ("flows", "data", "prefect") for name in sys.modules)
numpy.savez(sys.argv[2], pixels=pixels, default=model.predict(pixels), **found)
"""

FROM_TORCH = """
import numpy, sys, torch
program = torch.export.load(sys.argv[1]).module()
mean, logvar = program(torch.from_numpy(numpy.load(sys.argv[2])["pixels"]))
assert not {"vae", "mlflow"} & sys.modules.keys()
numpy.save(sys.argv[3], mean.detach().numpy())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose registry holds a champion of digits' size: what it has learned plays no part here."""
    root = tmp_path_factory.mktemp("consumed")
    model = build(vae.FlatConfig(height=8, width=8, channels=1, latent_dim=16))
    (root / "bundle").mkdir()
    for name, content in to_files(model, {"decode": {}}).items():
        (root / "bundle" / name).write_bytes(content)
    with registry_of(root):
        run = Run(Train(root=root))
        registry.register(run, root, "vae-digits", "job", root / "bundle", {})
        registry.set_champion("vae-digits", "1")
        run.finish()
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


@pytest.fixture(scope="module")
def outside(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder and an environment that know the registry and nothing of this repository."""
    folder = tmp_path_factory.mktemp("outside")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    return folder, environment


def run_outside(outside: tuple[Path, dict[str, str]], *command: object) -> None:
    folder, environment = outside
    done = subprocess.run(
        list(map(str, command)), env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def predicted(consumer: Path, outside: tuple[Path, dict[str, str]]) -> dict[str, np.ndarray]:
    """What a consumer's process predicts of a photo."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(outside[0] / "image.jpg")
    run_outside(outside, consumer, "-c", FROM_MLFLOW, "image.jpg", "outputs.npz")
    return dict(np.load(outside[0] / "outputs.npz"))


def test_the_registered_model_needs_only_what_it_lists(root: Path, predicted: dict[str, np.ndarray]) -> None:
    encoder = vae.Encoder(vae.load(root / "bundle"), "cpu")
    pixels = predicted["pixels"]
    latents = encoder.encode(pixels, [0])
    assert predicted["mean"].dtype == np.float32
    np.testing.assert_array_equal(predicted["default"], predicted["mean"])
    np.testing.assert_allclose(predicted["mean"], latents.mu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(predicted["logvar"], latents.logvar, rtol=1e-5, atol=1e-6)
    assert (
        np.abs(predicted["reconstruction"].astype(int) - reconstruct(encoder.model, pixels, [0])).max() <= 1
    )
    assert predicted["reconstruction"].dtype == np.uint8
    assert np.abs(predicted["generated"].astype(int) - sample(encoder.model, [0], 3)[1]).max() <= 1
    away = (predicted["sample"] - latents.mu) / np.exp(latents.logvar / 2)
    assert 0.3 < away.std() < 3
    assert predicted["score"].shape == (1,)
    assert predicted["score"] < 0


def test_the_registered_model_is_served_over_http(
    consumer: Path, outside: tuple[Path, dict[str, str]], predicted: dict[str, np.ndarray]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [consumer.parent / "mlflow", "models", "serve", "-m", "models:/vae-digits@champion"]
    folder, environment = outside
    environment = environment | {"PATH": f"{consumer.parent}:{environment['PATH']}"}
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [*serve, *options], env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            wait_for(lambda: client.get("/ping").status_code == 200, server, folder / "server.log")
            images = {"inputs": predicted["pixels"].tolist()}
            for name in ("mean", "reconstruction", "score"):
                body = images | {"params": {"output": name, "seed": 3}}
                answer = client.post("/invocations", json=body)
                assert answer.status_code == 200, answer.text
                np.testing.assert_allclose(answer.json()["predictions"], predicted[name], rtol=1e-5)
            answer = client.post("/invocations", json=images)
            np.testing.assert_allclose(answer.json()["predictions"], predicted["mean"], rtol=1e-5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # of the session that it leads: itself and its workers
        server.wait(30)


def wait_for(ready: Callable[[], bool], server: subprocess.Popen[bytes], log: Path) -> None:
    """Until a server answers; fail with its log if it ends or takes five minutes."""
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if ready():
                return
        assert server.poll() is None, log.read_text()
        time.sleep(0.5)
    pytest.fail(log.read_text())


def test_an_exported_encoder_needs_torch_alone(
    root: Path, consumer: Path, outside: tuple[Path, dict[str, str]], predicted: dict[str, np.ndarray]
) -> None:
    graphs = outside[0] / "graphs"
    found = run_json("export", "models:/vae-digits@champion", graphs, "--no-onnx", root=root)
    assert set(found["deviations"]) == {"encoder.pt2", "decoder.pt2"}
    run_outside(outside, consumer, "-c", FROM_TORCH, graphs / "encoder.pt2", "outputs.npz", "mean.npy")
    np.testing.assert_allclose(np.load(outside[0] / "mean.npy"), predicted["mean"], rtol=1e-5, atol=1e-6)
