"""The learning rate against closed forms, against torch's and diffusers' schedulers, and in a training that is lengthened."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.experiment import TrainingConfig, experiment_from
from pipeline.training.combinations import check_training
from pipeline.training.learning_rate import learning_rate_at

SCHEDULES = ("linear", "cosine", "inverse_sqrt")


def settings_of(**given: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"learning_rate": 0.1, "warmup_steps": 4, "steps": 30} | given)


def rates(settings: TrainingConfig, steps: int) -> list[float]:
    return [learning_rate_at(step, settings) for step in range(steps)]


def rates_of_torch(make: object, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_begins_at_zero_and_ends_at_the_rate() -> None:
    assert rates(settings_of(), 6) == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates(settings_of(warmup_steps=0), 2) == [0.1, 0.1]


@pytest.mark.parametrize(
    ("schedule", "name"), [("linear", "get_linear_schedule_with_warmup"), ("cosine", "get_cosine_schedule_with_warmup")]
)
def test_decays_to_zero_are_those_of_diffusers(schedule: str, name: str) -> None:
    from diffusers import optimization

    expected = rates_of_torch(lambda optimizer: getattr(optimization, name)(optimizer, 4, 20), 21)
    assert rates(settings_of(learning_rate_schedule=schedule, decay_steps=20), 21) == pytest.approx(expected, abs=1e-12)


def test_decays_to_a_last_value_are_those_of_torch() -> None:
    after = {"warmup_steps": 0, "decay_steps": 16, "final_learning_rate": 0.02}
    cosine = rates_of_torch(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16, 0.02), 17)
    assert rates(settings_of(learning_rate_schedule="cosine", **after), 17) == pytest.approx(cosine)
    linear = rates_of_torch(lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, 16), 17)
    assert rates(settings_of(learning_rate_schedule="linear", **after), 17) == pytest.approx(linear)


def test_the_inverse_square_root_meets_the_warm_up_and_halves_every_fourfold_step() -> None:
    settings = settings_of(learning_rate_schedule="inverse_sqrt")
    assert [learning_rate_at(step, settings) for step in (3, 4, 16, 64)] == pytest.approx([0.075, 0.1, 0.05, 0.025])
    stopped = settings_of(learning_rate_schedule="inverse_sqrt", decay_steps=16)
    assert learning_rate_at(64, stopped) == learning_rate_at(16, stopped) == learning_rate_at(16, settings)
    assert rates(settings_of(learning_rate_schedule="inverse_sqrt", warmup_steps=0), 5)[4] == pytest.approx(0.05)


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 50),
    length=st.integers(1, 200),
    end=st.floats(0, 0.1),
    steps=st.integers(1, 1000),
)
def test_after_the_warm_up_it_never_grows_and_does_not_depend_on_how_long_is_trained(
    schedule: str, warmup: int, length: int, end: float, steps: int
) -> None:
    given = {"learning_rate_schedule": schedule, "warmup_steps": warmup, "decay_steps": warmup + length}
    if schedule != "inverse_sqrt":
        given["final_learning_rate"] = end
    settings, longer = settings_of(**given), settings_of(**given, steps=steps)
    assert rates(settings, warmup + 5) == rates(longer, warmup + 5)
    after = [learning_rate_at(step, settings) for step in range(warmup, warmup + length + 10)]
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(after))
    assert len(set(after[length:])) == 1
    if schedule != "inverse_sqrt":
        assert math.isclose(after[-1], end, abs_tol=1e-15)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate_schedule": "cosine"}, "decay_steps: got none"),
        (
            {"learning_rate_schedule": "linear", "decay_steps": 4},
            "decay_steps: got 4, expected more than warmup_steps, 4",
        ),
        ({"decay_steps": 100}, "learning_rate_schedule constant, which reads neither"),
        (
            {"learning_rate_schedule": "inverse_sqrt", "final_learning_rate": 0.01},
            "inverse_sqrt, which does not read it",
        ),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(**given)


def test_steps_that_would_change_nothing_are_announced() -> None:
    training = {"learning_rate_schedule": "cosine", "warmup_steps": 0, "decay_steps": 20, "steps": 30}
    (warning,) = check_training(experiment_from({"training": training}))
    assert "is 0 from step 20 on, so the last 10 steps will not change the weights" in warning
    for meant in ({"steps": 20}, {"final_learning_rate": 1e-5}, {"learning_rate_schedule": "inverse_sqrt"}):
        assert not check_training(experiment_from({"training": training | meant}))
