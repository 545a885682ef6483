"""A model as two graphs that run without this code: images -> posterior, latents -> image.

The batch is left open, the weights are inside, and nothing is drawn: what is random stays with the model.

Legend: B batch, C channels, H W pixels, D latent dimensions.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vae import pixels
from vae.model import Model
from vae.random import IdDraws

TRACED = 3  # images in the batch a graph is traced on; with 1 the batch size would freeze


class Posterior(nn.Module):
    """images (B, C, H, W) uint8 -> mean and log-variance (B, D) of q(z|x), or the autoencoder's codes."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        seen = pixels.binarize(images, self.model.config.binarize, IdDraws(0, []))
        found = self.model.infer(seen, None)
        return (found.mean,) if found.logvar is None else (found.mean, found.logvar)


class Image(nn.Module):
    """latents (B, D) float32 -> the expected image (B, C, H, W), in [0, 1]."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.model.decode(latents).mean,)


@dataclass(frozen=True)
class Graph:
    """One direction of a model: as the model does it, and as a program."""

    direct: nn.Module
    program: torch.export.ExportedProgram
    example: Callable[[int], np.ndarray]
    input: str
    outputs: tuple[str, ...]

    def pt2(self) -> bytes:
        """The program as `torch.export.load` reads it."""
        file = io.BytesIO()
        torch.export.save(self.program, file)
        return file.getvalue()

    def onnx(self) -> bytes:
        """The program as an ONNX model; needs the packages onnx and onnxscript."""
        exported = torch.onnx.export(
            self.program,
            input_names=[self.input],
            output_names=list(self.outputs),
            dynamo=True,
            verbose=False,
        )
        assert exported is not None
        content: bytes = exported.model_proto.SerializeToString()
        return content

    @torch.no_grad()
    def run(self, batches: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """What the model itself gives for each batch: its outputs in order."""
        return [[output.numpy() for output in self.direct(torch.from_numpy(batch))] for batch in batches]


def graphs(model: Model) -> dict[str, Graph]:
    """`encoder` and `decoder` of a model, on the CPU.

    >>> from vae.config import FlatConfig
    >>> from vae.model import build
    >>> encoder = graphs(build(FlatConfig(height=8, width=8, channels=1, latent_dim=2)))["encoder"]
    >>> [part.shape for part in encoder.program.module()(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))]
    [torch.Size([5, 2]), torch.Size([5, 2])]

    Raises:
        ValueError: a model that binarises by sampling: its draws are a function of an image's id.
    """
    if model.config.binarize == "sampled":
        raise ValueError(
            "binarize='sampled' draws for each image by its id, which a graph can't: "
            "train with binarize='threshold' to export, or load the model's bundle"
        )
    model = model.cpu().to(memory_format=torch.contiguous_format).eval()  # as the file keeps weights
    moments = ("mean", "logvar") if model.generative else ("mean",)
    return {
        "encoder": _trace(Posterior(model), lambda count: images(model, count), "images", moments),
        "decoder": _trace(Image(model), lambda count: latents(model, count), "latents", ("image",)),
    }


def images(model: Model, count: int) -> np.ndarray:
    """Random images that fit the model, uint8 (count, C, H, W)."""
    shape = (count, *model.config.image_shape)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


def latents(model: Model, count: int) -> np.ndarray:
    """Standard normal latents, float32 (count, D)."""
    return np.random.default_rng(count).standard_normal((count, model.latent_dim), dtype=np.float32)


@torch.no_grad()
def run_pt2(content: bytes, batches: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """What an exported program, read back from its bytes, gives for each batch."""
    program = torch.export.load(io.BytesIO(content)).module()
    return [[output.numpy() for output in program(torch.from_numpy(batch))] for batch in batches]


@torch.no_grad()
def _trace(
    direct: nn.Module, example: Callable[[int], np.ndarray], name: str, outputs: tuple[str, ...]
) -> Graph:
    batch = torch.export.Dim("batch")
    given = (torch.from_numpy(example(TRACED)),)
    program = torch.export.export(direct.eval(), given, dynamic_shapes=({0: batch},))
    return Graph(direct, program, example, name, outputs)
