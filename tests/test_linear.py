"""The faster product: torch's own numbers, values and gradients, or torch's own layer where it may not be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vae import linear
from vae.linear import Linear

onednn = pytest.mark.skipif(
    not linear._onednn_is_faster(), reason="torch's own product is the one for this processor"
)


def beside(shape: tuple[int, ...], outputs: int, bias: bool = True) -> tuple[Linear, nn.Linear, Tensor]:
    """Our layer, torch's of the same weights, and inputs."""
    torch.manual_seed(0)
    ours, torchs = Linear(shape[-1], outputs, bias=bias), nn.Linear(shape[-1], outputs, bias=bias)
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs, torch.randn(shape)


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    layer(x).square().mean().backward()
    return [tensor.grad for tensor in (x, *layer.parameters()) if tensor.grad is not None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "outputs"), [((128, 784), 400), ((7, 20), 400), ((3, 7, 7, 64), 64), ((5, 100), 1), ((0, 9), 3)]
)
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    ours, torchs, x = beside(shape, outputs, bias)
    torch.testing.assert_close(ours(x), torchs(x))
    if x.numel():
        for mine, wanted in zip(gradients(ours, x), gradients(torchs, x), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "channels first"])
def test_rows_may_lie_anyhow(layout: str) -> None:
    ours, torchs, _ = beside((1, 96), 128)
    x = {
        "transposed": torch.randn(96, 40).t(),
        "expanded": torch.randn(1, 96).expand(40, -1),
        "sliced": torch.randn(40, 200)[:, 3:99],
        "channels first": torch.randn(4, 96, 5, 5).movedim(1, -1),
    }[layout]
    torch.testing.assert_close(ours(x), torchs(x))
    for mine, wanted in zip(gradients(ours, x), gradients(torchs, x), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), [((128, 784), 400), ((3, 7, 7, 64), 32), ((5, 100), 1)])
def test_gradients_in_bfloat16_are_torchs(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    """And lie as what they are the gradients of."""
    ours, torchs, x = beside(shape, outputs, bias)
    with torch.autocast("cpu", torch.bfloat16):
        mine, wanted = gradients(ours, x), gradients(torchs, x)
    for tensor, torchs_own in zip(mine, wanted, strict=True):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, torchs_own, rtol=0.02, atol=0.02 * torchs_own.abs().max().item())


def test_other_numbers_are_torchs_to_the_bit() -> None:
    """float64, in which exactness is tested, and whatever autocast makes of it."""
    ours, torchs, x = beside((16, 64), 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), torchs(x))
        assert ours.double()(x.double()).dtype == torch.float64  # autocast leaves it alone
    assert torch.equal(ours(x.double()), torchs.double()(x.double()))


@onednn
def test_the_faster_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without gradients; and a product repeats to the bit."""
    taken = []
    product = linear.product

    def counting(*arguments: Tensor) -> Tensor:
        taken.append(arguments)
        return product(*arguments)

    monkeypatch.setattr(linear, "product", counting)
    ours, _, x = beside((128, 784), 400)
    with torch.no_grad():
        once, again = ours(x), ours(x)
    assert len(taken) == 2
    assert torch.equal(once, again)
    gradients(ours, x)
    assert len(taken) == 5


def test_a_layer_is_exported_as_torchs() -> None:
    ours, torchs, x = beside((4, 64), 96)
    graph = torch.export.export(ours, (x,)).graph
    assert "linear" in str([node.target for node in graph.nodes])
    torch.testing.assert_close(ours(x), torchs(x))
