"""Configurations: complete, frozen, to JSON and back, refused with the nearest valid name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vae.config import MODELS, AutoencoderConfig, FlatConfig, TrainConfig, model_class, model_config

FLAT = {"height": 28, "width": 28, "channels": 1}


@pytest.mark.parametrize(
    "config",
    [
        FlatConfig(**FLAT),
        FlatConfig(height=9, width=250, channels=3, network="mlp", hidden=(), prior="vamp"),
        AutoencoderConfig(**FLAT, corruption="downscale", corruption_strength=2),
    ],
)
def test_models_go_to_json_and_back(config: FlatConfig | AutoencoderConfig) -> None:
    assert model_config(json.loads(json.dumps(config.to_dict()))) == config


def test_training_goes_to_json_and_back() -> None:
    config = TrainConfig(epochs=3, beta_schedule="warmup", warmup_epochs=1.5)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_dims": 3}, r"unknown field 'latent_dims' of FlatConfig: did you mean 'latent_dim'\?"),
        ({"height": 7}, r"height=7 must be in \[8, 256\]"),
        ({"width": 257}, r"width=257 must be in \[8, 256\]"),
        ({"channels": 4}, r"channels=4 must be 1 \(grey\) or 3 \(RGB\)"),
        ({"likelihood": "bernouli"}, r"likelihood='bernouli' is not one of .*did you mean 'bernoulli'\?"),
        ({"binarize": "yes"}, r"binarize='yes' is not one of"),
        ({"latent_dim": 0}, r"latent_dim=0 must be in"),
        ({"latent_dim": "32"}, r"latent_dim='32' must be of type int"),
        ({"height": 28.5}, r"height=28.5 must be"),
        ({"hidden": (0, 3)}, r"hidden=\(0, 3\) must be positive whole numbers"),
        ({"hidden": ()}, r"hidden=\(\) is a linear network, which needs network='mlp', not 'conv'"),
        ({"prior": "vam"}, r"did you mean 'vamp'\?"),
        ({"model": "autoencoder"}, r"model='autoencoder' is not 'flat'"),
    ],
)
def test_bad_models_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatConfig.from_dict(FLAT | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, r"epochs=0 must be in \[1, inf\]"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan must be in"),
        ({"learning_rates": 1e-3}, r"did you mean 'learning_rate'\?"),
        ({"beta": -1.0}, r"beta=-1.0 must be in"),
        ({"objective": "iwae", "beta": 2.0}, r"objective='iwae' .* takes no beta"),
        ({"samples": 5}, r"samples=5 needs objective='iwae'"),
        ({"beta_schedule": "warmup"}, r"a warm-up needs both"),
        ({"kl_balancing": True}, r"it needs beta_schedule='warmup' or 'cyclic'"),
        ({"warmup_epochs": 3.0}, r"a warm-up needs both"),
    ],
)
def test_bad_training_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(fields)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="FlatConfig needs a value for 'width'"):
        FlatConfig.from_dict({"height": 28, "channels": 1})


def test_corruption_strength_must_fit_its_kind() -> None:
    with pytest.raises(ValueError, match="corruption_strength"):
        AutoencoderConfig(**FLAT, corruption="noise")
    with pytest.raises(ValueError, match="must be whole"):
        AutoencoderConfig(**FLAT, corruption="downscale", corruption_strength=2.5)


@pytest.mark.parametrize(
    ("size", "stages"), [((8, 8), 1), ((9, 9), 2), ((28, 28), 3), ((64, 48), 4), ((256, 8), 6)]
)
def test_default_stages_halve_the_longer_side_to_four_or_fewer(size: tuple[int, int], stages: int) -> None:
    hidden = FlatConfig(height=size[0], width=size[1], channels=3).hidden
    assert hidden is not None
    assert len(hidden) == stages
    assert 2 < max(size) / 2**stages <= 4


@pytest.mark.parametrize("tag", MODELS)
def test_the_allowlist_leads_to_models(tag: str) -> None:
    config = model_config({"model": tag, **FLAT})
    assert config.model == tag
    assert model_class(config).__module__.startswith("vae.")
