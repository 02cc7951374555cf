"""GroupNorm with SiLU: the gradient of our own backward pass against finite differences and against torch's, in each precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm import norm
from ddpm.norm import norm_silu

GROUPS = 4


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(channels: int, dtype: torch.dtype = torch.float64) -> nn.GroupNorm:
    made = nn.GroupNorm(GROUPS, channels, eps=1e-6).to(dtype)
    with torch.no_grad():
        made.weight.copy_(1 + 0.3 * random(channels, seed=1))
        made.bias.copy_(0.3 * random(channels, seed=2))
    return made


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def by_hand(x: Tensor, of: nn.GroupNorm) -> Tensor:
    out: Tensor = norm._NormSiLU.apply(x, of.weight, of.bias, GROUPS, of.eps)
    return out


def test_gradcheck() -> None:
    of = layer(8)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = norm._NormSiLU.apply(x, weight, bias, GROUPS, of.eps)
        return out

    inputs = channels_last(random(2, 8, 3, 4, seed=0) * 2 + 1), of.weight, of.bias
    assert torch.autograd.gradcheck(function, inputs)


def gradients(out: Tensor, dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(out, inputs, dy)]


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_the_gradient_is_torchs_in_each_precision(dtype: torch.dtype, error: float, offset: float) -> None:
    """As far from the float64 one as torch's own, also where the mean is three standard deviations; weights stay float32 under autocast."""
    x, dy = random(4, 32, 16, 16, seed=0) + offset, random(4, 32, 16, 16, seed=3)
    exact_layer, of = layer(32), layer(32, torch.float64 if dtype is torch.float64 else torch.float32)
    rough = channels_last(x.to(dtype))
    exact_x = rough.detach().double().requires_grad_()
    exact = functional.silu(exact_layer(exact_x))
    wanted = gradients(exact, dy.to(dtype).double(), exact_x, exact_layer.weight, exact_layer.bias)
    ours = gradients(by_hand(rough, of), dy.to(dtype), rough, of.weight, of.bias)
    torchs = gradients(functional.silu(of(rough)), dy.to(dtype), rough, of.weight, of.bias)
    for mine, theirs, true in zip(ours, torchs, wanted, strict=True):
        floor = max(error, 2 * float((theirs - true).norm() / true.norm()))
        assert float((mine - true).norm() / true.norm()) < floor
    torch.testing.assert_close(by_hand(rough, of), functional.silu(of(rough)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("channels", "side", "dtype", "ours"),
    [
        (8, 16, torch.bfloat16, True),
        (8, 8, torch.bfloat16, False),
        (64, 16, torch.bfloat16, False),
        (64, 32, torch.bfloat16, True),
        (8, 32, torch.float32, False),
        (8, 32, torch.float16, False),
    ],
)
def test_it_is_used_where_it_is_faster(channels: int, side: int, dtype: torch.dtype, ours: bool) -> None:
    def backward_of(x: Tensor) -> str:
        out = norm_silu(layer(channels, torch.float32), x)
        return "" if out.grad_fn is None else out.grad_fn.name()

    x = channels_last(random(2, channels, side, side, seed=0, dtype=dtype))
    assert ("_NormSiLU" in backward_of(x)) == ours
    assert "Silu" in backward_of(x.detach().contiguous().requires_grad_())
    with torch.no_grad():
        assert backward_of(x) == ""
