"""The hierarchical VAE: several levels of spatial latents, inferred and generated from the top down.

    p(x, z) = p(x|z) p(z_1) ∏ p(z_l | z_<l)        q(z|x) = q(z_1|x) ∏ q(z_l | z_<l, x)

with level 1 the top. The bottom-up pass reads x once; the top-down pass is shared by both and, at each
level, either draws from the posterior, which adds what the bottom-up pass saw at that resolution, or from the
prior (Sønderby et al. 2016; Kingma et al. 2016; Child 2021). Pre-activation residual blocks, learned
conditional priors, and no batch normalisation: no image depends on the others of its batch.

Legend: B images, K draws an image, N = K*B rows, L levels, C channels, H W pixels, D latent dimensions of all
levels, F features, S stages (finest first).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae import gaussian
from vae.config import LadderConfig
from vae.likelihood import Head, Likelihood
from vae.linear import Linear
from vae.model import Inference, Model, repeat_draws
from vae.pixels import unit

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)
Size = tuple[int, int]
LOGVAR_BOUND = 8.0
WIDER = 1.0  # the most by which a posterior's log-variance exceeds its prior's
Moments = tuple[Tensor, Tensor]  # mean and log-variance, (N, latents, H, W) each


class Pointwise(Linear):
    """A convolution of kernel 1 as the matrix product it is: on a CPU several times faster at small sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def convolution(inputs: int, outputs: int, kernel: int) -> Pointwise | nn.Conv2d:
    """A convolution that keeps the size."""
    if kernel == 1:
        return Pointwise(inputs, outputs)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def bounded(logvar: Tensor, above: float = LOGVAR_BOUND) -> Tensor:
    """A log-variance kept above -LOGVAR_BOUND and below `above`; smooth, with a gradient everywhere.

    Two Gaussians that both move are unstable without: where the prior's variance runs ahead towards 0, the KL
    of a posterior beside it grows without limit within a few steps. Near 0 it is itself.

    >>> bounded(torch.tensor([0.0, 8.0, -800.0]))
    tensor([ 0.0000,  4.0000, -7.9208])
    """
    return logvar / (1 + logvar.clamp(min=0) / above - logvar.clamp(max=0) / LOGVAR_BOUND)


def shrunk(layer: Layer) -> Layer:
    """The layer with its starting weights made small and its bias zero."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


class SeparableResidual(nn.Module):
    """x + f(x), with f a convolution over neighbours, one a channel, between two over channels at a position.

    So a block costs little more than its two matrix products (Chollet 2017; in VAEs, Vahdat and Kautz 2020).
    The last convolution starts small, so that a deep stack starts near the identity.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.first = Pointwise(channels, channels)
        self.neighbours: nn.Module = nn.Identity()
        if kernel > 1:
            self.neighbours = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.last = shrunk(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.silu(self.neighbours(self.first(F.silu(x)))))


class Down(nn.Module):
    """Patches of stride x stride pixels to features, padded at the lower right: sizes round up."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.patches = Pointwise(inputs * stride**2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
        return self.patches(F.pixel_unshuffle(padded, self.stride))


class Up(nn.Module):
    """Features to patches of stride x stride pixels, cropped to the size that `Down` began with.

    kernel: 1 makes a patch from one position's features, 3 from its neighbours' too, so that patches meet.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, size: Size, kernel: int):
        super().__init__()
        self.stride, self.size = stride, size
        self.patches = convolution(inputs, outputs * stride**2, kernel)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        return F.pixel_shuffle(self.patches(F.silu(x)), self.stride)[..., :height, :width]


