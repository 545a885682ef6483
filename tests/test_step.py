"""A step: nothing in it looks at a value, and a rate on the device does what a rate on the host does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vae.config import AutoencoderConfig, FlatConfig, ModelConfig, TrainConfig, model_config
from vae.model import Model, build
from vae.optimizer import Optimizer
from vae.progress import Meter
from vae.random import StepDraws
from vae.ranks import Ranks
from vae.step import Stepper

GEOMETRY: dict[str, Any] = {"height": 9, "width": 8, "channels": 1}
FLAT = FlatConfig(**GEOMETRY, latent_dim=3, hidden=(4, 4))
PLAIN = TrainConfig(batch_size=6)
CASES: dict[str, tuple[ModelConfig, TrainConfig]] = {
    "flat": (FLAT, PLAIN),
    "mlp": (dataclasses.replace(FLAT, network="mlp", hidden=(5,)), PLAIN),
    "binarised": (dataclasses.replace(FLAT, likelihood="bernoulli", binarize="sampled"), PLAIN),
    "mixture": (dataclasses.replace(FLAT, likelihood="discretized_logistic_mixture"), PLAIN),
    "optimal": (dataclasses.replace(FLAT, likelihood="optimal_gaussian"), PLAIN),
    "vamp": (dataclasses.replace(FLAT, prior="vamp", pseudo_inputs=3), PLAIN),
    "iwae": (FLAT, dataclasses.replace(PLAIN, objective="iwae", samples=3)),
    "weighted": (FLAT, dataclasses.replace(PLAIN, free_bits=0.5, ema_decay=0.9, micro_batch=4)),
    "autoencoder": (AutoencoderConfig(**GEOMETRY, latent_dim=3, hidden=(4, 4)), PLAIN),
    "ladder": (model_config({"model": "ladder", **GEOMETRY}), PLAIN),
}


def stepper(model: ModelConfig, config: TrainConfig, network: Model | None = None) -> Stepper:
    network = (network or build(model)).train()
    return Stepper(network, config, Optimizer(network, config), Ranks())


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case: str) -> None:
    """On tensors without values, whoever asks for one fails: a host that waits for its device would."""
    network = build(CASES[case][0])
    with FakeTensorMode() as without_values:
        for module in network.modules():
            for kind in (module._parameters, module._buffers):
                kind.update(
                    {name: without_values.from_tensor(t) for name, t in kind.items() if t is not None}
                )
        step = stepper(*CASES[case], network)
        meter = Meter("cpu")
        images = torch.zeros(6, 1, 9, 8, dtype=torch.uint8)
        for number in range(2):
            meter.add(*step(images, number, 10, 1e-3))
        with pytest.raises(DataDependentOutputException):
            meter.interval.sum().item()


@pytest.mark.parametrize("case", ["flat", "iwae", "weighted"])
def test_a_rate_on_the_device_is_that_rate(case: str) -> None:
    """What a recorded step does: everything that changes from step to step comes in a tensor."""
    first, second = stepper(*CASES[case]), stepper(*CASES[case])
    source = torch.Generator().manual_seed(0)
    samples = CASES[case][1].samples
    for rate in (1e-3, 2e-3):
        images = torch.randint(0, 256, (6, 1, 9, 8), dtype=torch.uint8, generator=source)
        noise = torch.randn(6, samples, 3, generator=source)
        first.act(images, images, noise, rate)
        second.act(images, images, noise, torch.tensor(rate, dtype=torch.float64))
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_noise_that_is_drawn_ahead_is_each_steps_own() -> None:
    """Whatever batch came before, and wherever a run begins."""
    step = stepper(*CASES["iwae"])
    for number, rows in ((7, 6), (8, 6), (9, 4), (10, 6), (10_000, 6), (8, 6)):
        own = StepDraws(0, number, rows).normal("posterior", 3, 3)
        assert torch.equal(step._noise(number, rows), own)


def test_noise_of_a_large_batch_is_drawn_for_one_step() -> None:
    step = stepper(*CASES["flat"])
    assert len(step._noise(0, 20_000)) == 20_000
    assert not step.drawn


def test_a_record_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="acceleration='graph' is for one GPU, not for 1 x cpu"):
        stepper(FLAT, dataclasses.replace(PLAIN, acceleration="graph"))


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step() -> None:
    compiled, plain = stepper(FLAT, dataclasses.replace(PLAIN, acceleration="compile")), stepper(FLAT, PLAIN)
    images = torch.randint(
        0, 256, (6, 1, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for number in range(3):
        ours, theirs = compiled(images, number, 10, 1e-3), plain(images, number, 10, 1e-3)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
