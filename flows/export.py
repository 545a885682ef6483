"""Export: a model's encoder and decoder as graphs for those who run no code of ours, checked first."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.config import Export
from flows.pull import refuse_existing, write_folder
from flows.registry import Located, locate
from flows.results import Exported

if TYPE_CHECKING:
    import vae
    from vae.export import Graph

logger = logging.getLogger("vae_flows.export")
BATCHES = (1, 2, 7)  # sizes that a graph is checked at
# |exported - model| <= tolerance * (1 + |model|), for every number of every output.
TOLERANCE = {"pt2": 1e-6, "onnx": 1e-4}


def export(config: Export) -> Exported:
    """Write encoder and decoder, each found equal to the model; all of them appear at once, or none."""
    import vae
    from vae.export import graphs

    refuse_existing(config.directory)
    found = locate(config.model)
    model = vae.load(found.folder)
    files: dict[str, bytes] = {}
    deviations: dict[str, float] = {}
    for name, graph in graphs(model).items():
        files[f"{name}.pt2"] = graph.pt2()
        if config.onnx:
            files[f"{name}.onnx"] = to_onnx(graph)
        for file in (file for file in files if file.startswith(name)):
            deviations[file] = check(file, files[file], graph)
            logger.info("export: %s, %d bytes, off by %.1e at most", file, len(files[file]), deviations[file])
    files["export.json"] = (json.dumps(about(found, model, deviations), indent=1) + "\n").encode()
    write_folder(config.directory, files)
    return Exported(model=found.uri, directory=config.directory, deviations=deviations, changed=True)


def check(file: str, content: bytes, graph: Graph) -> float:
    """The largest deviation from the model, |a - b| / (1 + |b|); ValueError over the tolerance."""
    from vae.export import run_pt2

    kind = file.rsplit(".", 1)[1]
    run, limit = {"pt2": run_pt2, "onnx": run_onnx}[kind], TOLERANCE[kind]
    batches = [graph.example(count) for count in BATCHES]
    worst = 0.0
    for outputs, ours in zip(run(content, batches), graph.run(batches), strict=True):
        for output, own in zip(outputs, ours, strict=True):
            if output.shape != own.shape:
                raise ValueError(
                    f"{file} gives shape {output.shape}, the model {own.shape}: nothing was written"
                )
            worst = max(worst, float((np.abs(output - own) / (1 + np.abs(own))).max()))
    if not worst <= limit:
        raise ValueError(
            f"{file} deviates from the model by {worst:.2g}, over {limit:g}: nothing was written"
        )
    return worst


def to_onnx(graph: Graph) -> bytes:
    """The graph as ONNX; ValueError where the extra is not installed."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: install vae-flows[onnx], or give --no-onnx") from None
    with contextlib.redirect_stdout(sys.stderr):  # the exporter prints
        return graph.onnx()


def run_onnx(content: bytes, batches: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """What onnxruntime makes of an ONNX model, on the CPU, for each batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [[np.asarray(output) for output in session.run(None, {name: batch})] for batch in batches]


def about(found: Located, model: vae.Model, deviations: dict[str, float]) -> dict[str, Any]:
    """What the graphs are, for whoever finds the folder."""
    facts = found.facts()
    return {
        "model": found.uri,
        "weights_sha256": facts["weights"],
        "decode": facts["extra"].get("decode"),
        "encoder": {"images": ["uint8", "batch", *model.config.image_shape], "posterior": model.latent_dim},
        "decoder": {"latents": ["float32", "batch", model.latent_dim], "image": "expected, in [0, 1]"},
        "tolerance": TOLERANCE,
        "deviations": deviations,
    }
