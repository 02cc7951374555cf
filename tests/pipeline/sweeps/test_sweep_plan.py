"""A sweep's plan: how many trials there are, which is the largest, and which points cost other network calls."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.errors import UsageError
from pipeline.sweeps.config import base_experiment, sweep_from
from pipeline.sweeps.forecast import trial_calls
from pipeline.sweeps.plan import SweepPlan, SweepRequest, drawing, make_sweep_plan
from pipeline.sweeps.points import title

SHAPE = (1, 8, 8)


def plan(space: dict[str, Any], **more: Any) -> SweepPlan:
    sweep = sweep_from({"base": "digits", "space": space, "budget": {"steps": 10}, **more})
    return make_sweep_plan(SweepRequest(sweep, base_experiment(sweep), Profile()), "here", 1797, SHAPE, 10)


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


def test_the_largest_point_is_the_one_whose_scores_cost_most_where_the_points_train_alike() -> None:
    bound = {"budget": {"minutes": 5}, "metric": "bpd"}  # T calls for each of 1,797 images
    by_bound = plan({"diffusion.num_timesteps": [100, 1000, 250]}, **bound)
    assert by_bound.largest == {"diffusion.num_timesteps": 1000}
    assert trial_calls(by_bound.sweep, by_bound.trial) == 1000 * 1797
    more = {"more_network_calls": (10, 20), "early_stopping": {"rungs": 2, "num_images": 64}}
    by_steps = plan({"sampling.steps": [10, 50, 20]}, **more)
    assert by_steps.largest == {"sampling.steps": 50}
    images = min(1797, by_steps.trial.experiment.evaluation.num_images)
    assert trial_calls(by_steps.sweep, by_steps.trial) == images * (50 + 10 + 20) + 2 * 64 * 50
    assert plan({"training.learning_rate": [1e-3, 1e-4]}, **bound).largest is None


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


TOO_FEW = {"grid": [5, 10]}  # timesteps, of which images cannot take the base's 50 steps


@pytest.mark.parametrize("also", [{}, {"training.warmup_steps": {"integer": [1, 2]}}])
def test_a_search_all_of_whose_points_are_refused_is_reported_as_a_grid_is(also: dict[str, Any]) -> None:
    told = "every point of the sweep is refused; the first, T = (5|10).*: .*network calls"
    with pytest.raises(UsageError, match=told):
        plan({"diffusion.num_timesteps": TOO_FEW})
    with pytest.raises(UsageError, match=told):
        plan({"diffusion.num_timesteps": TOO_FEW, **also}, search="tpe", num_points=5)


def test_what_a_search_meets_that_is_refused_or_warned_of_is_listed() -> None:
    enough, degenerate = [0.2] * 60, [0.01] * 60
    overrides = {"diffusion.schedule": "table", "diffusion.num_timesteps": 60, "diffusion.betas": enough}
    space = {"diffusion.betas": [enough, degenerate], "model.channels": [32, 33]}
    grid = {"base": "digits", "overrides": overrides, "space": space, "budget": {"steps": 9}}
    sweep = sweep_from(grid | {"search": "tpe", "num_points": 9})
    asked = SweepRequest(sweep, base_experiment(sweep), Profile())
    met = make_sweep_plan(asked, "here", 1797, SHAPE, 10).checked
    assert met.points == met.refused == []  # drawn later
    search, points = drawing(sweep, asked.base, met), []
    while (point := search.draw()) is not None:
        points.append(point)
    of_grid = plan(space, overrides=overrides).checked
    assert sorted(map(title, points)) == sorted(map(title, of_grid.points))
    assert {title(item.point): item.reason for item in met.refused} == {
        title(item.point): item.reason for item in of_grid.refused
    }
    assert met.warnings == of_grid.warnings
    assert (len(points), len(met.refused), len(met.warnings)) == (2, 2, 1)


def test_guidance_costs_two_network_calls_a_step() -> None:
    classes = {"model.class_conditional": True, "sampling.guidance_scale": 2.0}
    found = plan({"diffusion.num_timesteps": [100, 250]}, overrides=classes)
    assert len(found.checked.points) == 2  # alike in calls
    few = {"diffusion.num_timesteps": [20, 250]}
    assert "20 network calls, those of the base 50" in plan(few).checked.refused[0].reason
    assert "40 network calls, those of the base 100" in plan(few, overrides=classes).checked.refused[0].reason
