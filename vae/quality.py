"""How alike two images are: MSE, PSNR, SSIM, one value an image, of pixels in [0, 1].

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

# The mean squared error of rounding to 256 values: an 8-bit image is known no better than this.
ROUNDING = 1 / (12 * 255**2)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error, (B, C, H, W) twice -> (B,).

    >>> mse(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    tensor([1.])
    """
    return ((a - b) ** 2).flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, -10 log10(MSE), at most the 58.9 dB of 8-bit rounding."""
    return -10 * torch.log10(mse(a, b).clamp(min=ROUNDING))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), the mean over pixels and channels, at most 1.

    A Gaussian window of 11 pixels and standard deviation 1.5, only where it fits whole; smaller images
    take the largest odd window that fits.

    >>> x = torch.rand(1, 1, 16, 16)
    >>> ssim(x, x)
    tensor([1.])
    """
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Convolve each channel with the Gaussian window, one axis after the other."""
    size = min(11, *(side - (side + 1) % 2 for side in x.shape[-2:]))
    offsets = torch.arange(size, dtype=x.dtype, device=x.device) - size // 2
    window = torch.softmax(-(offsets**2) / (2 * 1.5**2), 0)
    channels = x.shape[1]
    for shape in ((1, 1, size, 1), (1, 1, 1, size)):
        x = nnf.conv2d(x, window.reshape(shape).expand(channels, *shape[1:]), groups=channels)
    return x
