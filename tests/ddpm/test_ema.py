"""The moving average: closed forms, order of update, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ddpm import ExponentialMovingAverage


def drift(model: nn.Module, values: list[float]) -> Iterator[None]:
    """An optimizer of our own: sets every parameter to the next value, then hands over."""
    for value in values:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        yield


def the_value(ema: ExponentialMovingAverage) -> float:
    values = {float(v) for tensor in ema.shadow.values() for v in tensor.flatten()}
    assert max(values) - min(values) < 1e-6
    return values.pop()


def ones(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)
    for p in model.parameters():
        nn.init.ones_(p)
    return model


def test_closed_form_without_ramp_up() -> None:
    model = ones()
    ema = ExponentialMovingAverage(model, 0.9, ramp_up=False)
    values = [2.0, -1.0, 0.5, 3.0]
    for _ in drift(model, values):
        ema.update()
    expected = 0.9**4 * 1.0 + sum(0.1 * 0.9 ** (3 - i) * v for i, v in enumerate(values))
    assert the_value(ema) == pytest.approx(expected, rel=1e-6)


def test_ramp_up_weighs_by_the_products_of_its_decays() -> None:
    model = ones()
    ema = ExponentialMovingAverage(model, 0.5)
    values = [float(i) for i in range(20)]
    expected = 1.0
    for n, _ in enumerate(drift(model, values)):
        decay = min(0.5, (1 + n) / (10 + n))
        assert ema.next_decay() == decay
        expected = decay * expected + (1 - decay) * values[n]
        ema.update()
        assert the_value(ema) == pytest.approx(expected, rel=1e-5)
    assert ema.next_decay() == 0.5  # reached at n = 8


def test_trap_5_initial_weights_do_not_linger() -> None:
    """With 0.9999 the initial weights would still weigh 37 % after 10,000 steps; with the ramp-up they are gone."""
    weights = {}
    for ramp_up in (False, True):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(model.weight)
        ema = ExponentialMovingAverage(model, 0.9999, ramp_up=ramp_up)
        nn.init.zeros_(model.weight)
        for _ in range(10_000):
            ema.update()
        weights[ramp_up] = float(ema.shadow["weight"])
    assert weights[False] == pytest.approx(0.9999**10_000, rel=1e-9)
    assert weights[False] == pytest.approx(0.368, abs=1e-3)
    assert weights[True] < 1e-20


def test_an_update_takes_the_weights_of_the_step_just_made() -> None:
    model = ones()
    ema = ExponentialMovingAverage(model, 0.0, ramp_up=False)
    for _, value in zip(drift(model, [5.0, 7.0]), [5.0, 7.0], strict=True):
        ema.update()
        assert the_value(ema) == value


def test_buffers_are_neither_averaged_nor_overwritten() -> None:
    model, other = ones(), ones()
    ema = ExponentialMovingAverage(model, 0.5)
    assert sorted(ema.shadow) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    model.get_buffer("1.running_mean").fill_(3.0)
    other.get_buffer("1.running_mean").fill_(9.0)
    ema.update()
    ema.copy_to(other)
    assert bool((other.get_buffer("1.running_mean") == 9.0).all())


def test_training_weights_are_left_alone() -> None:
    model, other = ones(), ones()
    ema = ExponentialMovingAverage(model, 0.5, ramp_up=False)
    for _ in drift(model, [3.0]):
        ema.update()
    ema.copy_to(other)
    assert bool((model.get_parameter("0.weight") == 3.0).all())
    assert bool((other.get_parameter("0.weight") == 2.0).all())
    ema.update()
    assert bool((other.get_parameter("0.weight") == 2.0).all())  # copied, not shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_shadow_of_half_weights_is_float32(dtype: torch.dtype) -> None:
    """In bf16 an average with decay 0.9999 never moves: 1 + 1e-4 is 1."""
    model = ones(dtype)
    ema = ExponentialMovingAverage(model, 0.9999, ramp_up=False)
    for _ in drift(model, [2.0] * 100):
        ema.update()
    assert {t.dtype for t in ema.shadow.values()} == {torch.float32}
    assert the_value(ema) == pytest.approx(2 - 0.9999**100, rel=1e-5)
    ema.copy_to(model)
    assert model.get_parameter("0.weight").dtype == dtype


def test_a_resume_continues_bit_for_bit() -> None:
    def run(stop: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(5, 5)
        ema = ExponentialMovingAverage(model, 0.99)
        for step in range(30):
            if step == stop:
                state = ema.state_dict()
                saved = {
                    "num_updates": state["num_updates"],
                    "shadow": {k: v.clone() for k, v in state["shadow"].items()},
                }
                ema = ExponentialMovingAverage(model, 0.99)
                ema.load_state_dict(saved)
            with torch.no_grad():
                model.weight.add_(torch.randn(5, 5) / 10)
            ema.update()
        return ema.shadow

    straight, resumed = run(None), run(12)
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def test_wrapped_models_have_the_bare_names() -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
        ema = ExponentialMovingAverage(wrapped, 0.5)
        assert sorted(ema.shadow) == ["bias", "weight"]
        ema.update()
        ema.copy_to(nn.Linear(2, 2))
        compiled = torch.compile(nn.Linear(2, 2), backend="eager")
        assert isinstance(compiled, nn.Module)
        ema.copy_to(compiled)
    finally:
        torch.distributed.destroy_process_group()


def test_other_networks_are_refused() -> None:
    ema = ExponentialMovingAverage(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model and the average differ at parameters bias"):
        ema.copy_to(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match="the saved average and the average differ at parameters bias, weight"):
        ema.load_state_dict(ExponentialMovingAverage(nn.Linear(3, 3)).state_dict())
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    with pytest.raises(ValueError, match=r"at parameters 0.bias, 0.weight, 1.bias, 1.weight, 2.bias; both must"):
        ema.load_state_dict(ExponentialMovingAverage(many).state_dict() | {"num_updates": 3})
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="expected a number in"):
            ExponentialMovingAverage(nn.Linear(2, 2), decay)
