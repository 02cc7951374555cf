"""The share of a training's time that went into steps which count, and what restarts cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.runs.goodput import _figures
from tests.kit.commands import Typed
from tests.kit.experiments import tiny_experiment, write_yaml
from tests.kit.trainer import only_run


def log(*lines: tuple[float, str]) -> list[str]:
    """Lines of a run's log, by the second of the day."""
    return [f"2026-01-01T00:{int(t) // 60:02d}:{int(t) % 60:02d}.000000+00:00 {text}" for t, text in lines]


def test_an_undisturbed_training_pays_for_its_start_alone() -> None:
    lines = log(
        (0, "training begins"),
        (1, "attempt 1: 1 worker"),
        (10, "attempt 1 starts at step 0 from new weights"),
        (60, "step 50/100  loss 0.1"),
        (110, "step 100/100  loss 0.1"),
        (110, "attempt 1 ended at step 100"),
    )
    assert _figures(lines, 99.0) == {"goodput": 0.9, "steps_lost": 0, "recovery_s": 0.0, "restarts": 0}


def test_a_failure_costs_its_steps_and_the_way_back_and_a_pause_is_nobodys_time() -> None:
    lines = log(
        (0, "training begins"),
        (10, "attempt 1 starts at step 0 from new weights"),
        (60, "step 50/100  loss 0.1"),
        (65, "attempt 1 ended at step 57"),  # it had saved step 40
        (65, "attempt 1 failed: killed"),
        (80, "attempt 2 starts at step 40 from checkpoint"),
        (90, "step 50/100  loss 0.1"),
        (100, "step 60/100  loss 0.1"),  # the driver is killed, too, and nobody trains for 20 minutes
        (1300, "training begins"),
        (1305, "attempt 3 starts at step 60 from checkpoint"),
        (1345, "step 100/100  loss 0.1"),
        (1345, "attempt 3 ended at step 100"),
    )
    # 100 s and 45 s of work
    assert _figures(lines, 72.5) == {"goodput": 0.5, "steps_lost": 17, "recovery_s": 15.0 + 5.0, "restarts": 2}


@pytest.mark.parametrize("lines", [[], ["no time training begins"], log((0, "training begins"))])
def test_a_log_that_says_nothing_is_no_error(lines: list[str]) -> None:
    assert _figures(lines, 1.0) == {"goodput": 0.0, "steps_lost": 0, "recovery_s": 0.0, "restarts": 0}


@pytest.mark.slow
def test_a_trainings_record_has_it_and_a_resume_goes_on_counting(home: Path, typed: Typed) -> None:
    name = write_yaml(home / "tiny.yaml", tiny_experiment(training={"steps": 10}))
    code, stdout, stderr = typed("train", name, "--json")
    assert code == 0, stderr
    first = json.loads(stdout)
    assert (first["restarts"], first["steps_lost"], 0 < first["goodput"] <= 1) == (0, 0, True)
    run = only_run(home)
    useful_s = json.loads(next(run.checkpoints.glob("step-*10-1/state.json")).read_text())["useful_s"]
    assert 0 < useful_s < first["training_s"] + 0.01
    run.log("step 13/20  loss 0.1")  # as if it had been killed three steps later
    code, stdout, stderr = typed("resume", run.id, "-s", "training.steps=20", "--json")
    assert code == 0, stderr
    second = json.loads(stdout)
    assert (second["restarts"], second["steps_lost"], second["recovery_s"] > 0) == (1, 3, True)
    assert only_run(home).state().goodput["steps_lost"] == 3
    assert json.loads(typed("runs", "--json").stdout)[0]["goodput"] == pytest.approx(second["goodput"], abs=1e-3)
