"""Layers that are computed again in the backward pass: the same bytes, and less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ddpm import UNet
from ddpm.layers import Downsample, Upsample

LEVELS = 3


def network(levels: int, dropout: float = 0.1) -> UNet:
    torch.manual_seed(0)
    return UNet(
        1,
        image_size=16,
        channels=8,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        norm_groups=4,
        dropout=dropout,
        num_classes=3,
        activation_checkpointing=levels,
    )


def gradients(levels: int, *, keyed: bool = True, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return loss and gradients of one backward pass, and what torch's generator draws after it."""
    model = network(levels)
    torch.manual_seed(1)
    x, t, y = torch.randn(4, 1, 16, 16), torch.tensor([3, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(x, t, y, torch.arange(4) if keyed else None).float().square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), torch.rand(1)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("keyed", [True, False])
def test_loss_and_gradients_are_the_same_bytes_with_dropout_and_labels(keyed: bool, dtype: torch.dtype | None) -> None:
    kept = gradients(0, keyed=keyed, dtype=dtype)
    assert len(kept) == len(list(network(0).parameters())) + 2
    for levels in (1, LEVELS):
        again = gradients(levels, keyed=keyed, dtype=dtype)
        assert [a.numpy().tobytes() for a in again] == [b.numpy().tobytes() for b in kept]


@contextmanager
def saved_bytes(found: dict[int, int]) -> Iterator[None]:
    """Count the memory that autograd keeps for the backward pass, each storage once."""

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def test_each_level_more_keeps_less_for_the_backward_pass() -> None:
    kept = []
    for levels in range(LEVELS + 1):
        found: dict[int, int] = {}
        with saved_bytes(found):
            out = network(levels)(torch.randn(4, 1, 16, 16), torch.tensor([1, 2, 3, 4]), keys=torch.arange(4))
        kept.append(sum(found.values()))
        del out
    assert kept == sorted(kept, reverse=True)
    assert kept[LEVELS] < kept[0] / 3


def test_nothing_is_computed_again_where_nothing_is_trained() -> None:
    model, calls = network(LEVELS).eval(), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    layers = [m for m in model.modules() if isinstance(m, Downsample | Upsample)]
    for layer in layers:
        layer.register_forward_pre_hook(count)
    model(torch.randn(1, 1, 16, 16), torch.tensor([1])).sum().backward()
    assert calls == len(layers)
    model.train()(torch.randn(1, 1, 16, 16), torch.tensor([1]), keys=torch.arange(1)).sum().backward()
    assert calls == 3 * len(layers)
