"""A sweep's plan: how many trials there are, which is the largest, and which points cost other network calls."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.settings.cluster_profile import Profile
from pipeline.sweeps.config import base_experiment, sweep_from
from pipeline.sweeps.plan import Request, SweepPlan, make_sweep_plan

SHAPE = (1, 8, 8)


def plan(space: dict[str, Any], **more: Any) -> SweepPlan:
    sweep = sweep_from({"base": "digits", "space": space, "budget": {"steps": 10}, **more})
    return make_sweep_plan(Request(sweep, base_experiment(sweep), Profile()), "here", 1797, SHAPE, 10)


def test_the_largest_point_is_planned_for_wherever_it_stands() -> None:
    found = plan({"model.channels": [32, 64, 16]})
    assert found.largest == {"model.channels": 64}
    assert found.trial.experiment.model.channels == 64
    assert found.trial.num_parameters == plan({"model.channels": [64]}).trial.num_parameters
    assert found.disk_bytes == 3 * (plan({"model.channels": [64]}).disk_bytes or 0)
    assert "largest:    channels = 64" in found.to_text()
    by_batch = plan({"training.batch_size": [32, 64]})
    assert by_batch.largest == {"training.batch_size": 64}
    assert plan({"diffusion.schedule": ["linear", "cosine"]}).largest is None
    conditional = plan({"model.channels": [32, 64]}, overrides={"model.class_conditional": True})
    assert conditional.largest == {"model.channels": 64}


def test_of_a_search_that_draws_points_the_ends_of_its_ranges_are_planned_for() -> None:
    space = {"model.channels": {"integer": [16, 70], "step": 16}, "model.dropout": {"uniform": [0, 0.3]}}
    found = plan(space, search="tpe", num_points=5)
    assert found.trial.experiment.model.channels == 64
    assert found.num_trials == 5


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_no_more_trials_are_announced_than_there_are_points(search: str) -> None:
    found = plan({"diffusion.schedule": ["linear", "cosine"]}, search=search, num_points=4, seeds=2)
    assert found.num_trials == 2 * 2
    assert "4 at most: 2 points x 2 seeds" in found.to_text()


def test_guidance_costs_two_network_calls_a_step() -> None:
    classes = {"model.class_conditional": True, "sampling.guidance_scale": 2.0}
    found = plan({"diffusion.num_timesteps": [100, 250]}, overrides=classes)
    assert len(found.checked.points) == 2  # alike in calls
    few = {"diffusion.num_timesteps": [20, 250]}
    assert "20 network calls, those of the base 50" in plan(few).checked.refused[0].reason
    assert "40 network calls, those of the base 100" in plan(few, overrides=classes).checked.refused[0].reason
