"""Matrix products of a layer, by MKL as torch calls it and by oneDNN: what `vae/linear.py` chooses by.

    OMP_NUM_THREADS=1 python benchmarks/products.py

Milliseconds of CPU for one product, the least of five series: forward, the gradient of the inputs, and that
of the weights, at the sizes of our networks; N rows, I inputs, O outputs. The last column is the ratio of all
three together. The same of a transposed convolution to a single channel, torch's and by its patches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from training import machine

from vae import linear
from vae.networks import TransposedConv

SIZES = [(128, 784, 400), (128, 400, 784), (128, 400, 40), (128, 20, 400), (6272, 64, 64), (6272, 16, 16)]
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


def transposed(batch: int, channels: int, side: int) -> tuple[float, float]:
    """A step's transposed convolution to one channel: by torch's kernel, and as `TransposedConv` does it."""
    layer = TransposedConv(channels, 1, (2 * side, 2 * side)).to(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(batch, 1, 2 * side, 2 * side)

    def step(forward: Callable[[Any], Any]) -> None:
        forward(x).backward(gradient)

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
    plain, ours = transposed(128, 32, 14)
    print(
        f"\nTransposed convolution, 32 channels of 14 x 14 to one of 28 x 28: {plain:.2f} ms, ours {ours:.2f}"
    )


if __name__ == "__main__":
    main()
