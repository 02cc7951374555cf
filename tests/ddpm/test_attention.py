"""Attention in training on a CPU: the plain product, against torch's fused one and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm.layers import FEW_PIXELS, Attention


def attention(heads: int) -> Attention:
    torch.manual_seed(heads)
    module = Attention(16, heads, 4, 1e-6).double()
    torch.nn.init.normal_(module.out.weight, std=0.5)  # starts at about zero: it would hide what it is multiplied with
    return module


def pixels(side: int) -> Tensor:
    return torch.randn(2, 16, side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)


@pytest.mark.parametrize(("heads", "side"), [(1, 4), (4, 7), (2, 16), (2, 17)])
def test_training_and_sampling_compute_the_same(heads: int, side: int) -> None:
    assert 7 * 7 < 16 * 16 <= FEW_PIXELS < 17 * 17  # the sizes lie on both sides of the limit
    module, x = attention(heads), pixels(side)
    with torch.no_grad():
        fused = module(x)  # without gradients the fused kernel is taken
    torch.testing.assert_close(module(x).detach(), fused, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    module, x = attention(2), pixels(2).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


def test_autocast_stays_within_bfloat16_of_float64() -> None:
    module, x = attention(1), pixels(4)
    exact = module(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module.float()(x.float()).detach()
    assert (rounded - exact).abs().max() < 0.02 * exact.abs().max()
