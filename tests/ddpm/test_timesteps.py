"""Drawing steps for training: probabilities by hand, unbiased weights, and a state that travels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddpm import LossAwareTimesteps, UniformTimesteps
from tests.kit.closed_forms import seeded


def uniform(num: int, seed: int = 0) -> Tensor:
    return torch.rand(num, generator=seeded(seed), dtype=torch.float64)


def filled(losses: list[list[float]]) -> LossAwareTimesteps:
    """A sampler that was told, for each step, these losses in order."""
    sampler = LossAwareTimesteps(len(losses))
    for step, values in enumerate(losses):
        sampler.update(torch.full((len(values),), step), torch.tensor(values))
    return sampler


def test_uniform_draws_every_step_alike_with_weight_1() -> None:
    t, weight = UniformTimesteps(7).draw(uniform(70_000))
    assert t.dtype == torch.int64
    assert bool((weight == 1).all())
    counts = torch.bincount(t, minlength=7)
    assert len(counts) == 7
    assert float((counts - 10_000).abs().max()) < 5 * math.sqrt(70_000 * (1 / 7) * (6 / 7))


def test_draws_are_quantiles() -> None:
    """p = (0.1, 0.2, 0.7), but for the share that is uniform: u = 0.05, 0.2, 0.9 fall into steps 0, 1 and 2."""
    sampler = filled([[1.0] * 10, [2.0] * 10, [7.0] * 10])
    u = torch.tensor([0.9, 0.05, 0.2, 0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampler.draw(u).t.tolist() == [2, 0, 1, 0, 2]
    assert UniformTimesteps(4).draw(u).t.tolist() == [3, 0, 0, 0, 3]


def test_uniform_until_every_step_has_ten_losses() -> None:
    sampler = filled([[1.0] * 10, [5.0] * 10, [9.0] * 9])
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    assert bool((sampler.draw(uniform(100)).weight == 1).all())
    sampler.update(torch.tensor([2]), torch.tensor([9.0]))
    assert sampler.probabilities().tolist() != pytest.approx([1 / 3] * 3)


def test_probabilities_by_hand() -> None:
    """The root mean square of the last ten losses: older ones are forgotten."""
    sampler = filled([[100.0] * 5 + [3.0] * 10, [float(i) for i in range(1, 11)], [0.0] * 10, [1.0] * 9 + [-7.0]])
    w = [3.0, math.sqrt(38.5), 0.0, math.sqrt((9 + 49) / 10)]
    expected = [0.999 * x / sum(w) + 0.001 / 4 for x in w]
    assert sampler.probabilities().tolist() == pytest.approx(expected, rel=1e-12)
    assert float(sampler.probabilities().sum()) == pytest.approx(1, abs=1e-12)


def test_the_oldest_loss_leaves_first() -> None:
    sampler = filled([[float(i) for i in range(1, 14)], [1.0] * 10])
    w = [math.sqrt(sum(i * i for i in range(4, 14)) / 10), 1.0]
    assert float(sampler.probabilities()[0]) == pytest.approx(0.999 * w[0] / sum(w) + 0.0005, rel=1e-12)


def test_one_update_of_many_is_many_updates_of_one() -> None:
    """In the order given, with steps repeated inside an update, more than ten times too."""
    at_once, one_by_one = LossAwareTimesteps(4), LossAwareTimesteps(4)
    for seed in range(5):
        t, losses = torch.randint(4, (60,), generator=seeded(seed)), torch.rand(60, generator=seeded(100 + seed))
        at_once.update(t, losses)
        for i in range(60):
            one_by_one.update(t[i : i + 1], losses[i : i + 1])
        assert torch.equal(at_once.probabilities(), one_by_one.probabilities())
    assert bool((at_once.seen >= 10).all())


def test_weights_make_the_mean_unbiased() -> None:
    """Sum over t of p_t * weight_t * L_t is the plain mean of L, whatever p is; and draws follow p."""
    sampler = filled([[v] * 10 for v in (0.1, 1.0, 5.0, 20.0)])
    p = sampler.probabilities()
    t, weight = sampler.draw(uniform(200_000))
    torch.testing.assert_close(weight.double(), 1 / (4 * p[t]), rtol=1e-5, atol=0)
    counts = torch.bincount(t, minlength=4).double()
    assert bool(((counts - 200_000 * p).abs() < 5 * (200_000 * p * (1 - p)).sqrt()).all())


def test_losses_that_are_all_zero_leave_it_uniform() -> None:
    assert filled([[0.0] * 10] * 3).probabilities().tolist() == pytest.approx([1 / 3] * 3)


def run(sampler: LossAwareTimesteps, start: int, stop: int) -> list[Tensor]:
    drawn = []
    for step in range(start, stop):
        t = sampler.draw(uniform(8, step)).t
        drawn.append(t)
        sampler.update(t, (t + 1).float() * (1 + step % 3))
    return drawn


def test_a_resume_continues_bit_for_bit() -> None:
    straight = LossAwareTimesteps(5)
    before, after = run(straight, 0, 60), run(straight, 60, 90)
    first, second = LossAwareTimesteps(5), LossAwareTimesteps(5)
    assert all(torch.equal(a, b) for a, b in zip(run(first, 0, 60), before, strict=True))
    state = first.state_dict()
    run(first, 60, 70)  # what was saved does not change with it
    second.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(run(second, 60, 90), after, strict=True))
    assert bool((straight.seen >= 10).all())  # the history has been in use, not the uniform start


def test_foreign_states_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit 6 loss-aware steps"):
        LossAwareTimesteps(6).load_state_dict(LossAwareTimesteps(5).state_dict())
    with pytest.raises(ValueError, match="does not fit 6 loss-aware steps"):
        LossAwareTimesteps(6).load_state_dict(UniformTimesteps(6).state_dict())
    with pytest.raises(ValueError, match="not that of uniform timesteps"):
        UniformTimesteps(6).load_state_dict(LossAwareTimesteps(6).state_dict())
    UniformTimesteps(6).load_state_dict({})
