"""Latents as a code of few bytes: how good an image comes back from how small a latent.

Each dimension is rounded to 2^bits values, evenly spaced over the range that it has in a reference set.

Legend: N rows, D latent dimensions, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vae import quality
from vae.edit import decode
from vae.encode import Encoder
from vae.model import Model


@dataclass(frozen=True)
class CodeQuality:
    """bits a dimension and bytes an image, with mean PSNR (dB), SSIM and MSE (of pixels in [0, 1])."""

    bits: int
    bytes_per_image: int
    psnr: float
    ssim: float
    mse: float


def quantize(latents: np.ndarray, reference: np.ndarray, bits: int) -> np.ndarray:
    """Latents (N, D) rounded to 2^bits values a dimension over the reference's (M, D) range.

    >>> quantize(np.array([[0.2], [0.9], [7.0]]), np.array([[0.0], [1.0]]), bits=1)
    array([[0.], [1.], [1.]])
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits={bits} must be in [1, 16]")
    low, high = reference.min(0), reference.max(0)
    step = np.where(high > low, high - low, 1) / (2**bits - 1)
    codes = np.clip(np.round((latents - low) / step), 0, 2**bits - 1)
    return low + codes * step


def compression_curve(
    model: Model, images: np.ndarray, reference: np.ndarray, bits: Sequence[int] = (2, 4, 6, 8, 12, 16)
) -> list[CodeQuality]:
    """The quality of images (N, C, H, W) uint8 rebuilt from their latents at each number of bits.

    The ranges come from the latents of the reference images (M, C, H, W), of the training split.
    """
    encoder = Encoder(model)
    latents, seen = (encoder.encode(x, range(len(x))).mu for x in (images, reference))
    original = torch.from_numpy(images / np.float32(255))
    curve = []
    for depth in bits:
        rebuilt = torch.from_numpy(decode(model, quantize(latents, seen, depth)) / np.float32(255))
        psnr, ssim, mse = (
            compare(original, rebuilt).mean().item() for compare in (quality.psnr, quality.ssim, quality.mse)
        )
        curve.append(CodeQuality(depth, math.ceil(model.latent_dim * depth / 8), psnr, ssim, mse))
    return curve
