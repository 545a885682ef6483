"""What becomes of pixels before a model: binarised as stated, or corrupted to be restored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vae.config import AutoencoderConfig, FlatConfig
from vae.model import build
from vae.pixels import binarize, check, corrupt, downscale, tensor, to_uint8, unit
from vae.random import IdDraws

GREY = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def test_sampled_binarization_is_white_with_probability_x() -> None:
    ids = range(4000)
    black_or_white = binarize(GREY.expand(4000, -1, -1, -1), "sampled", IdDraws(0, ids))
    assert set(black_or_white.unique().tolist()) == {0, 255}
    share = (black_or_white / 255).mean(0).flatten()
    np.testing.assert_allclose(share, np.arange(256) / 255, atol=0.04)
    assert share[0] == 0
    assert share[255] == 1


def test_binarization_of_an_image_is_fixed_by_its_id() -> None:
    twice = GREY.expand(2, -1, -1, -1)
    first = binarize(twice, "sampled", IdDraws(0, ["a", "b"]))
    second = binarize(twice, "sampled", IdDraws(0, ["b", "a"]))
    assert torch.equal(first, second.flip(0))
    assert not torch.equal(first[0], first[1])


def test_unchanged_unless_asked() -> None:
    assert binarize(GREY, "none", IdDraws(0, ["a"])) is GREY
    assert corrupt(GREY, "none", 0.0, IdDraws(0, ["a"])) is GREY


def test_noise_has_the_strength_asked_for_and_stays_in_range() -> None:
    grey = torch.full((50, 1, 16, 16), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "noise", 0.1, IdDraws(0, range(50)))
    assert noisy.std().item() == pytest.approx(25.5, rel=0.05)
    wild = corrupt(grey, "noise", 5.0, IdDraws(0, range(50)))
    assert wild.min() == 0
    assert wild.max() == 255


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_downscaling_keeps_the_mean_of_each_block(factor: int) -> None:
    small = downscale(GREY, factor)
    assert small.shape == GREY.shape
    block = GREY[0, 0, :factor, :factor].float().mean()
    torch.testing.assert_close(small[0, 0, :factor, :factor], block.expand(factor, factor))
    edge = GREY[0, 0, 16 - (16 % factor or factor) :, :factor].float().mean()
    torch.testing.assert_close(small[0, 0, -1, 0], edge)


def test_a_model_that_restores_sees_the_corrupted_and_scores_the_clean() -> None:
    config = AutoencoderConfig(height=16, width=16, channels=1, corruption="downscale", corruption_strength=4)
    seen, target = build(config).observe(GREY, IdDraws(0, ["a"]))
    assert torch.equal(seen, downscale(GREY, 4))
    assert torch.equal(target, GREY)


def test_grey_values_survive_the_round_trip() -> None:
    assert torch.equal(to_uint8(unit(GREY, torch.float32)), GREY)
    assert to_uint8(torch.tensor([-0.1, 1.2])).tolist() == [0, 255]


def test_tensor_shares_memory_where_it_can() -> None:
    own = np.zeros((2, 3), np.uint8)
    assert tensor(own).data_ptr() == own.ctypes.data
    frozen = own.copy()
    frozen.flags.writeable = False
    assert tensor(frozen).data_ptr() != frozen.ctypes.data
    assert torch.equal(tensor(own[:, ::2]), torch.zeros(2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("images", [np.zeros((2, 1, 8, 8), np.uint8), torch.full((1, 1, 8, 8), 255).byte()])
def test_black_and_white_passes_every_likelihood(images: np.ndarray | torch.Tensor) -> None:
    for likelihood in ("bernoulli", "discretized_logistic"):
        check(FlatConfig(height=8, width=8, channels=1, likelihood=likelihood), images)


def test_grey_is_refused_by_a_bernoulli() -> None:
    assert_grey_is_refused()


def assert_grey_is_refused() -> None:
    config = FlatConfig(height=16, width=16, channels=1, likelihood="bernoulli")
    with pytest.raises(ValueError, match="grey"):
        check(config, GREY)
