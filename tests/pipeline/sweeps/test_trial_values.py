"""Which of the scores in a trial's folder are the trial's own: those of its model as it is now, made and judged as the sweep asks."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, SamplingConfig, load_experiment
from pipeline.config.presets import find
from pipeline.console import Console
from pipeline.metrics.metric_identity import BoundIdentity, Generation, MetricIdentity
from pipeline.runs.record import Trial
from pipeline.sampling.generation import usual_generation
from pipeline.storage.folder import RunStatus
from pipeline.storage.runs import Run
from pipeline.sweeps.config import base_experiment, plain_base, sweep_from, trial_experiment
from pipeline.sweeps.driver import SweepDriver
from pipeline.sweeps.entry import entry_of, scores_of
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.plan import SweepRequest, make_sweep_plan
from pipeline.sweeps.trial import ForTrials
from pipeline.tracking.tracker import TrackingSettings

JUDGED_BY = {"extractor": "classifier", "extractor_sha256": "ab12", "num_images": 128}
SETTINGS = ["seed=7", "sampling.steps=50", "sampling.eta=0"]
USUAL = Generation("ddim", 50, seed=7)
FID = MetricIdentity("fid", "", "classifier", "ab12", "none", 128, 128, "all", "images", USUAL)


@pytest.fixture
def trial(tmp_path: Path) -> Run:
    """A trial that is finished at step 200 and not scored yet."""
    experiment = load_experiment(find("experiments", "digits"), SETTINGS)
    trial = Trial("sweepabc", "key1", {"diffusion.schedule": "cosine"}, "cosine", 0)
    run = Run.create(
        tmp_path,
        name="cosine",
        experiment=experiment.to_dict(),
        config_hash=experiment.hash(""),
        dataset={"path": "", "fingerprint": "images", "name": "digits"},
        profile={},
        command=["ddpm-pipe", "train"],
        trial=trial.to_json(),
    )
    run.update(status=RunStatus.FINISHED, step=200)
    return run


@pytest.mark.parametrize("metric", ["bpd", "fid"])
def test_the_command_of_a_trial_does_again_what_it_did(home: Path, metric: str) -> None:
    sweep = sweep_from(
        {
            "base": "digits",
            "space": {"diffusion.schedule": ["cosine"]},
            "overrides": {"evaluation.metrics": ["fid", "is"], "evaluation.enabled": False},
            "budget": {"steps": 9},
            "metric": metric,
        }
    )
    base, point = base_experiment(sweep), {"diffusion.schedule": "cosine"}
    about = {"path": "", "fingerprint": "images", "name": "digits"}
    folder = SweepFolder.create(home, sweep, base, plain_base(sweep), about, Profile().to_dict(), ["ddpm-pipe"])
    experiment = trial_experiment(sweep, base, point, 0)
    asked = SweepRequest(sweep, base, Profile())
    plan = make_sweep_plan(asked, "here", 1797, (1, 8, 8))
    for_trials = ForTrials(metric, {}, (), TrackingSettings("sqlite:///nowhere.db"), ".", {}, Profile())
    driver = SweepDriver(folder, asked, plan, for_trials, None, Console(io.StringIO()))
    driver.room = lambda: 1  # type: ignore[assignment]
    run = driver.suggest("a")
    assert run is not None
    program, verb, _, preset, *words = run.record.command
    assert (program, verb, preset) == ("ddpm-pipe", "train", "digits")
    assert set(words[::2]) == {"-s"}
    assert load_experiment(find("experiments", preset), words[1::2]) == experiment


def score(run: Run, identity: MetricIdentity | BoundIdentity, value: float, step: int = 200) -> None:
    steps = identity.generation.steps if isinstance(identity, MetricIdentity) else 0
    folder = run.folder / "evaluations" / f"{value:g}-{steps}"
    folder.mkdir(parents=True)
    content = {
        "model": {"run": run.id, "step": step},
        "values": {identity.key: value},
        "identities": {identity.key: identity.to_json()},
    }
    (folder / "scores.json").write_text(json.dumps(content))


def test_the_usual_generation_is_what_the_experiment_says() -> None:
    experiment = load_experiment(find("experiments", "digits"), SETTINGS)
    assert usual_generation(experiment) == replace(USUAL, chunk=experiment.sampling.batch_size)
    ancestral = experiment.model_copy(update={"sampling": SamplingConfig(sampler="ancestral", steps=None)})
    assert usual_generation(ancestral).steps == experiment.diffusion.num_timesteps


# each would be taken for the trial's own value if that one field were not looked at
OTHERS: dict[str, dict[str, Any]] = {
    "an earlier step": {"step": 145},
    "fewer images": {"num_images": 64},
    "another extractor": {"extractor_sha256": "cd34"},
    "another split": {"dataset": "of test", "split": "test"},
    "raw weights": {"generation": {"weights": "raw"}},
    "another eta": {"generation": {"eta": 1.0}},
    "another spacing": {"generation": {"spacing": "leading"}},
    "another sampler": {"generation": {"sampler": "ancestral"}},
    "another seed": {"generation": {"seed": 8}},
    "three seeds": {"generation": {"num_seeds": 3}},
    "guided": {"generation": {"guidance_scale": 2.0}},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_value_of_something_else_is_not_the_trials(trial: Run, other: str) -> None:
    changes = dict(OTHERS[other])
    step = changes.pop("step", 200)
    generation = replace(usual(trial), **changes.pop("generation", {}))
    score(trial, replace(FID, generation=generation, **changes), 1.0, step)
    assert scores_of(trial, "fid", JUDGED_BY) == {}
    assert entry_of(trial, "fid", JUDGED_BY, "finished", {}).status == "failed"
    score(trial, replace(FID, generation=usual(trial)), 2.0)
    entry = entry_of(trial, "fid", JUDGED_BY, "finished", {})
    assert (entry.status, entry.value, entry.curve) == ("finished", 2.0, {50: 2.0})


def usual(run: Run) -> Generation:
    return usual_generation(Experiment.model_validate(run.record.experiment))


def test_other_numbers_of_network_calls_make_the_curve(trial: Run) -> None:
    for steps, value in ((10, 3.0), (50, 2.0), (20, 2.5)):
        score(trial, replace(FID, generation=replace(usual(trial), steps=steps)), value)
    assert set(scores_of(trial, "fid", JUDGED_BY)) == {10, 20, 50}
    entry = entry_of(trial, "fid", JUDGED_BY, "finished", {})
    assert (entry.value, entry.curve) == (2.0, {10: 3.0, 20: 2.5, 50: 2.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_a_failure_and_of_the_curve_it_is_left_out(trial: Run, value: float) -> None:
    score(trial, replace(FID, generation=replace(usual(trial), steps=10)), value)
    score(trial, replace(FID, generation=usual(trial)), 2.0)
    assert entry_of(trial, "fid", JUDGED_BY, "finished", {}).curve == {50: 2.0}
    score(trial, replace(FID, generation=usual(trial)), value)
    (trial.folder / "evaluations" / "2-50" / "scores.json").unlink()
    entry = entry_of(trial, "fid", JUDGED_BY, "finished", {})
    assert (entry.status, entry.value) == ("failed", None)
    assert entry.reason == f"its fid_classifier_n128 is {value}, not a finite number"


def test_bits_per_dim_are_the_trials_where_they_are_of_all_its_images(trial: Run) -> None:
    whole = BoundIdentity("bits_per_dim", "images", "train", 1797, 1797, "ema", "T=1000", 7, 100)
    score(trial, replace(whole, num_images=100), 1.0)
    score(trial, replace(whole, split="test"), 1.5)
    score(trial, replace(whole, weights="raw"), 1.75)
    assert scores_of(trial, "bpd", {}) == {}
    score(trial, whole, 2.0)
    entry = entry_of(trial, "bpd", {}, "finished", {})
    assert (entry.value, entry.metric, entry.curve) == (2.0, "bits_per_dim_train_n1797", {})
