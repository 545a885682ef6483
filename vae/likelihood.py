"""Likelihoods p(x|z) of pixels: what the decoder's last feature map says about an image.

Every likelihood takes images as they are stored: grey values 0..255 of any dtype, 0 and 255 alone for
`Bernoulli`. It scales them itself, computes in float32 or wider, and returns nats summed over channels and
pixels, one number an image. Channels are independent given z. No parameter is clamped: where a scale needs
a floor, softplus gives one that keeps its gradient.

Shapes: B batch, C channels, H W pixels, P parameters a channel, M mixture components.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.config import ModelConfig

WHITE = 255.0
LOG_SIGMA_FLOOR = -6.0  # of a Gaussian on [0, 1]: two thirds of a grey level (Rybkin et al. 2021)
LOG_SCALE_FLOOR = -7.0  # of a logistic on [-1, 1]: an eighth of a grey level (Salimans et al. 2017)
LOG_SCALE_CEILING = 10.0  # flat over all grey values, and its width still a number


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or in the widest of their own dtypes if that is wider.

    >>> [t.dtype for t in wide(torch.ones(1, dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16))]
    [torch.float32, torch.float32]
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def sum_pixels(values: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,)."""
    return values.flatten(1).sum(1)


def open_unit(uniform: Tensor) -> Tensor:
    """Uniform numbers without the 0, and the 1 that rounding makes, where an inverse CDF is infinite."""
    tiny = torch.finfo(uniform.dtype).eps
    return uniform.clamp(tiny, 1 - tiny)


def softfloor(x: Tensor, floor: float) -> Tensor:
    """A smooth max(x, floor) whose gradient is never zero.

    >>> softfloor(torch.tensor([-100.0, 3.0]), -7.0)
    tensor([-7.0000,  3.0000])
    """
    return floor + F.softplus(x - floor)


class Likelihood(ABC):
    """p(x|z), independent over pixels, for a batch of B decoded latents.

    `output` is the decoder's last feature map, (B, P * C, H, W), parameter-major: all channels of the first
    parameter, then all of the second.
    """

    parameters: ClassVar[int]
    """P: feature maps the decoder gives for each channel of the image (and, in a mixture, each component)."""
    binary: ClassVar[bool] = False
    """Whether x must be 0 or 255."""
    eight_bit: ClassVar[bool] = False
    """Whether it is a distribution over the 256 grey values, so that bits/dim may be reported."""

    def __init__(self, output: Tensor, channels: int) -> None:
        (output,) = wide(output)
        self.output = output.unflatten(1, (-1, channels))  # (B, P, C, H, W)

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x|z) in nats, (B, C, H, W) -> (B,)."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """E[x|z], (B, C, H, W), scaled to 0..1."""

    @abstractmethod
    def sample(self, uniform: Tensor) -> Tensor:
        """Images in the range of `log_prob`'s x, by the inverse CDF of `uniform` (B, C, H, W) in [0, 1)."""


class Bernoulli(Likelihood):
    """Black or white pixels. `output` holds the logits.

    >>> Bernoulli(torch.zeros(1, 1, 2, 2), channels=1).log_prob(torch.full((1, 1, 2, 2), 255)) / math.log(2)
    tensor([-4.])
    """

    parameters = 1
    binary = True

    def log_prob(self, x: Tensor) -> Tensor:
        logits, x = wide(self.output.squeeze(1), x)
        return sum_pixels(x / WHITE * logits - F.softplus(logits))

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.output[:, 0])

    def sample(self, uniform: Tensor) -> Tensor:
        return WHITE * (uniform < self.mean).to(uniform.dtype)


class ContinuousBernoulli(Likelihood):
    """The density p(x) = η e^{ηx} / (e^η - 1) on [0, 1], with η the logit (Loaiza-Ganem and Cunningham 2019).

    In η, with h = η/2, the log-normaliser is h + log(sinh h / h): smooth through η = 0 (their λ = 1/2).
    """

    parameters = 1

    def log_prob(self, x: Tensor) -> Tensor:
        logits, x = wide(self.output[:, 0], x)
        half = logits / 2
        return sum_pixels((2 * x / WHITE - 1) * half - log_sinhc(half))

    @property
    def mean(self) -> Tensor:
        return 0.5 + langevin(self.output[:, 0] / 2) / 2

    def sample(self, uniform: Tensor) -> Tensor:
        logits, u = wide(self.output[:, 0], open_unit(uniform))
        down = -logits.abs()  # e^η never overflows; a rising density is the mirror of a falling one
        u = torch.where(logits > 0, 1 - u, u)
        flat = down > -1e-4
        x = torch.log1p(u * torch.expm1(down)) / down.masked_fill(flat, -1.0)
        x = torch.where(flat, u, x)
        return WHITE * torch.where(logits > 0, 1 - x, x)


