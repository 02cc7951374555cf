"""How a run is sampled: what is refused, what is warned of before anything is computed, and what the images are said to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddpm import BetaSchedule, timestep_subset
from pipeline.config.experiment import Experiment, experiment_from, load_experiment, with_overrides
from pipeline.errors import UsageError
from pipeline.runs.evaluate import ScoreRequest
from pipeline.runs.grid import parse_grid
from pipeline.runs.sample import SampleRequest
from pipeline.sampling.generation import usual_generation
from pipeline.storage.runs import Run
from pipeline.training.combinations import check_sampling, check_training
from tests.kit import trainer
from tests.kit.commands import Typed
from tests.kit.experiments import TINY


def experiment(**sections: Any) -> Experiment:
    return experiment_from({"diffusion": {"schedule": "cosine"}, **sections})


# Where sampling starts


@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 5), ("leading", 10), ("quad", 10), ("quad", 50), ("quad", 1000)]
)
def test_a_start_short_of_the_prior_is_warned_of(spacing: str, steps: int) -> None:
    """cosine, T = 1000: abar is 0.02 and more at the first step that is visited, though abar_T is 2.4e-9."""
    chosen = experiment(sampling={"steps": steps, "spacing": spacing})
    start = timestep_subset(1000, steps, spacing)[-1]
    (warning,) = check_training(chosen)
    assert f"start at t={start} " in warning
    abar = float(BetaSchedule.named("cosine", 1000).alphas_cumprod[start])
    assert abar > 0.01
    assert f"abar = {abar:.3g}" in warning


@pytest.mark.parametrize(
    ("spacing", "steps", "schedule", "T"),
    [
        ("trailing", 1, "cosine", 1000),
        ("linspace", 10, "cosine", 1000),
        ("leading", 1000, "cosine", 1000),  # all of them
        ("quad", 50, "linear", 1000),  # DDIM's own choice on CIFAR-10: linear has abar 0.0017 at 0.8 T
    ],
)
def test_a_start_at_the_prior_is_not(spacing: str, steps: int, schedule: str, T: int) -> None:
    diffusion = {"schedule": schedule, "num_timesteps": T}
    assert (
        check_training(experiment_from({"diffusion": diffusion, "sampling": {"steps": steps, "spacing": spacing}}))
        == ()
    )


def test_a_schedule_that_never_reaches_the_prior_says_so_once() -> None:
    diffusion = {"schedule": "linear_raw", "num_timesteps": 50}
    (warning,) = check_training(
        experiment_from({"diffusion": diffusion, "sampling": {"steps": 10, "spacing": "leading"}})
    )
    assert "degenerate" in warning


@pytest.mark.parametrize("spacing", ["leading", "quad"])
def test_one_step_that_is_the_last_of_all_is_refused(spacing: str) -> None:
    assert timestep_subset(1000, 1, spacing) == (0,)
    chosen = experiment(sampling={"steps": 1, "spacing": spacing})
    with pytest.raises(UsageError, match=f"'{spacing}' with 1 step is t = 0 alone.*trailing"):
        check_sampling(chosen, chosen.sampling)


# Which steps, and what they are called


@pytest.mark.parametrize(("asked", "calls", "spacing"), [(2, 2, "quad"), (20, 20, "quad"), (1000, 688, "quad_of_1000")])
def test_quad_is_known_by_the_steps_that_are_taken(asked: int, calls: int, spacing: str) -> None:
    """floor(linspace(0, sqrt(800), S)^2) by itself; of 1000 the first 624 lie closer than 1 to the next, on 312 indices."""
    expected = sorted({4 * 1000 * i * i // (5 * (asked - 1) ** 2) for i in range(asked)})
    assert len(expected) == calls
    made = usual_generation(experiment(sampling={"steps": asked, "spacing": "quad"}))
    assert (made.steps, made.nfe, made.spacing) == (calls, calls, spacing)


def test_two_subsets_of_as_many_steps_have_two_names() -> None:
    """What is kept under an identity is never taken for images of other steps."""
    by_steps: dict[int, set[tuple[tuple[int, ...], str]]] = {}
    for asked in range(2, 300):
        made = usual_generation(
            experiment_from({"diffusion": {"num_timesteps": 300}, "sampling": {"steps": asked, "spacing": "quad"}})
        )
        by_steps.setdefault(made.steps, set()).add((timestep_subset(300, asked, "quad"), made.spacing))
    assert any(len(subsets) > 1 for subsets in by_steps.values())
    for subsets in by_steps.values():
        assert len({spacing for _, spacing in subsets}) == len(subsets)


def test_ancestral_takes_all_steps_unless_told_otherwise_in_a_file_as_on_the_command_line() -> None:
    of_file = experiment(sampling={"sampler": "ancestral"})
    assert (of_file.sampling.steps, of_file.sampling.num_steps(1000)) == (None, 1000)
    assert experiment_from(of_file.to_dict()) == of_file
    on_command_line, _ = SampleRequest(sampler="ancestral").settings(experiment())
    assert on_command_line.num_steps(1000) == 1000
    assert experiment(sampling={"sampler": "ancestral", "steps": 250}).sampling.num_steps(1000) == 250
    assert experiment().sampling.num_steps(1000) == 50


def test_naming_the_runs_own_sampler_leaves_its_steps() -> None:
    own = experiment(sampling={"sampler": "ancestral", "steps": 250}, diffusion={"variance": "fixed_small"})
    assert SampleRequest(sampler="ancestral").settings(own) == SampleRequest().settings(own)


@pytest.mark.parametrize(
    ("own", "other", "steps"),
    [
        ({"sampler": "ancestral"}, "ddim", 50),  # all T, as an imported run has it
        ({"sampler": "ancestral", "steps": 1000}, "dpm_solver", 50),  # as the ddpm-* presets
        ({"sampler": "ddim", "steps": 20}, "ancestral", None),
    ],
)
def test_another_sampler_does_not_take_the_steps_of_the_runs_own(
    own: dict[str, Any], other: str, steps: int | None, tmp_path: Path
) -> None:
    run = experiment(sampling=own)
    assert SampleRequest(sampler=other).settings(run)[0].steps == steps
    assert [p.settings(run)[0].steps for p in parse_grid(f"sampler={other}", ScoreRequest())[1]] == [steps]
    assert with_overrides(run, [f"sampling.sampler={other}"]).sampling.steps == steps
    assert load(tmp_path, json.dumps({"sampling": own}), f"sampling.sampler={other}").sampling.steps == steps
    for told in ([f"sampling.sampler={other}", "sampling.steps=7"], [f"sampling={{sampler: {other}, steps: 7}}"]):
        assert with_overrides(run, told).sampling.steps == 7
    assert with_overrides(run, [f"sampling.sampler={run.sampling.sampler}"]) == run
    assert with_overrides(run, [f"sampling.sampler={other}"]).hash("") == run.hash("")


# A setting that nothing reads


def load(tmp_path: Path, text: str, *overrides: str) -> Experiment:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_experiment(path, overrides)


def test_an_eta_that_its_sampler_does_not_read_is_refused(tmp_path: Path) -> None:
    told = "sampling.eta: got 0.5, which is ddim's; the sampler is 'dpm_solver'"
    with pytest.raises(UsageError, match=told):
        load(tmp_path, "sampling: {sampler: dpm_solver, eta: 0.5}")
    with pytest.raises(UsageError, match=told):
        load(tmp_path, "sampling: {sampler: dpm_solver}", "sampling.eta=0.5")
    assert load(tmp_path, "sampling: {sampler: dpm_solver, eta: 0}").sampling.eta == 0
    assert load(tmp_path, "sampling: {eta: 0.5}").sampling.eta == 0.5


def test_the_eta_of_a_file_for_ddim_waits_while_another_sampler_is_tried(tmp_path: Path) -> None:
    text = "sampling: {sampler: ddim, eta: 1.0}"
    tried = load(tmp_path, text, "sampling.sampler=dpm_solver")
    assert usual_generation(tried).eta == 0
    settings, _ = SampleRequest(sampler="dpm_solver").settings(load(tmp_path, text))
    assert settings.sampler == "dpm_solver"


# The commands


@pytest.fixture
def run(home: Path) -> Run:
    return trainer.make_run(home, diffusion={"schedule": "cosine", "num_timesteps": 1000}, sampling={"batch_size": 100})


def test_sample_and_evaluate_say_what_may_disappoint(typed: Typed, run: Run) -> None:
    few = ["--sampler", "ancestral", "--steps", "10"]
    for command in ("sample", "evaluate"):
        code, out, err = typed(command, run.id, *few, "--dry-run", "--json")
        assert (code, err.count("warning:")) == (0, 1), err
        assert "fixed_large over 10 of 1000 steps" in err
        json.loads(out)  # which it leaves alone
        assert "warning" not in typed(command, run.id, "--steps", "10", "--dry-run")[2]
    assert "abar" in typed("sample", run.id, "--spacing", "leading", "--steps", "10", "--dry-run")[2]
    # bits/dim are not sampled
    assert "warning" not in typed("evaluate", run.id, *few, "--metrics", "bpd", "--dry-run")[2]


def test_a_grid_says_it_of_each_point_once(typed: Typed, run: Run) -> None:
    code, _, err = typed("evaluate", run.id, "--grid", "sampler=ddim,ancestral steps=10,20,1000", "--dry-run")
    assert code == 0
    lines = [line for line in err.splitlines() if "warning:" in line]
    assert [line.split(": ")[1] for line in lines] == ["sampler ancestral, steps 10", "sampler ancestral, steps 20"]


def test_one_label_for_both_ends_of_a_passage_is_asked_for(typed: Typed, home: Path) -> None:
    made = trainer.make_run(
        home,
        model=TINY["model"] | {"class_conditional": True},
        training=TINY["training"] | {"label_dropout": 0.0},
    )
    code, _, err = typed("sample", made.id, "--interpolate", "5", "6", "--dry-run")
    assert (code, "--label CLASS" in err, err.count("\n")) == (2, True, 1)
    assert typed("sample", made.id, "--interpolate", "5", "6", "--label", "7", "--dry-run")[0] == 0
    code, _, err = typed("sample", made.id, "--interpolate", "5", "6", "--label", "balanced", "--dry-run")
    assert (code, "one label" in err) == (2, True)
