"""Image quality against its definitions, written out slowly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vae.quality import mse, psnr, ssim

SOURCE = torch.Generator().manual_seed(0)
A = torch.rand(2, 3, 20, 15, generator=SOURCE, dtype=torch.float64)
B = (A + 0.1 * torch.randn(A.shape, generator=SOURCE, dtype=torch.float64)).clamp(0, 1)


def slow_ssim(a: np.ndarray, b: np.ndarray, size: int) -> float:
    """Wang et al. 2004 on one channel, window by window."""
    offsets = np.arange(size) - size // 2
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(a.shape[0] - size + 1):
        for j in range(a.shape[1] - size + 1):
            x, y = a[i : i + size, j : j + size], b[i : i + size, j : j + size]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("height", "width", "window"), [(20, 15, 11), (8, 15, 7), (9, 9, 9)])
def test_ssim_is_its_definition(height: int, width: int, window: int) -> None:
    a, b = A[..., :height, :width], B[..., :height, :width]
    for i in range(2):
        channels = [slow_ssim(a[i, c].numpy(), b[i, c].numpy(), window) for c in range(3)]
        assert ssim(a, b)[i].item() == pytest.approx(np.mean(channels), rel=1e-9)


def test_equal_images_have_ssim_one_and_the_psnr_of_rounding() -> None:
    torch.testing.assert_close(ssim(A, A), torch.ones(2).double())
    assert psnr(A, A).tolist() == pytest.approx([10 * math.log10(12 * 255**2)] * 2)


def test_psnr_is_decibels_of_mse() -> None:
    assert psnr(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.1)).item() == pytest.approx(20, abs=1e-4)
    torch.testing.assert_close(psnr(A, B), -10 * torch.log10(mse(A, B)))


def test_worse_images_score_worse() -> None:
    worse = (A + 3 * (B - A)).clamp(0, 1)
    assert (ssim(A, worse) < ssim(A, B)).all()
    assert (psnr(A, worse) < psnr(A, B)).all()