def log_sinhc(h: Tensor) -> Tensor:
    """log(sinh(h)/h), elementwise, exact at 0 and where sinh overflows.

    >>> log_sinhc(torch.tensor([0.0, 1.0, -100.0]))
    tensor([ 0.0000,  0.1614, 94.7017])
    """
    near = h.abs() < 0.1
    far = h.abs().masked_fill(near, 1.0)  # no NaN gradient from the branch not taken
    square = h.masked_fill(~near, 0.0) ** 2
    series = square * (1 / 6 - square * (1 / 180 - square * (1 / 2835 - square / 37800)))
    return torch.where(near, series, far + torch.log1p(-torch.exp(-2 * far)) - torch.log(2 * far))


def langevin(h: Tensor) -> Tensor:
    """coth(h) - 1/h, the derivative of `log_sinhc`, in (-1, 1).

    >>> langevin(torch.tensor([0.0, 1.0, -1000.0]))
    tensor([ 0.0000,  0.3130, -0.9990])
    """
    near = h.abs() < 0.1
    far = h.masked_fill(near, 1.0)
    small = h.masked_fill(~near, 0.0)
    square = small**2
    series = small * (1 / 3 - square * (1 / 45 - square * (2 / 945 - square / 4725)))
    return torch.where(near, series, 1 / torch.tanh(far) - 1 / far)


class Gaussian(Likelihood):
    """A Gaussian on x/255 with one learned standard deviation for all pixels (Rybkin et al. 2021).

    `output` holds the logits of the mean; `log_sigma` is a scalar. A density per unit of x/255, not a
    probability of grey values.
    """

    parameters = 1

    def __init__(self, output: Tensor, channels: int, log_sigma: Tensor) -> None:
        super().__init__(output, channels)
        self.log_sigma = softfloor(log_sigma, LOG_SIGMA_FLOOR)

    def log_prob(self, x: Tensor) -> Tensor:
        mean, x, log_sigma = wide(self.mean, x, self.log_sigma)
        deviation = (x / WHITE - mean) * torch.exp(-log_sigma)
        return sum_pixels(-0.5 * deviation**2 - log_sigma - 0.5 * math.log(2 * math.pi))

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.output[:, 0])

    def sample(self, uniform: Tensor) -> Tensor:
        return WHITE * (self.mean + self.log_sigma.exp() * torch.special.ndtri(open_unit(uniform)))


class OptimalGaussian(Gaussian):
    """A Gaussian whose variance is in closed form the mean squared error (Rybkin et al. 2021).

    While training it is the error of the batch at hand, and `variance` follows it as a running mean; a score
    takes `variance` as it was left, so that no image's density depends on the image or on its batch.
    """

    def __init__(self, output: Tensor, channels: int, variance: Tensor, training: bool) -> None:
        super().__init__(output, channels, 0.5 * torch.log(variance))
        self.variance = variance
        self.training = training

    def log_prob(self, x: Tensor) -> Tensor:
        if self.training:
            mean, x = wide(self.mean, x)
            error = optimal_variance(x / WHITE, mean)
            self.variance.lerp_(error.detach().to(self.variance.dtype), 0.01)
            self.log_sigma = softfloor(0.5 * torch.log(error), LOG_SIGMA_FLOOR)
        return super().log_prob(x)


def optimal_variance(x: Tensor, mean: Tensor) -> Tensor:
    """The one variance that maximises the Gaussian likelihood of all x: their mean squared error, a scalar.

    >>> optimal_variance(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
    tensor(5.)
    """
    return ((x - mean) ** 2).mean()