class Level(nn.Module):
    """One stochastic level of a stage: z_l given the features h that hold what is known of z_<l.

    shape: (latents, H, W) of z_l. blocks: before it, on the path that the prior sees.
    """

    def __init__(self, config: LadderConfig, stage: int, size: Size, blocks: int):
        super().__init__()
        channels, latents, kernel = config.hidden[stage], config.latents[stage], kernel_for(size)
        self.stage = stage
        self.shape = (latents, *size)
        self.before = residuals(channels, kernel, blocks)
        self.prior = shrunk(Pointwise(channels, 2 * latents))
        self.seen = Pointwise(channels, channels)
        self.posterior_block = SeparableResidual(channels, kernel)
        self.posterior = shrunk(Pointwise(channels, 2 * latents))
        self.drawn = Pointwise(latents, channels)

    def p(self, h: Tensor) -> Moments:
        """Mean and log-variance of p(z_l|z_<l)."""
        mean, logvar = self.prior(h).chunk(2, 1)
        return mean, bounded(logvar)

    def q(self, h: Tensor, seen: Tensor, prior: Moments) -> Moments:
        """Mean and log-variance of q(z_l|z_<l, x), as a change to the prior's (Vahdat and Kautz 2020).

        An image tells something, so its posterior is narrower. One that a network in motion makes many times
        wider draws a z that nothing below has seen, and the gradients of that end trainings.
        """
        mean, logvar = self.posterior(self.posterior_block(h + self.seen(seen))).chunk(2, 1)
        return prior[0] + mean, prior[1] + bounded(logvar, above=WIDER)


class BottomUp(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> the features of each stage, finest first."""

    def __init__(self, config: LadderConfig, sizes: Sequence[Size]):
        super().__init__()
        channels = (config.channels, *config.hidden)
        self.downs = nn.ModuleList(map(Down, channels[:-1], config.hidden, config.strides))
        kernels = map(kernel_for, sizes)
        self.blocks = nn.ModuleList(map(residuals, config.hidden, kernels, itertools.repeat(config.blocks)))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for down, blocks in zip(self.downs, self.blocks, strict=True):
            x = blocks(down(x))
            features.append(x)
        return features


class TopDown(nn.Module):
    """From a learned constant at the coarsest stage, through every level, to a map of the image's size."""

    def __init__(self, config: LadderConfig, sizes: Sequence[Size], outputs: int):
        super().__init__()
        self.start = nn.Parameter(0.1 * torch.randn(1, config.hidden[-1], *sizes[-1]))
        steps: list[nn.Module] = []
        wider = (outputs, *config.hidden)
        larger = ((config.height, config.width), *sizes)
        for stage in reversed(range(len(sizes))):
            channels, stride = config.hidden[stage], config.strides[stage]
            for _ in range(config.levels[stage]):
                blocks = config.blocks if steps else 0  # the top level's prior is a learned constant as it is
                steps.append(Level(config, stage, sizes[stage], blocks))
            kernel = kernel_for(sizes[stage])
            steps.append(residuals(channels, kernel, config.blocks))
            reach = kernel if config.overlap else 1
            steps.append(Up(channels, wider[stage], stride, larger[stage], reach))
        last = max(index for index, step in enumerate(steps) if isinstance(step, Level))
        self.steps = nn.ModuleList(steps[: last + 1])
        self.image = nn.Sequential(*steps[last + 1 :])

    @property
    def levels(self) -> list[Level]:
        """From the top."""
        return [step for step in self.steps if isinstance(step, Level)]

    def forward(self, rows: int, choose: Callable[[Level, Tensor], Tensor]) -> Tensor:
        """Go down with z_l = choose(level, h), each (rows, *level.shape), to the features below the last.

        `image` makes of those the map (rows, outputs, H, W).
        """
        h = self.start.expand(rows, -1, -1, -1)
        for step in self.steps:
            if isinstance(step, Level):
                h = step.before(h)
                h = h + step.drawn(choose(step, h))
            else:
                h = step(h)
        return h


class LadderVAE(Model):
    """p(x, z) = p(x|z) ∏ p(z_l|z_<l), with the posterior ∏ q(z_l|z_<l, x) inferred from the top down.

    >>> from vae.model import build
    >>> vae = build(LadderConfig(height=28, width=28, channels=1))
    >>> vae.levels
    ((32, 1, 1), (4, 7, 7))
    >>> vae.infer(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), noise=None).kl.shape
    torch.Size([2, 2])
    """

    config: LadderConfig
    kl_in_closed_form = False  # given the levels above it is; those are draws

    def __init__(self, config: LadderConfig):
        super().__init__(config)
        sizes = stage_sizes(config)
        self.likelihood = Head(config)
        self.bottom_up = BottomUp(config, sizes)
        self.top_down = TopDown(config, sizes, self.likelihood.channels)
        self.levels = tuple(level.shape for level in self.top_down.levels)
        self.to(memory_format=torch.channels_last)

    def infer(self, x: Tensor, noise: Tensor | None) -> Inference:
        features = self.bottom_up(2 * unit(x, self.dtype) - 1)
        if noise is not None:
            features = [repeat_draws(f, noise) for f in features]
        draws = iter(self.split(noise)) if noise is not None else itertools.repeat(None)
        found: list[tuple[Tensor, ...]] = []

        def posterior(level: Level, h: Tensor) -> Tensor:
            p = level.p(h)
            q = level.q(h, features[level.stage], p)
            noise = next(draws)
            z = q[0] if noise is None else gaussian.sample(*q, noise)
            found.append((*q, z, gaussian.log_prob(z, *p), gaussian.log_prob(z, *q), gaussian.kl(*q, *p)))
            return z

        h = self.top_down(features[0].shape[0], posterior)  # not len(), which would freeze an exported batch
        mean, logvar, z, log_prior, log_posterior, kl = zip(*found, strict=True)
        return Inference(
            mean=join(mean),
            logvar=join(logvar),
            z=join(z),
            kl=sums(kl),
            kl_per_dim=join(kl),
            densities=lambda: (sums(log_prior), sums(log_posterior)),
            decoded=lambda: self.likelihood(self.top_down.image(h)),
        )

    def decode(self, z: Tensor) -> Likelihood:
        levels = iter(self.split(z.to(self.dtype)))
        h = self.top_down(z.shape[0], lambda level, h: next(levels))
        return self.likelihood(self.top_down.image(h))

    def prior_sample(self, noise: Tensor, temperature: float | Sequence[float] = 1.0) -> Tensor:
        draws = zip(self.split(noise), self.temperatures(temperature), strict=True)
        found: list[Tensor] = []

        def prior(level: Level, h: Tensor) -> Tensor:
            noise, scale = next(draws)
            found.append(gaussian.sample(*level.p(h), scale * noise))
            return found[-1]

        self.top_down(len(noise), prior)
        return join(found)

    def temperatures(self, temperature: float | Sequence[float]) -> Sequence[float]:
        """One a level, from the top; a single number serves them all."""
        if not isinstance(temperature, Sequence):
            return [temperature] * len(self.levels)
        if len(temperature) != len(self.levels):
            raise ValueError(f"{len(temperature)} temperatures {temperature} for {len(self.levels)} levels")
        return temperature

    def split(self, z: Tensor) -> list[Tensor]:
        """(N, D) -> one (N, *shape) a level, from the top."""
        parts = z.split([math.prod(shape) for shape in self.levels], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.levels, strict=True)]


