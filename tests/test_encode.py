"""Encoding: deterministic, checked, and the same numbers that evaluation reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vae.config import AutoencoderConfig, FlatConfig, LadderConfig, ModelConfig
from vae.encode import Encoder, Latents
from vae.evaluate import evaluate
from vae.model import build

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 3, 8, 11), dtype=np.uint8)
IDS = [f"{i}.png" for i in range(20)]
SMALL = {"height": 8, "width": 11, "channels": 3, "latent_dim": 3, "hidden": (4,)}
CONFIGS: list[ModelConfig] = [
    FlatConfig.from_dict(SMALL),
    FlatConfig.from_dict(SMALL | {"prior": "vamp", "pseudo_inputs": 3}),
    FlatConfig.from_dict(SMALL | {"likelihood": "bernoulli", "binarize": "sampled"}),
    AutoencoderConfig.from_dict(SMALL),
    LadderConfig(
        height=8, width=11, channels=3, strides=(4, 2), hidden=(4, 6), levels=(1, 1), latents=(1, 2)
    ),
]


def columns(latents: Latents) -> dict[str, np.ndarray]:
    return {name: column for name, column in vars(latents).items() if column is not None}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("scores", [False, True])
def test_encoding_twice_gives_equal_bytes(config: ModelConfig, scores: bool) -> None:
    encoder = Encoder(build(config))
    first = columns(encoder.encode(IMAGES, IDS, scores=scores))
    torch.rand(3)
    second = columns(encoder.encode(IMAGES, IDS, scores=scores))
    assert first.keys() == second.keys()
    for name, column in first.items():
        assert column.dtype == np.float32
        assert column.tobytes() == second[name].tobytes()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_rotation_of_the_batch_changes_nothing_but_the_order(config: ModelConfig) -> None:
    encoder, turned = Encoder(build(config).double()), np.roll(np.arange(20), 7)
    first = columns(encoder.encode(IMAGES, IDS, scores=True))
    second = columns(encoder.encode(IMAGES[turned], [IDS[i] for i in turned], scores=True))
    for name, column in first.items():
        np.testing.assert_allclose(second[name], column[turned], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [*CONFIGS[:3], CONFIGS[4]])
def test_scores_are_those_of_evaluation(config: ModelConfig) -> None:
    model = build(config)
    latents = Encoder(model).encode(IMAGES, IDS, scores=True)
    found = evaluate(model, IMAGES, IDS, k=3).per_image
    for name in ("elbo", "log_likelihood", "kl"):
        np.testing.assert_allclose(getattr(latents, name), found[name], rtol=1e-5)
    assert latents.log_likelihood is not None
    np.testing.assert_allclose(latents.elbo, latents.log_likelihood - latents.kl, rtol=1e-6)


def test_a_draw_from_the_posterior_is_that_of_the_scores() -> None:
    model = build(LadderConfig(height=8, width=11, channels=3, hidden=(8, 16)))
    encoder = Encoder(model)
    z = torch.from_numpy(encoder.sample(IMAGES, IDS, seed=3))
    scores = encoder.encode(IMAGES, IDS, scores=True, seed=3)
    log_likelihood = model.decode(z).log_prob(torch.from_numpy(IMAGES)).detach()
    np.testing.assert_allclose(log_likelihood, scores.log_likelihood, rtol=1e-5)
    with pytest.raises(ValueError, match="no posterior"):
        Encoder(build(CONFIGS[3])).sample(IMAGES, IDS)


def test_shapes_without_scores() -> None:
    latents = Encoder(build(CONFIGS[0])).encode(IMAGES, IDS)
    assert latents.mu.shape == (20, 3)
    assert latents.logvar is not None
    assert latents.logvar.shape == (20, 3)
    assert latents.kl is not None
    assert latents.kl.shape == (20,)
    assert latents.kl_levels is not None
    assert latents.kl_levels.shape == (20, 1)
    assert latents.log_likelihood is latents.elbo is None


def test_the_autoencoder_has_codes_alone() -> None:
    encoder = Encoder(build(CONFIGS[3]))
    assert columns(encoder.encode(IMAGES, IDS)).keys() == {"mu"}
    assert columns(encoder.encode(IMAGES, IDS, scores=True)).keys() == {"mu", "log_likelihood"}


def test_a_denoiser_encodes_its_input_as_it_comes() -> None:
    clean = build(CONFIGS[3])
    noisy = build(AutoencoderConfig.from_dict(SMALL | {"corruption": "noise", "corruption_strength": 0.5}))
    assert np.array_equal(Encoder(clean).encode(IMAGES, IDS).mu, Encoder(noisy).encode(IMAGES, IDS).mu)


def test_images_that_do_not_fit_name_both_shapes() -> None:
    both = r"\(20, 3, 8, 7\) do not fit the model, which takes \(-1, 3, 8, 11\)"
    with pytest.raises(ValueError, match=both):
        Encoder(build(CONFIGS[0])).encode(IMAGES[..., :7], IDS)


def test_grey_pixels_are_refused_by_a_bernoulli_that_does_not_say_how_it_binarizes() -> None:
    config = FlatConfig.from_dict(SMALL | {"likelihood": "bernoulli"})
    with pytest.raises(ValueError, match="binarize='threshold' or 'sampled'"):
        Encoder(build(config)).encode(IMAGES, IDS)
    Encoder(build(config)).encode(IMAGES // 128 * 255, IDS)
