"""Moving through the latent space: ends that are exact, directions with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from linear_vae import LinearVAE, drawn_images

from vae.config import FlatConfig
from vae.edit import attribute_direction, decode, interpolate, move, movement, reconstruct
from vae.encode import Encoder
from vae.model import build

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 3, 8, 9), dtype=np.uint8)
MODEL = build(FlatConfig(height=8, width=9, channels=3, latent_dim=5))
LATENTS = Encoder(MODEL).encode(IMAGES, range(4)).mu
LINEAR = LinearVAE().use_exact_posterior().float()


@pytest.mark.parametrize("how", ["linear", "spherical"])
def test_the_ends_are_the_two_reconstructions(how: str) -> None:
    path = interpolate(LATENTS[0], LATENTS[1], np.linspace(0, 1, 7).tolist(), how)
    assert path.shape == (7, 5)
    np.testing.assert_allclose(path[[0, -1]], LATENTS[:2], rtol=1e-6)
    ends = decode(MODEL, path)[[0, -1]]
    assert np.abs(ends.astype(int) - reconstruct(MODEL, IMAGES[:2], range(2))).max() <= 1  # rounding


def test_linear_steps_are_even_and_go_beyond_the_ends() -> None:
    a, b = RNG.normal(size=(2, 6))
    path = interpolate(a, b, [-1, 0, 1, 2])
    np.testing.assert_allclose(np.diff(path, axis=0), np.tile(b - a, (3, 1)))


def test_spherical_steps_keep_the_length_and_the_angle() -> None:
    a, b = RNG.normal(size=(2, 6))
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    path = interpolate(a, b, np.linspace(-0.5, 1.5, 9).tolist(), "spherical")
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), np.linalg.norm(a))
    steps = (path[1:] * path[:-1]).sum(1)
    np.testing.assert_allclose(steps, steps[0])


def test_spherical_between_parallel_latents_is_linear_and_between_opposite_ones_refused() -> None:
    a = np.array([1.0, 2.0])
    np.testing.assert_allclose(interpolate(a, 3 * a, [0.5], "spherical"), [2 * a])
    np.testing.assert_allclose(interpolate(0 * a, a, [0.5], "spherical"), [a / 2])
    with pytest.raises(ValueError, match="opposite directions"):
        interpolate(a, -a, [0.5], "spherical")
    with pytest.raises(ValueError, match="neither 'linear' nor 'spherical'"):
        interpolate(a, -a, [0.5], "cubic")


def attributed(count: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents to which two attributes, often found together, each add a known direction."""
    glasses = RNG.random(count) < 0.4
    beard = RNG.random(count) < np.where(glasses, 0.8, 0.2)
    latents = RNG.normal(size=(count, 3)) + np.outer(glasses, [2, 0, 0]) + np.outer(beard, [0, 3, 0])
    return latents, glasses, beard


def test_a_direction_is_the_difference_of_means() -> None:
    latents, glasses, _ = attributed()
    found = attribute_direction(latents, glasses)
    np.testing.assert_allclose(found, latents[glasses].mean(0) - latents[~glasses].mean(0))
    assert found[1] > 1  # the beard comes along, for the two are found together


def test_with_the_others_held_the_direction_is_the_attribute_alone() -> None:
    latents, glasses, beard = attributed()
    found = attribute_direction(latents, glasses, others=beard[:, None])
    np.testing.assert_allclose(found, [2, 0, 0], atol=0.15)


def test_movement_tells_a_clean_edit_from_one_that_drags_another_attribute_along() -> None:
    latents, glasses, beard = attributed()
    both = np.column_stack([glasses, beard])
    plain = attribute_direction(latents, glasses)
    clean = attribute_direction(latents, glasses, others=beard[:, None])
    dragged = movement(latents, both, latents, move(latents, plain, [1.0])[:, 0])
    kept = movement(latents, both, latents, move(latents, clean, [1.0])[:, 0])
    assert dragged[1] > 3 * abs(kept[1])
    assert kept[0] > 2 * abs(kept[1])


def test_degrees_scale_the_move_and_minus_one_takes_it_away() -> None:
    latents, direction = RNG.normal(size=(4, 3)), np.array([1.0, -2.0, 0.5])
    moved = move(latents, direction, [-1, 0, 2.5])
    assert moved.shape == (4, 3, 3)
    np.testing.assert_allclose(moved[:, 1], latents)
    np.testing.assert_allclose(moved[:, 2] - latents, np.tile(2.5 * direction, (4, 1)))
    np.testing.assert_allclose(move(moved[:, 0], direction, [1.0])[:, 0], latents)


def test_adding_an_attribute_of_the_pixels_brings_it_into_the_image() -> None:
    """In the linear VAE brightness is linear in z, so its direction brightens by what it says."""
    images = drawn_images(500)
    z = Encoder(LINEAR).encode(images, range(500)).mu
    brightness = decode(LINEAR, z).mean((1, 2, 3))
    direction = attribute_direction(z, brightness)
    brighter = decode(LINEAR, move(z[:50], direction, [4.0])[:, 0]).mean((1, 2, 3))
    assert (brighter > brightness[:50]).all()
    assert (brighter - brightness[:50]).mean() == pytest.approx(4, abs=0.3)  # rounded and clipped to 8 bits


def test_an_attribute_with_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of them distinct: a direction needs one value each"):
        attribute_direction(LATENTS, np.ones(4))
    with pytest.raises(ValueError, match="3 values of the attribute for 4 latents"):
        attribute_direction(LATENTS, np.arange(3))
    with pytest.raises(ValueError, match=r"attributes \[1\] have one value"):
        movement(LATENTS, np.column_stack([np.arange(4), np.ones(4)]), LATENTS, LATENTS)


def test_latents_of_another_model_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"latents of shape \(2, 4\) do not fit the model, which takes \(-1, 5\)"
    ):
        decode(MODEL, np.zeros((2, 4)))