def join(levels: Sequence[Tensor]) -> Tensor:
    """One (N, *shape) a level -> (N, D)."""
    return torch.cat([level.flatten(1) for level in levels], 1)


def sums(levels: Sequence[Tensor]) -> Tensor:
    """One (N, *shape) a level -> (N, L), each summed over its dimensions."""
    return torch.stack([level.flatten(1).sum(1) for level in levels], 1)


def residuals(channels: int, kernel: int, count: int) -> nn.Sequential:
    """A row of residual blocks."""
    return nn.Sequential(*(SeparableResidual(channels, kernel) for _ in range(count)))


def stage_sizes(config: LadderConfig) -> list[Size]:
    """Height and width of each stage's features, finest first, rounded up.

    >>> stage_sizes(LadderConfig(height=28, width=10, channels=1))
    [(7, 3), (1, 1)]
    """
    size, sizes = (config.height, config.width), []
    for stride in config.strides:
        size = math.ceil(size[0] / stride), math.ceil(size[1] / stride)
        sizes.append(size)
    return sizes


def kernel_for(size: Size) -> int:
    """3, or 1 where a neighbour would only be padding."""
    return 1 if size == (1, 1) else 3


def informative(kl_per_dim: Sequence[float], threshold: float = 0.01) -> list[int]:
    """The dimensions that carry information: those whose mean KL over images is above the threshold, in nats.

    A ladder has thousands of dimensions of which most stay at their prior; a latent table needs the others.

    >>> informative([0.7, 0.0, 0.02], threshold=0.01)
    [0, 2]
    """
    return [index for index, kl in enumerate(kl_per_dim) if kl > threshold]
