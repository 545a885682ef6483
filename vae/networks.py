"""Encoders and decoders: x -> features, z -> the parameters of p(x|z).

The decoder mirrors the encoder stage by stage. Each stage halves the image, rounding up, so any size
works; the decoder crops to the size its mirror saw. No batch normalisation: a posterior or a density that
depended on the other images of its batch would not be the model's.

Legend: B batch, C channels, H W pixels, D latent dimensions, F features, P likelihood parameters.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from vae.config import NetworkConfig
from vae.linear import Linear, linear, on_cpu


def halvings(height: int, width: int, stages: int) -> list[tuple[int, int]]:
    """The size before each stage and after the last, halved upwards.

    >>> halvings(28, 7, 3)
    [(28, 7), (14, 4), (7, 2), (4, 1)]
    """
    return [(math.ceil(height / 2**s), math.ceil(width / 2**s)) for s in range(stages + 1)]


class Residual(nn.Module):
    """x + f(x) with f two convolutions, the last starting at zero so that the block starts as identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(nnf.silu(self.first(nnf.silu(x))))


class Upsample(nn.Module):
    """Repeat each pixel up to an exact size: the unpooling that mirrors pooling."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        return nnf.interpolate(x, scale_factor=2.0, mode="nearest")[..., :height, :width]


class Flatten(nn.Flatten):
    """(B, C, H, W) -> (B, C H W), whose gradient comes back with channels last, as its input lies.

    Between layouts the kernels of activations are several times slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and on_cpu(x):
            x.register_hook(_channels_last)
        return x.flatten(1)


class Unflatten(nn.Unflatten):
    """(B, C H W) -> (B, C, H, W) with channels last, as convolutions want it."""

    def forward(self, x: Tensor) -> Tensor:
        return _channels_last(super().forward(x))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class TransposedConv(nn.ConvTranspose2d):
    """A transposed convolution of stride 2, cropped to an exact size."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]):
        super().__init__(inputs, outputs, 4, stride=2, padding=1)
        self.size = size

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        height, width = self.size
        # To a single channel the convolution is no product worth the name, and its own kernel is slow.
        work = self._folded if self.out_channels == 1 and on_cpu(x) else self._transposed
        found = work(x)[..., :height, :width]
        return found if self.bias is None else found + self.bias.to(found.dtype)[:, None, None]

    def _transposed(self, x: Tensor) -> Tensor:
        """Without the bias, for which oneDNN, and above all in bfloat16, takes longer than an addition."""
        return nnf.conv_transpose2d(x, self.weight, stride=2, padding=1)

    def _folded(self, x: Tensor) -> Tensor:
        """The same as each pixel's patch of 4 x 4 and the sum of patches where they overlap."""
        height, width = x.shape[2:]
        patches = linear(x.movedim(1, -1).flatten(1, 2), self.weight.flatten(1).t())  # (B, H W, 16)
        size = (2 * height, 2 * width)
        return nnf.fold(patches.transpose(1, 2), size, self.kernel_size, padding=1, stride=2)


def _down(kind: str, inputs: int, outputs: int) -> nn.Sequential:
    """One stage of the encoder: (B, inputs, H, W) -> (B, outputs, H/2, W/2)."""
    pool = nn.MaxPool2d(2, ceil_mode=True)
    if kind == "strided":
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.SiLU())
    if kind == "residual":
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), pool, Residual(outputs))
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), pool, nn.SiLU())


def _up(kind: str, inputs: int, outputs: int, size: tuple[int, int]) -> nn.Sequential:
    """One stage of the decoder: (B, inputs, H/2, W/2) -> (B, outputs, *size)."""
    if kind == "transposed":
        return nn.Sequential(TransposedConv(inputs, outputs, size))
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    if kind == "residual":
        return nn.Sequential(Residual(inputs), Upsample(size), convolution)
    return nn.Sequential(Upsample(size), convolution)


class Encoder(nn.Module):
    """(B, C, H, W) in [0, 1] -> (B, features)."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        if config.network == "mlp":
            sizes = (math.prod(config.image_shape), *_hidden(config))
            layers = [(Linear(i, o), nn.ReLU()) for i, o in itertools.pairwise(sizes)]
            self.layers = nn.Sequential(nn.Flatten(), *itertools.chain.from_iterable(layers))
            self.features = sizes[-1]
        else:
            channels = (config.channels, *_hidden(config))
            stages = [_down(config.network, i, o) for i, o in itertools.pairwise(channels)]
            self.layers = nn.Sequential(*stages, Flatten())
            self.features = channels[-1] * math.prod(_smallest(config))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(2 * x - 1)


class Decoder(nn.Module):
    """(B, D) -> (B, outputs, H, W), the encoder mirrored."""

    def __init__(self, config: NetworkConfig, outputs: int):
        super().__init__()
        image = outputs, config.height, config.width
        layers = _mlp_decoder if config.network == "mlp" else _conv_decoder
        self.layers = nn.Sequential(*layers(config, image))
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def _mlp_decoder(config: NetworkConfig, image: tuple[int, int, int]) -> list[nn.Module]:
    sizes = (config.latent_dim, *reversed(_hidden(config)), math.prod(image))
    layers = [(nn.ReLU(), Linear(i, o)) for i, o in itertools.pairwise(sizes)]
    _, *rest = itertools.chain.from_iterable(layers)  # no activation before the first layer
    return [*rest, nn.Unflatten(1, image)]


def _conv_decoder(config: NetworkConfig, image: tuple[int, int, int]) -> list[nn.Module]:
    kind = {"conv": config.upsampling, "strided": "transposed", "residual": "residual"}[config.network]
    sizes = halvings(config.height, config.width, len(_hidden(config)))[-2::-1]
    channels = (*reversed(_hidden(config)), image[0])
    deepest = channels[0], *_smallest(config)
    stages = [
        (nn.SiLU(), _up(kind, i, o, size))
        for (i, o), size in zip(itertools.pairwise(channels), sizes, strict=True)
    ]
    start = [Linear(config.latent_dim, math.prod(deepest)), Unflatten(1, deepest)]
    return [*start, *itertools.chain.from_iterable(stages)]


def _hidden(config: NetworkConfig) -> tuple[int, ...]:
    """The layer sizes, which a checked configuration always has."""
    return config.hidden or ()


def _smallest(config: NetworkConfig) -> tuple[int, int]:
    """The size after the last stage."""
    return halvings(config.height, config.width, len(_hidden(config)))[-1]
