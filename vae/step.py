"""One training step: draws for the whole effective batch, passes over parts of it, one move of the weights.

Legend: B batch, K draws an image, C channels, H W pixels, D latent dimensions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vae.config import TrainConfig
from vae.model import Model
from vae.objective import beta_at, training_loss
from vae.optimizer import Optimizer
from vae.random import StepDraws
from vae.ranks import Ranks

logger = logging.getLogger("vae")

DRAWN = 2**15
"""Normal numbers that are drawn at a time, of the steps to come."""
NO_MEMORY = ("can't allocate memory", "not enough memory", "could not create a primitive")
"""What torch, and its convolutions on a CPU, say of an allocation that failed."""


class Loss(nn.Module):
    """The model with its loss as the forward pass, which is what DistributedDataParallel wraps.

    mixed: matrix products and convolutions in bfloat16; densities, KL and sums stay in float32.
    """

    def __init__(self, model: Model, config: TrainConfig, mixed: bool):
        super().__init__()
        self.model, self.config, self.mixed = model, config, mixed

    def forward(self, seen: Tensor, target: Tensor, noise: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """(loss, figures (4,)): images, and means of log_likelihood, kl and loss over them and their draws.

        seen, target (B, C, H, W); noise (B, K, D).
        """
        with torch.autocast(seen.device.type, torch.bfloat16, enabled=self.mixed):
            inference = self.model.infer(seen, noise.transpose(0, 1).flatten(0, 1))
            loss, now = training_loss(self.config, beta, inference, target)
        with torch.no_grad():
            log_likelihood, kl = now.log_likelihood.mean(), now.kl.sum(1).mean()
            return loss, torch.stack([torch.ones_like(kl), log_likelihood, kl, loss])


class Stepper:
    """Takes steps. Nothing in one waits for the device.

    Every rank takes its share of the rows of a batch, in parts of `micro` images, with the draws that these
    rows have in the whole batch. So parts and ranks give the gradient of the whole batch, up to rounding.
    Only free bits, balancing and the optimal Gaussian's variance, of a batch's mean, see a part's own.
    """

    def __init__(self, model: Model, config: TrainConfig, optimizer: Optimizer, ranks: Ranks):
        self.model, self.config, self.optimizer, self.ranks = model, config, optimizer, ranks
        self.device = model.device
        self.buffers = list(model.buffers())
        self.drawn: dict[tuple[int, int], Tensor] = {}
        self.micro = config.micro_batch or config.batch_size
        loss: nn.Module = Loss(model, config, uses_bfloat16(config, self.device))
        if config.acceleration == "compile":
            loss = torch.compile(loss)  # type: ignore[assignment]
        self.loss = ranks.joined(loss, self.device)
        self._refuse_graph()
        self.forget()

    def forget(self) -> None:
        """Record anew: the tensors that a recorded step works on have been replaced."""
        self.recorded = Recorded(self.act) if self.config.acceleration == "graph" else None

    def _refuse_graph(self) -> None:
        if self.config.acceleration == "graph" and (self.device.type != "cuda" or self.ranks.world > 1):
            raise ValueError(
                f"acceleration='graph' is for one GPU, not for {self.ranks.world} x {self.device.type}: "
                "set acceleration='none'"
            )

    def __call__(self, images: Tensor, step: int, steps: int, rate: float) -> tuple[Tensor, Tensor]:
        """(figures (4,), the sums over images of `Loss.forward`'s; 1.0 where the step was left out)."""
        draws = StepDraws(self.config.seed, step, len(images), self.device)
        seen, target = self.model.observe(images, draws)
        noise = self._noise(step, len(images))
        beta = beta_at(self.config, step, steps)
        if self.recorded is not None and len(images) == self.config.batch_size:
            rates = torch.full((), rate, device=self.device)
            figures, left_out = self.recorded(seen, target, noise, rates)
        else:
            figures, left_out = self.act(seen, target, noise, rate, beta)
        self.optimizer.average(step)
        return figures, left_out

    def _noise(self, step: int, rows: int) -> Tensor:
        """The posterior's draws of a step, (rows, K, D), made for the steps that follow it as well.

        After a step the caches are cold, and a small draw takes several times as long as the next one.
        """
        if (step, rows) not in self.drawn:
            shape = self.config.samples, self.model.latent_dim
            steps = range(step, step + max(1, DRAWN // (rows * math.prod(shape))))
            draws = {ahead: StepDraws(self.config.seed, ahead, rows, self.device) for ahead in steps}
            self.drawn = {(ahead, rows): draw.normal("posterior", *shape) for ahead, draw in draws.items()}
        return self.drawn.pop((step, rows))

    def act(
        self, seen: Tensor, target: Tensor, noise: Tensor, rate: float | Tensor, beta: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """What a step does once everything is drawn: the same kernels in the same order, whatever the values.

        Where memory does not suffice, it is tried again in parts of half the size, from then on.
        """
        beta = self.config.beta if beta is None else beta
        buffers = [buffer.clone() for buffer in self.buffers]
        while True:
            try:
                figures = self._accumulate(seen, target, noise, beta)
                break
            except (MemoryError, RuntimeError) as error:
                self._halve(error)
            for buffer, before in zip(self.buffers, buffers, strict=True):
                buffer.copy_(before)
        return figures, self.optimizer.follow(rate)

    def _accumulate(self, seen: Tensor, target: Tensor, noise: Tensor, beta: float) -> Tensor:
        """The gradient of the mean loss over the whole batch, and the figures of this rank's rows."""
        self.optimizer.zero_grad()
        figures = torch.zeros(4, dtype=torch.float64, device=self.device)
        parts = self._parts(len(seen))
        for number, part in enumerate(parts, start=1):
            size = part.stop - part.start
            rows = part if size else slice(0, 1)  # a rank without rows joins in with one that doesn't count
            following = self.ranks.alone(self.loss) if number < len(parts) else nullcontext()
            with following:
                loss, now = self.loss(seen[rows], target[rows], noise[rows], beta)
                (loss * (size * self.ranks.world / len(seen))).backward()
            figures += size * now
        return figures

    def _parts(self, rows: int) -> list[slice]:
        mine = self.ranks.share(rows)
        starts = range(mine.start, mine.stop, self.micro)
        return [slice(start, min(start + self.micro, mine.stop)) for start in starts] or [mine]

    def _halve(self, error: Exception) -> None:
        """Smaller parts after an allocation that failed; any other error, or one alone, is raised."""
        if not out_of_memory(error) or self.micro == 1 or self.ranks.world > 1:
            raise error
        self.micro = (min(self.micro, self.config.batch_size) + 1) // 2
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "train: out of memory: batches of %d in parts of %d", self.config.batch_size, self.micro
        )


def uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """'auto' is bfloat16 on a GPU that has it, and float32 on a CPU, most of which lack it in hardware."""
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bfloat16"


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a GPU an error of its own, on the CPU one of torch or Python."""
    failed = any(words in str(error) for words in NO_MEMORY)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or failed


class Recorded:
    """A step on a GPU that is recorded once and then replayed: one launch in place of hundreds.

    The first steps are taken as they come, on a stream of their own, which also makes what the step needs
    (optimizer state, workspaces). Then inputs are copied to where the record reads them.
    """

    def __init__(self, act: Callable[..., tuple[Tensor, ...]], warm: int = 3):
        self.act, self.warm = act, warm
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.warm:
            return self._take(*inputs)
        if self.graph is None:
            self._record(inputs)
        assert self.graph is not None
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)

    def _take(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.warm -= 1
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            outputs = self.act(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(given.clone() for given in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.act(*self.inputs)