def log_discretized_logistic(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log-probability of grey value x: a logistic's mass on [x - 1/2, x + 1/2], all beyond at 0 and 255.

    With a and b the bin's ends in units of the scale, σ(b) - σ(a) = σ(b) σ(-a) (1 - e^{a-b}), which has no
    difference to lose digits in. Salimans et al. 2017 (PixelCNN++), section 2.1.

    Args:
        x: grey values 0..255, floating.
        mean: the logistic's location, in grey values.
        log_scale: the logarithm of its scale in grey values.

    >>> log_discretized_logistic(torch.tensor([0.0, 255.0]), torch.tensor(127.5), torch.tensor(30.0))
    tensor([-0.6931, -0.6931])
    """
    width = torch.exp(-log_scale)
    below, above = (x - 0.5 - mean) * width, (x + 0.5 - mean) * width
    log_cdf_above, log_tail_below = F.logsigmoid(above), F.logsigmoid(-below)
    inside = log_cdf_above + log_tail_below + torch.log(-torch.expm1(-width))
    return torch.where(x < 0.5, log_cdf_above, torch.where(x > WHITE - 0.5, log_tail_below, inside))


def clipped_logistic_mean(mean: Tensor, log_scale: Tensor) -> Tensor:
    """E[min(max(X, 0), 255)] of a logistic X, in closed form: the integral of its tail from 0 to 255.

    >>> clipped_logistic_mean(torch.tensor([-500.0, 100.0, 500.0]), torch.tensor(0.0))
    tensor([  0., 100., 255.])
    """
    scale = torch.exp(log_scale)
    low, high, span = mean / scale, (mean - WHITE) / scale, WHITE / scale
    difference = F.softplus(low) - F.softplus(high)
    cancelling = torch.log1p(torch.sigmoid(high) * torch.expm1(span.clamp(max=1.0)))  # the same, if span <= 1
    return (scale * torch.where(span < 1, cancelling, difference)).clamp(
        0.0, WHITE
    )  # but for rounding, inside


class DiscretizedLogistic(Likelihood):
    """One logistic over the 256 grey values: a location and a log-scale a channel, for pixels on [-1, 1].

    >>> decoded = DiscretizedLogistic(torch.zeros(256, 2, 1, 1), channels=1)
    >>> decoded.log_prob(torch.arange(256).reshape(256, 1, 1, 1)).exp().sum()
    tensor(1.)
    """

    parameters = 2
    eight_bit = True

    def __init__(self, output: Tensor, channels: int) -> None:
        super().__init__(output, channels)
        self.location, self.log_scale = in_grey_values(self.output[:, 0], self.output[:, 1])

    def log_prob(self, x: Tensor) -> Tensor:
        x, location, log_scale = wide(x, self.location, self.log_scale)
        return sum_pixels(log_discretized_logistic(x, location, log_scale))

    @property
    def mean(self) -> Tensor:
        return clipped_logistic_mean(self.location, self.log_scale) / WHITE

    def sample(self, uniform: Tensor) -> Tensor:
        return grey_quantile(uniform, self.location, self.log_scale)


class DiscretizedLogisticMixture(Likelihood):
    """A mixture of M discretised logistics over the 256 grey values, channels independent given z.

    `output` holds M logits, M locations and M log-scales a channel, the latter two for pixels on [-1, 1] as
    in PixelCNN++ (Salimans et al. 2017), whose conditioning of green and blue on red is left out: here z
    must carry the colour.
    """

    parameters = 3
    eight_bit = True

    def __init__(self, output: Tensor, channels: int) -> None:
        super().__init__(output, channels)
        logits, location, log_scale = self.output.unflatten(1, (3, -1)).unbind(1)  # each (B, M, C, H, W)
        self.log_weights = F.log_softmax(logits, 1)
        self.location, self.log_scale = in_grey_values(location, log_scale)

    def log_prob(self, x: Tensor) -> Tensor:
        x, location, log_scale = wide(x, self.location, self.log_scale)
        log_probs = log_discretized_logistic(x[:, None], location, log_scale)
        return sum_pixels(torch.logsumexp(self.log_weights + log_probs, 1))

    @property
    def mean(self) -> Tensor:
        means = clipped_logistic_mean(self.location, self.log_scale)
        return ((self.log_weights.exp() * means).sum(1) / WHITE).clamp(max=1.0)  # weights round to 1

    def sample(self, uniform: Tensor) -> Tensor:
        """One uniform number serves twice: where it falls picks the component, how far in picks the value."""
        weights = self.log_weights.exp()
        ends = weights.cumsum(1)
        pick = (uniform[:, None] >= ends[:, :-1]).sum(1, keepdim=True)  # (B, 1, C, H, W)
        start, weight, location, log_scale = (
            torch.gather(t, 1, pick)[:, 0] for t in (ends - weights, weights, self.location, self.log_scale)
        )
        within = (uniform - start) / weight.clamp_min(torch.finfo(weight.dtype).tiny)
        return grey_quantile(within, location, log_scale)


def in_grey_values(location: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A logistic's location and log-scale, from [-1, 1] to grey values, the scale kept in its bounds."""
    bounded = -softfloor(-softfloor(log_scale, LOG_SCALE_FLOOR), -LOG_SCALE_CEILING)
    return WHITE / 2 * (1 + location), bounded + math.log(WHITE / 2)


def grey_quantile(uniform: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The grey value where a discretised logistic's CDF reaches `uniform`, all in the shape (B, C, H, W)."""
    logistic = mean + log_scale.exp() * torch.logit(open_unit(uniform))
    return logistic.round().clamp(0, WHITE)


class Head(nn.Module):
    """From the decoder's last feature map to the likelihood; holds what the likelihood learns besides.

    `channels` counts the feature maps it needs.

    >>> from vae.config import FlatConfig
    >>> head = Head(FlatConfig(height=8, width=8, channels=3))
    >>> head.channels, head(torch.zeros(2, 6, 8, 8)).mean.shape
    (6, torch.Size([2, 3, 8, 8]))
    """

    variance: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.family = LIKELIHOODS[config.likelihood]
        self.image_channels = config.channels
        components = config.components if self.family is DiscretizedLogisticMixture else 1
        self.channels = self.family.parameters * components * config.channels
        if self.family is Gaussian:
            self.log_sigma = nn.Parameter(torch.zeros(()))
        elif self.family is OptimalGaussian:
            self.register_buffer("variance", torch.ones(()))

    def forward(self, output: Tensor) -> Likelihood:
        """(B, self.channels, H, W) -> p(x|z) of B images."""
        if self.family is Gaussian:
            return Gaussian(output, self.image_channels, self.log_sigma)
        if self.family is OptimalGaussian:
            return OptimalGaussian(output, self.image_channels, self.variance, self.training)
        return self.family(output, self.image_channels)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "optimal_gaussian": OptimalGaussian,
    "discretized_logistic": DiscretizedLogistic,
    "discretized_logistic_mixture": DiscretizedLogisticMixture,
}
