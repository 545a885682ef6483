"""The optimizer of every training: Adam, its rate, a guard against exploding gradients, averaged weights.

Nothing in a step waits for the device: a step that has to be left out is one that the fused kernel, told by
a flag on the device, does not take. Everything that a resumed run needs is in `state`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from vae.config import TrainConfig

NORM_MEMORY = 0.01  # of the running average of gradient norms: a hundred steps
ADAM: dict[str, Any] = {
    "fused": True,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
}


def learning_rate_at(config: TrainConfig, step: int, steps: int) -> float:
    """Adam's rate at a step (from 0) of `steps` in the whole run.

    >>> cosine = TrainConfig(epochs=4, learning_rate=1.0, learning_rate_schedule="cosine")
    >>> [round(learning_rate_at(cosine, step, 4), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    >>> warm = TrainConfig(epochs=4, learning_rate=1.0, learning_rate_warmup_epochs=2)
    >>> [learning_rate_at(warm, step, 8) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    rate = config.learning_rate
    if warming := config.learning_rate_warmup_epochs * steps / config.epochs:
        rate *= min(1.0, (step + 1) / warming)
    if config.learning_rate_schedule == "cosine":
        rate *= (1 + math.cos(math.pi * step / steps)) / 2
    return rate


class Guard:
    """Says which gradients are not to be followed, and which are to be shortened, by their norms so far.

    Left out is a norm that is not finite, or above `skip` times the running average; shortened is one above
    `clip` times it, to that length. In the average a longer norm counts as the lower of these limits: should
    gradients have become larger for good, it grows until they are followed again. With 0 there is no limit.

    state holds (sum, weight), whose ratio is the average; skipped how many were left out.
    """

    def __init__(self, skip: float, clip: float, device: torch.device):
        self.skip, self.clip = skip, clip
        self.state = torch.zeros(2, device=device)
        self.skipped = torch.zeros((), device=device)

    @torch.no_grad()
    def judge(self, norm: Tensor) -> tuple[Tensor, Tensor | None]:
        """(1.0 where a step of this gradient norm must be left out, else 0.0; what to divide it by).

        Both are on the norm's device. Without a `clip` there is nothing to divide by.

        >>> guard = Guard(10.0, 2.0, torch.device("cpu"))
        >>> [tuple(round(x.item()) for x in guard.judge(torch.tensor(n))) for n in (1.0, 4.0, 90.0, math.nan)]
        [(0, 1), (0, 2), (1, 30), (1, 1)]
        """
        usual = self.state[0] / self.state[1]  # NaN, which nothing exceeds, before the first
        finite = norm < math.inf  # nor is it NaN
        left_out = (~finite | (norm > (self.skip or math.inf) * usual)).float()
        divisor = torch.fmax(norm / (self.clip * usual), torch.ones_like(norm)) if self.clip else None
        counted = torch.fmin(norm, min(self.clip or math.inf, self.skip or math.inf) * usual)
        seen = torch.stack([counted, torch.ones_like(norm)])
        self.state.lerp_(torch.where(finite, seen, self.state), NORM_MEMORY)
        self.skipped += left_out
        return left_out, divisor


class Optimizer:
    """Adam over a model's parameters, guarded, with an exponential moving average of the weights.

    Adam is torch's function and not its class, whose hooks around each step cost a small model 4 % of it.
    The average's decay starts low, min(ema_decay, (1 + t) / (10 + t)) after t steps, so that it forgets the
    untrained weights; with ema_decay=0 there is none, and the weights are their own average.
    """

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.parameters = list(model.parameters())
        device = self.parameters[0].device
        self.moments: dict[str, list[Tensor]] = {
            "step": [torch.zeros((), device=device) for _ in self.parameters],
            "exp_avg": [torch.zeros_like(p, requires_grad=False) for p in self.parameters],
            "exp_avg_sq": [torch.zeros_like(p, requires_grad=False) for p in self.parameters],
        }
        self.guard = Guard(config.gradient_skip, config.gradient_clip, device)
        self.decay = config.ema_decay
        self.averages = [p.detach().clone() for p in self.parameters] if self.decay else []

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, rate: float | Tensor, t: int) -> Tensor:
        """Follow the gradients at this learning rate, as step t (from 0); 1.0 if it was left out, else 0."""
        left_out = self.follow(rate)
        self.average(t)
        return left_out

    @torch.no_grad()
    def follow(self, rate: float | Tensor) -> Tensor:
        """The step alone; a rate on the device may change between replays of a recorded step."""
        gradients = {index: p.grad for index, p in enumerate(self.parameters) if p.grad is not None}
        if self.guard.skip or self.guard.clip:
            left_out, divisor = self.guard.judge(nn.utils.get_total_norm(gradients.values()))
        else:
            left_out, divisor = torch.zeros((), device=self.guard.state.device), None
        kept: list[Sequence[Tensor]] = [self.parameters, *self.moments.values()]
        weights, steps, means, squares = ([tensors[index] for index in gradients] for tensors in kept)
        adam(
            weights,
            list(gradients.values()),
            means,
            squares,
            [],
            steps,
            lr=rate,
            **ADAM,
            found_inf=left_out,  # not 0: the kernel leaves the step out
            grad_scale=divisor,  # what it divides gradients by
        )
        return left_out

    def average(self, t: int) -> None:
        """Take the weights after step t (from 0) into their average."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self._weights(), 1 - min(self.decay, (1 + t) / (10 + t)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has its averaged weights."""
        kept = [weight.clone() for weight in self._weights()] if self.averages else []
        self._load(self.averages)
        try:
            yield
        finally:
            self._load(kept)

    def settle(self) -> None:
        """The model takes its averaged weights for good: training is over."""
        self._load(self.averages)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, but for the weights themselves."""
        tensors = {"guard": self.guard.state, "skipped": self.guard.skipped}
        for name, values in self.moments.items():
            tensors |= {f"{index}.{name}": value for index, value in enumerate(values)}
        return tensors | {f"{index}.average": average for index, average in enumerate(self.averages)}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take up a state that `state` gave."""
        self.guard.state.copy_(saved["guard"])
        self.guard.skipped.copy_(saved["skipped"])
        for name, values in self.moments.items():
            for index, value in enumerate(values):
                value.copy_(saved[f"{index}.{name}"])
        for index, average in enumerate(self.averages):
            average.copy_(saved[f"{index}.average"])

    def _weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.parameters]

    def _load(self, weights: list[Tensor]) -> None:
        if weights:
            torch._foreach_copy_(self._weights(), weights)
