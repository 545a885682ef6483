"""Exports: graphs that give what the model gives, at any batch size, without this repository; or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vae
from flows import export as exporting
from flows.config import Export
from vae.bundle import to_files
from vae.edit import decode
from vae.export import run_pt2
from vae.model import build

COLOUR = {"height": 9, "width": 11, "channels": 3, "latent_dim": 4, "hidden": (8, 16)}
CONV = vae.FlatConfig.from_dict(COLOUR)
MODELS: dict[str, vae.ModelConfig] = {
    "mlp": vae.FlatConfig(height=8, width=8, channels=1, network="mlp", latent_dim=3),
    "residual": vae.FlatConfig.from_dict(
        COLOUR | {"network": "residual", "likelihood": "bernoulli", "binarize": "threshold", "prior": "vamp"}
    ),
    "ladder": vae.LadderConfig(
        height=12, width=9, channels=1, hidden=(8, 16), likelihood="discretized_logistic_mixture"
    ),
    "autoencoder": vae.AutoencoderConfig.from_dict(COLOUR | {"network": "strided", "likelihood": "gaussian"}),
}

# What a consumer runs: numpy and one runtime, nothing of ours.
BY_ONNX = """
import numpy, onnxruntime, sys
session = onnxruntime.InferenceSession(sys.argv[1])
(name,) = (part.name for part in session.get_inputs())
outputs = session.run([part.name for part in session.get_outputs()], {name: numpy.load(sys.argv[2])})
assert not {"torch", "vae", "data", "flows"} & sys.modules.keys()
numpy.savez(sys.argv[3], *outputs)
"""


def bundle(config: vae.ModelConfig, folder: Path) -> Path:
    """A model whose weights are no longer those it starts with, where much is zero."""
    import torch

    model = build(config)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=source)
    folder.mkdir()
    for name, content in to_files(model, {"decode": {}}).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The textbook's model: its bundle, and the folder of its graphs."""
    root = tmp_path_factory.mktemp("conv")
    folder = bundle(CONV, root / "bundle")
    exporting.export(Export(model=str(folder), directory=root / "graphs"))
    return folder, root / "graphs"


@pytest.mark.parametrize("name", ["conv", *MODELS])
def test_graphs_give_what_the_model_gives(name: str, conv: tuple[Path, Path], tmp_path: Path) -> None:
    folder, graphs = conv
    if name != "conv":
        folder, graphs = bundle(MODELS[name], tmp_path / "bundle"), tmp_path / "graphs"
        exporting.export(Export(model=str(folder), directory=graphs))
    files = {"encoder.pt2", "encoder.onnx", "decoder.pt2", "decoder.onnx"}
    assert {path.name for path in graphs.iterdir()} == files | {"export.json"}
    assert json.loads((graphs / "export.json").read_text())["deviations"].keys() == files
    model = vae.load(folder)
    images = np.random.default_rng(5).integers(0, 256, (5, *model.config.image_shape), dtype=np.uint8)
    encoded = vae.Encoder(model, "cpu").encode(images, range(5))
    expected = [encoded.mu] if encoded.logvar is None else [encoded.mu, encoded.logvar]
    for kind, run in (("pt2", run_pt2), ("onnx", exporting.run_onnx)):
        limit = exporting.TOLERANCE[kind]
        (outputs,) = run((graphs / f"encoder.{kind}").read_bytes(), [images])
        for ours, theirs in zip(expected, outputs, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=limit, atol=limit)


def test_onnx_runs_where_there_is_no_torch(conv: tuple[Path, Path], tmp_path: Path) -> None:
    folder, graphs = conv
    z = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    np.save(tmp_path / "z.npy", z)
    arguments = [graphs / "decoder.onnx", tmp_path / "z.npy", tmp_path / "out.npz"]
    subprocess.run([sys.executable, "-c", BY_ONNX, *arguments], cwd=tmp_path, check=True)
    pixels = np.load(tmp_path / "out.npz")["arr_0"]
    np.testing.assert_array_equal(np.rint(pixels * 255).astype(np.uint8), decode(vae.load(folder), z))


def test_what_cannot_be_exported_leaves_nothing(
    conv: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "graphs"
    sampled = vae.FlatConfig.from_dict(COLOUR | {"likelihood": "bernoulli", "binarize": "sampled"})
    with pytest.raises(ValueError, match="binarize='sampled' draws for each image by its id"):
        exporting.export(Export(model=str(bundle(sampled, tmp_path / "sampled")), directory=target))
    model = str(conv[0])
    monkeypatch.setitem(exporting.TOLERANCE, "onnx", 0.0)  # no two runtimes round alike
    with pytest.raises(ValueError, match=r"encoder.onnx deviates from the model by .*, over 0"):
        exporting.export(Export(model=model, directory=target))
    assert {path.name for path in tmp_path.iterdir()} == {"sampled"}
    with pytest.raises(ValueError, match="graphs' exists already: give a new folder"):
        exporting.export(Export(model=model, directory=conv[1]))
