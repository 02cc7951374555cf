"""Attention in training on a CPU: the plain product, against torch's fused one and against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

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


def test_weights_of_large_products_do_not_overflow() -> None:
    """exp overflows float32 above 88; the products here reach thousands, so that each pixel attends to one other alone."""
    module, x = attention(2).float(), pixels(4).float()
    with torch.no_grad():
        module.qkv.weight *= 30
        q, k, v = module.qkv(module.norm(x).flatten(2).transpose(1, 2)).view(2, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        products = q @ k.transpose(-1, -2) / 8**0.5
        first, second = products.topk(2, dim=-1).values.unbind(-1)
        chosen = torch.gather(v, 2, products.argmax(-1, keepdim=True).expand_as(v))
        alone = x + module.out(chosen.transpose(1, 2).reshape(2, 16, 16)).transpose(1, 2).reshape(x.shape)
        sure = ((first - second) > 20).all(1).view(2, 1, 4, 4).expand_as(x)
        fused = module(x)
    assert float(products.max()) > 1000
    assert float(sure.float().mean()) > 0.5
    for out in (fused, module(x).detach()):
        assert bool(out.isfinite().all())
        torch.testing.assert_close(out[sure], alone[sure], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("side", "training", "fused"), [(16, True, 0), (17, True, 1), (16, False, 1)])
def test_the_plain_product_is_taken_in_training_where_pixels_are_few(
    monkeypatch: pytest.MonkeyPatch, side: int, training: bool, fused: int
) -> None:
    calls, really = [], functional.scaled_dot_product_attention

    def noted(*qkv: Tensor) -> Tensor:
        calls.append(qkv)
        return really(*qkv)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    with torch.set_grad_enabled(training):
        attention(2)(pixels(side))
    assert len(calls) == fused


def test_gradients_equal_finite_differences() -> None:
    module, x = attention(2), pixels(2).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


def test_autocast_stays_within_bfloat16_of_float64() -> None:
    module, x = attention(1), pixels(4)
    exact = module(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module.float()(x.float()).detach()
    assert (rounded - exact).abs().max() < 0.02 * exact.abs().max()
