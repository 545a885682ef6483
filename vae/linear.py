"""Matrix products of layers, by whichever library is the faster on this processor.

On an AMD processor with AVX-512, the MKL that torch calls for float32 products does not use those units, and
oneDNN, which torch brings as well, does: twice the products a second (benchmarks/README.md). On any other the
layer is torch's own. The choice depends on the processor alone, so a run repeats to the bit where it ran. In
bfloat16 the products are torch's everywhere, and only the layout of a gradient is ours.

Legend: N rows, in any number of leading dimensions; I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NARROW = 64
"""Below so many inputs or outputs the gradient of the weights is no faster by oneDNN."""


class Linear(nn.Linear):
    """torch's layer, x (..., I) -> (..., O), with the faster product.

    >>> layer = Linear(3, 2)
    >>> layer(torch.ones(4, 5, 3)).shape
    torch.Size([4, 5, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O): torch's function, with the faster product."""
    work = _work(x)
    if work is None:
        return nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # else oneDNN may be a thousand times slower
    found: Tensor = work(rows, weight, bias)
    return found.view(*x.shape[:-1], len(weight))


def _work(x: Tensor) -> Callable[..., Tensor] | None:
    """What multiplies these rows; None for torch's own layer."""
    if not on_cpu(x) or not x.numel() or x.dtype == torch.float64:
        return None
    if torch.is_autocast_enabled("cpu"):
        mixed = torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_grad_enabled()
        return Product.apply if mixed else None
    if x.dtype != torch.float32 or not _onednn_is_faster():
        return None
    return Product.apply if torch.is_grad_enabled() else product


class Product(torch.autograd.Function):
    """x Wᵀ + b and its gradients, in bfloat16 under autocast, by whichever library is the faster for each.

    The gradient of W lies as W does. torch's own is transposed in bfloat16, and to bring that to W's layout
    takes about as long as the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # torch.amp.custom_fwd would cost a small model 4 % of its step
            x, weight, bias = x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Autograd takes each to the dtype of what it is the gradient of."""
        out, (x, weight) = gradients[0].contiguous(), ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            product(out, weight.t()) if wants_x else None,
            _of_weight(out, x) if wants_weight else None,
            out.sum(0) if wants_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, I), weight (O, I), bias (O,) -> (N, O): of float32 by oneDNN, of bfloat16 by torch."""
    if x.dtype == torch.bfloat16:
        return nn.functional.linear(x, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _of_weight(out: Tensor, x: Tensor) -> Tensor:
    """(N, O), (N, I) -> (O, I)."""
    if min(out.shape[1], x.shape[1]) < NARROW:
        return out.t() @ x
    return product(out.t(), x.t())


def on_cpu(x: Tensor) -> bool:
    """Whether an operation on it may be replaced by others that are faster on a CPU: it is not traced."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


@cache
def _onednn_is_faster() -> bool:
    """Whether it is an AMD processor with AVX-512, and torch has the operation."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """The processor's maker, as Linux tells it; empty elsewhere."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.rpartition(": ")[2] for line in lines if line.startswith("vendor_id")), "")
