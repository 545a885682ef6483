"""Matrix products of a layer, by MKL as torch calls it and by oneDNN: what `vae/linear.py` chooses by.

    OMP_NUM_THREADS=1 python benchmarks/products.py

Milliseconds of CPU for one product, the least of five series: forward, the gradient of the inputs, and that
of the weights, at the sizes of our networks; N rows, I inputs, O outputs. The last column is the ratio of all
three together. Then a step's transposed convolutions, forward and back: torch's layer, and ours.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from training import machine

from vae import linear
from vae.networks import TransposedConv

SIZES = [(128, 784, 400), (128, 400, 784), (128, 400, 40), (128, 20, 400), (6272, 64, 64), (6272, 16, 16)]
TRANSPOSED = [(128, 64, 4), (64, 32, 7), (32, 1, 14)]  # channels in and out, and the side of the map
SERIES, CALLS = 5, 60


def milliseconds(call: Callable[[], object]) -> float:
    """Of CPU, for one call."""
    found = []
    for _ in range(SERIES):
        began = time.process_time()
        for _ in range(CALLS):
            call()
        found.append((time.process_time() - began) / CALLS * 1e3)
    return min(found)


def products(rows: int, inputs: int, outputs: int) -> tuple[list[float], list[float]]:
    """(forward, inputs' gradient, weights' gradient) by MKL, and by oneDNN."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias, out = torch.randn(outputs), torch.randn(rows, outputs)
    mkl = [lambda: torch.addmm(bias, x, weight.t()), lambda: out @ weight, lambda: out.t() @ x]
    onednn = [
        lambda: linear.product(x, weight, bias),
        lambda: linear.product(out, weight.t()),
        lambda: linear.product(out.t(), x.t()),
    ]
    return [milliseconds(call) for call in mkl], [milliseconds(call) for call in onednn]


def transposed(channels: int, outputs: int, side: int, mixed: bool) -> tuple[float, float]:
    """A step's transposed convolution of 128 maps: by torch's layer, and as `TransposedConv` does it."""
    layer = TransposedConv(channels, outputs, (2 * side, 2 * side)).to(memory_format=torch.channels_last)
    x = torch.randn(128, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()

    def step(forward: Callable[[Any], Any]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found = forward(x)
        found.backward(torch.ones_like(found))

    plain = super(TransposedConv, layer).forward
    return milliseconds(lambda: step(plain)), milliseconds(lambda: step(layer))


def main() -> None:
    print(machine())
    print("| N | I | O | MKL: forward, inputs, weights (ms) | oneDNN (ms) | ratio |")
    print("| ---: | ---: | ---: | --- | --- | ---: |")
    for size in SIZES:
        mkl, onednn = products(*size)
        each = [", ".join(f"{ms:.3f}" for ms in found) for found in (mkl, onednn)]
        print(f"| {' | '.join(map(str, size))} | {each[0]} | {each[1]} | {sum(mkl) / sum(onednn):.2f} |")
    print("\n| transposed convolution | precision | torch's (ms) | ours (ms) | ratio |")
    print("| --- | --- | ---: | ---: | ---: |")
    for (channels, outputs, side), mixed in itertools.product(TRANSPOSED, (False, True)):
        plain, ours = transposed(channels, outputs, side, mixed)
        name = f"{channels} to {outputs}, {side} x {side} | {'bfloat16' if mixed else 'float32'}"
        print(f"| {name} | {plain:.2f} | {ours:.2f} | {plain / ours:.2f} |")


if __name__ == "__main__":
    main()
