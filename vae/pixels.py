"""What becomes of stored pixels before a model sees them: binarised, or corrupted to be restored.

Images are in grey values 0..255 throughout, binarised ones 0 and 255.
Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vae.config import ModelConfig
from vae.random import Draws


def check(config: ModelConfig, images: np.ndarray | Tensor) -> None:
    """Refuse images that the model cannot take: dtype, geometry, grey pixels for a Bernoulli likelihood.

    >>> from vae.config import FlatConfig
    >>> check(FlatConfig(height=8, width=8, channels=1), np.zeros((2, 1, 28, 28), np.uint8))
    Traceback (most recent call last):
    ValueError: images of shape (2, 1, 28, 28) do not fit the model, which takes (-1, 1, 8, 8)
    """
    if str(images.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"images have dtype {images.dtype}; the model takes uint8, 0..255")
    if tuple(images.shape[1:]) != config.image_shape:
        takes = ", ".join(map(str, config.image_shape))
        raise ValueError(
            f"images of shape {tuple(images.shape)} do not fit the model, which takes (-1, {takes})"
        )
    if config.likelihood != "bernoulli" or config.binarize != "none":
        return
    grey = ((images != 0) & (images != 255)).any()
    if grey:
        raise ValueError(
            "likelihood='bernoulli' is a probability of black and white pixels, and these images have grey "
            "ones: set binarize='threshold' or 'sampled', or an 8-bit likelihood ('discretized_logistic')"
        )


def rows_at_once(config: ModelConfig, most: int = 256) -> int:
    """How many images to pass through a network at once: about a million pixels, so memory is bounded.

    >>> from vae.config import FlatConfig
    >>> [rows_at_once(FlatConfig(height=side, width=side, channels=3)) for side in (28, 64, 256)]
    [256, 256, 16]
    """
    return min(most, max(1, 2**20 // (config.height * config.width)))


def tensor(images: np.ndarray) -> Tensor:
    """The array as a tensor, copied only where torch cannot take it as it is (read-only or strided)."""
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def binarize(images: Tensor, how: str, draws: Draws) -> Tensor:
    """Black or white, uint8: 'threshold' above 127, or 'sampled' white with probability x/255.

    >>> from vae.random import IdDraws
    >>> binarize(torch.tensor([[[[0, 127, 128, 255]]]], dtype=torch.uint8), "threshold", IdDraws(0, ["a"]))
    tensor([[[[  0,   0, 255, 255]]]], dtype=torch.uint8)
    """
    if how == "none":
        return images
    white = images > (127 if how == "threshold" else 255 * draws.uniform("binarize", *images.shape[1:]))
    return white.to(torch.uint8) * 255


def corrupt(images: Tensor, kind: str, strength: float, draws: Draws) -> Tensor:
    """Noise of standard deviation 255*strength, or the image shrunk by a whole factor and enlarged again."""
    if kind == "noise":
        noise = draws.normal("corruption", *images.shape[1:])
        return (images + 255 * strength * noise).clamp(0, 255)
    if kind == "downscale":
        return downscale(images, int(strength))
    return images


def downscale(images: Tensor, factor: int) -> Tensor:
    """Average factor x factor pixels, then spread each average over them again.

    Sides that the factor does not divide keep a partial block, averaged over the pixels it has.

    >>> downscale(torch.tensor([[[[0.0, 2.0, 7.0]]]]), 2)
    tensor([[[[1., 1., 7.]]]])
    """
    small = F.avg_pool2d(images.float(), factor, ceil_mode=True, count_include_pad=False)
    large = small.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return large[..., : images.shape[-2], : images.shape[-1]]


def unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Grey values 0..255 as [0, 1], in the model's dtype."""
    return x.to(dtype) / 255


def to_uint8(mean: Tensor) -> Tensor:
    """An expected image in [0, 1] as grey values, rounded."""
    return (mean * 255).round().clamp(0, 255).to(torch.uint8)
