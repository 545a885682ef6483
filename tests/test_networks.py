"""Networks: any size from 8x8 to 256x256, every weight used, no image seeing another."""

from __future__ import annotations

import pytest
import torch

from vae.config import FlatConfig
from vae.networks import Decoder, Encoder, TransposedConv

KINDS = [
    {"network": "conv", "upsampling": "transposed"},
    {"network": "conv", "upsampling": "unpool"},
    {"network": "strided"},
    {"network": "residual"},
    {"network": "mlp"},
]


def config(kind: dict[str, str], height: int, width: int, channels: int) -> FlatConfig:
    hidden = (4, 6) if kind["network"] != "mlp" else (10, 8)
    return FlatConfig.from_dict(
        {"height": height, "width": width, "channels": channels, "latent_dim": 3, "hidden": hidden} | kind
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 13), (28, 28), (31, 8), (256, 255)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_geometry_comes_out_as_it_went_in(
    kind: dict[str, str], height: int, width: int, channels: int
) -> None:
    geometry = config(kind, height, width, channels)
    encoder, decoder = Encoder(geometry), Decoder(geometry, outputs=5)
    features = encoder(torch.rand(2, channels, height, width))
    assert features.shape == (2, encoder.features)
    assert decoder(torch.rand(2, 3)).shape == (2, 5, height, width)


@pytest.mark.parametrize("kind", KINDS)
def test_default_stages_reach_the_smallest_and_the_longest_sizes(kind: dict[str, str]) -> None:
    for height, width in ((8, 8), (8, 256)):
        geometry = FlatConfig.from_dict({"height": height, "width": width, "channels": 1} | kind)
        features = Encoder(geometry)(torch.rand(1, 1, height, width))
        assert features.shape[0] == 1
        assert Decoder(geometry, 2)(torch.rand(1, 32)).shape == (1, 2, height, width)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_gradient(kind: dict[str, str]) -> None:
    geometry = config(kind, 12, 9, 3)
    torch.manual_seed(0)
    encoder, decoder = Encoder(geometry), Decoder(geometry, outputs=5)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)  # away from the zeros that blocks start with
    encoder(torch.rand(8, 3, 12, 9)).pow(2).sum().backward()
    decoder(torch.randn(8, 3)).pow(2).sum().backward()
    for network in (encoder, decoder):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_see_its_batch(kind: dict[str, str]) -> None:
    encoder = Encoder(config(kind, 12, 9, 3)).double()
    x = torch.rand(7, 3, 12, 9, dtype=torch.float64)
    alone = torch.cat([encoder(row) for row in x.split(1)])
    torch.testing.assert_close(encoder(x), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (7, 12), (1, 3)])
def test_a_transposed_convolution_is_torchs(height: int, width: int, outputs: int) -> None:
    """Values and gradients, whichever way it goes."""
    layer = TransposedConv(6, outputs, (2 * height - 1, 2 * width)).double()
    x = torch.randn(3, 6, height, width, dtype=torch.float64)
    wanted = torch.nn.ConvTranspose2d.forward(layer, x)[..., : 2 * height - 1, : 2 * width]
    torch.testing.assert_close(layer(x), wanted)
    parameters = list(layer.parameters())
    mine = torch.autograd.grad(layer(x).square().sum(), parameters)
    torch.testing.assert_close(mine, torch.autograd.grad(wanted.square().sum(), parameters))


@pytest.mark.parametrize("outputs", [1, 5])
def test_a_transposed_convolution_stays_in_bfloat16(outputs: int) -> None:
    """Under autocast, so that what follows it is no slower."""
    with torch.autocast("cpu", torch.bfloat16):
        assert TransposedConv(6, outputs, (4, 4))(torch.randn(3, 6, 2, 2)).dtype == torch.bfloat16
