"""Adam with a guard and averages: what is left out changes nothing, what is averaged is the average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vae.config import TrainConfig
from vae.optimizer import Guard, Optimizer


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def follow(optimizer: Optimizer, network: nn.Module, scales: list[float]) -> list[float]:
    """Steps along gradients of the given scales; which were left out."""
    left_out = []
    for t, scale in enumerate(scales):
        optimizer.zero_grad()
        (scale * network(torch.ones(2, 3)).sum()).backward()
        left_out.append(optimizer.step(1e-3, t).item())
    return left_out


def weights(network: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
def test_a_step_left_out_is_as_if_it_had_never_been(bad: float) -> None:
    disturbed, calm = model(), model()
    first, second = (Optimizer(network, TrainConfig()) for network in (disturbed, calm))
    assert follow(first, disturbed, [1.0, 1.1, bad, 0.9]) == [0.0, 0.0, 1.0, 0.0]
    assert follow(second, calm, [1.0, 1.1, 0.9]) == [0.0] * 3
    torch.testing.assert_close(weights(disturbed), weights(calm), rtol=0, atol=0)
    assert first.guard.skipped == 1


def test_without_a_bad_gradient_it_is_adam_to_the_bit() -> None:
    ours, theirs = model(), model()
    follow(Optimizer(ours, TrainConfig()), ours, [1.0, 2.0, 0.5])
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-3, fused=True)
    for scale in (1.0, 2.0, 0.5):
        adam.zero_grad()
        (scale * theirs(torch.ones(2, 3)).sum()).backward()
        adam.step()
    assert torch.equal(weights(ours), weights(theirs))


def test_gradients_that_stay_large_are_followed_in_the_end() -> None:
    guard = Guard(10.0, 0.0, torch.device("cpu"))
    norms = [1.0] * 200 + [1000.0] * 100
    left_out = [guard.judge(torch.tensor(norm))[0].item() for norm in norms]
    assert sum(left_out[:200]) == 0
    assert 20 < sum(left_out) < 80
    assert left_out[-1] == 0


def test_a_first_gradient_that_is_no_number_leaves_no_trace() -> None:
    guard = Guard(10.0, 0.0, torch.device("cpu"))
    assert [guard.judge(torch.tensor(n))[0].item() for n in (math.nan, math.inf, 1.0, 11.0)] == [1, 1, 0, 1]


def test_a_long_gradient_is_followed_as_one_of_its_limit() -> None:
    clipped, short = model(), model()
    config = TrainConfig(gradient_clip=2.0)
    first, second = Optimizer(clipped, config), Optimizer(short, TrainConfig())
    assert follow(first, clipped, [1.0, 1.0, 6.0]) == [0.0] * 3
    follow(second, short, [1.0, 1.0])
    second.zero_grad()
    (2.0 * short(torch.ones(2, 3)).sum()).backward()
    usual = first.guard.state  # of what was counted: 1, 1 and the limit of about 2
    assert usual[0] / usual[1] < 1.4 * gradient_norm(model())
    second.step(1e-3, 2)
    torch.testing.assert_close(weights(clipped), weights(short), rtol=1e-3, atol=1e-6)


def gradient_norm(network: nn.Module) -> float:
    """Of the first step that `follow` takes at scale 1."""
    network(torch.ones(2, 3)).sum().backward()
    return nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()


def test_averaged_weights_are_lent_then_kept() -> None:
    network = model()
    optimizer = Optimizer(network, TrainConfig(ema_decay=0.5))
    follow(optimizer, network, [1.0, 1.0, 1.0])
    latest = weights(network)
    with optimizer.averaged():
        average = weights(network)
    assert not torch.equal(average, latest)
    assert torch.equal(weights(network), latest)
    optimizer.settle()
    assert torch.equal(weights(network), average)


def test_decay_begins_low_and_the_sum_is_exact() -> None:
    network = model()
    optimizer = Optimizer(network, TrainConfig(ema_decay=0.15))
    expected = weights(network)
    for t in range(3):
        optimizer.zero_grad()
        network(torch.ones(2, 3)).sum().backward()
        optimizer.step(1e-2, t)
        decay = min(0.15, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weights(network)
    with optimizer.averaged():
        torch.testing.assert_close(weights(network), expected)


def test_its_state_is_all_that_the_next_steps_need() -> None:
    config = TrainConfig(ema_decay=0.9)
    whole, stopped = model(), model()
    first = Optimizer(whole, config)
    follow(first, whole, [1.0, 50.0, 2.0])
    before = Optimizer(stopped, config)
    follow(before, stopped, [1.0, 50.0])
    resumed = Optimizer(stopped, config)
    resumed.restore({name: tensor.clone() for name, tensor in before.state().items()})
    follow(resumed, stopped, [2.0])
    assert torch.equal(weights(whole), weights(stopped))
    assert first.state().keys() == resumed.state().keys()
    for name in ("guard", "skipped", "0.step", "0.exp_avg"):
        assert torch.equal(first.state()[name], resumed.state()[name]), name


def test_a_state_can_be_gone_back_to_again() -> None:
    """After a second roll-back too: what is taken up is a copy of what was saved."""
    network = model()
    optimizer = Optimizer(network, TrainConfig(ema_decay=0.9))
    follow(optimizer, network, [1.0, 1.1])
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    optimizer.restore(saved)
    follow(optimizer, network, [0.7, 0.9])
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
