"""What the driver of a sweep keeps and decides while trials run: room, time, judgements on the way, and how a trial ended."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.cluster.nodes import resource_of_this_node
from pipeline.cluster.pool import runner_of
from pipeline.config.cluster_profile import Profile, Resources
from pipeline.config.experiment import DataConfig, KeepBestConfig, load_experiment
from pipeline.config.presets import find
from pipeline.console import Console
from pipeline.data.shards import Dataset
from pipeline.errors import RefusedError
from pipeline.ingest.ingest import ensure_ingested, held_out_location
from pipeline.metrics.fid import Moments, frechet_distance, kid_with_error
from pipeline.metrics.metric_identity import MetricIdentity
from pipeline.metrics.scoring import early_score, early_scorer, scorer_of
from pipeline.runs.record import Trial
from pipeline.sampling.generation import usual_generation
from pipeline.storage.folder import RunStatus
from pipeline.storage.judgements import FILE, note, values_by_rung
from pipeline.storage.runs import Run
from pipeline.sweeps.config import EarlyStopping, plain_base, sweep_from, trial_experiment
from pipeline.sweeps.driver import Room, SweepDriver
from pipeline.sweeps.folder import SECONDS, SweepFolder
from pipeline.sweeps.plan import SweepRequest, make_sweep_plan
from pipeline.sweeps.points import title
from pipeline.sweeps.search import Next
from pipeline.sweeps.trial import VERDICT_FILE, ForTrials, carry_out, stop_early
from pipeline.sweeps.tune import _scheduler
from pipeline.tracking.tracker import TrackingSettings
from pipeline.training.device import sampling_compute
from tests.pipeline.sweeps.swept_entries import entry

POINTS = [{"diffusion.schedule": name} for name in ("linear", "cosine", "sigmoid")]


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    space = {"diffusion.schedule": ["linear", "cosine", "sigmoid"]}
    sweep = sweep_from({"base": "digits", "space": space, "budget": {"steps": 100}})
    base = plain_base(sweep)
    about = {"path": "", "fingerprint": "images", "name": "digits"}
    return SweepFolder.create(tmp_path, sweep, base, base, about, Profile().to_dict(), ["ddpm-pipe", "sweep"])


def for_trials(profile: Profile) -> ForTrials:
    return ForTrials("fid", {}, (), TrackingSettings("sqlite:///nowhere.db"), ".", {}, profile)


def key_of(following: Next) -> str:
    return title(following.point)


def begun(folder: SweepFolder, following: Next, dataset: dict[str, Any] | None = None) -> Run:
    key = key_of(following)
    experiment = trial_experiment(folder.sweep, folder.base, following.point, following.seed)
    trial = Trial(folder.id, key, following.point, key, following.seed)
    return Run.create(
        folder.folder.parent.parent,
        name=key,
        experiment=experiment.to_dict(),
        config_hash=experiment.hash(""),
        dataset=dataset or folder.record.dataset,
        profile={},
        command=["ddpm-pipe", "train"],
        trial=trial.to_json(),
    )


def driver_of(folder: SweepFolder, room: int, *, early_stopping: bool = False) -> tuple[SweepDriver, io.StringIO]:
    sweep = folder.sweep.model_copy(update={"early_stopping": EarlyStopping() if early_stopping else None})
    asked, said = SweepRequest(sweep, folder.base, Profile()), io.StringIO()
    plan = make_sweep_plan(asked, "here", 1797, (1, 8, 8))
    driver = SweepDriver(folder, asked, plan, for_trials(Profile()), None, Console(said))
    driver.room = lambda: room  # type: ignore[assignment]
    return driver, said


def test_no_more_trials_are_started_than_there_is_room_for(folder: SweepFolder) -> None:
    driver, _ = driver_of(folder, room=2)
    assert isinstance(driver.suggest("a"), Run)
    assert isinstance(driver.suggest("b"), Run)
    assert driver.suggest("c") is None
    assert driver.waits()
    driver.room = lambda: 3  # type: ignore[assignment] # the cluster has grown
    assert isinstance(driver.suggest("c"), Run)


def test_no_folder_is_made_for_a_finished_trial_whose_own_is_gone(folder: SweepFolder) -> None:
    driver, _ = driver_of(folder, room=3)
    for point, value in zip(POINTS, (1.0, None), strict=False):
        folder.ledger.append(replace(entry(point, 0, value), key=driver.key_of(Next(point, 0))))
    driver, _ = driver_of(folder, room=3)
    run = driver.suggest("a")
    assert isinstance(run, Run)
    assert [found.record.name for found in Run.all(folder.folder.parent.parent)] == ["cosine-seed0"]  # it failed


def test_a_trial_takes_what_this_driver_gives_and_not_what_it_was_started_with(
    folder: SweepFolder, tmp_path: Path
) -> None:
    location = ensure_ingested(DataConfig(), tmp_path / "datasets").location
    about = {"path": location, "fingerprint": Dataset.open(location).manifest.fingerprint, "name": "digits"}
    run = begun(folder, Next(POINTS[0], 0), about)
    told: list[dict[str, Any]] = []
    carry_out(run, for_trials(Profile(workers=5)), told.append)  # of a record that has one worker
    (end,) = told
    assert end["status"] == "failed"
    assert "5 workers cannot share num_streams" in end["reason"]


def test_a_trial_that_was_stopped_early_is_not_resumed_by_the_next_driver(folder: SweepFolder) -> None:
    run = begun(folder, Next(POINTS[0], 0))
    stop_early(run, 0.5)
    run.update(status=RunStatus.INTERRUPTED, step=50)  # its driver was killed before the ledger had it
    told: list[dict[str, Any]] = []
    carry_out(run, for_trials(Profile()), told.append)
    assert told == [{"status": "stopped"}]
    state = run.state()
    assert (state.status, state.step) == (RunStatus.KILLED, 50)
    assert state.reason == "stopped early at step 50: others were better by then"


@pytest.mark.ray
def test_a_verdict_is_kept_as_it_is_made(folder: SweepFolder, ray_session: Any) -> None:
    driver, _ = driver_of(folder, room=3, early_stopping=True)
    good, bad = driver.suggest("a"), driver.suggest("b")
    assert isinstance(good, Run)
    assert isinstance(bad, Run)
    scheduler = _scheduler(driver)
    for name, value in (("a", 1.0), ("b", 2.0)):
        shown = {"rung": 0.5, "value": value, "control": "nobody"}
        assert scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), shown) == "CONTINUE"
    assert not (good.folder / VERDICT_FILE).exists()
    assert (bad.folder / VERDICT_FILE).is_file()


def test_tpe_resumes_first_what_an_earlier_driver_left(tmp_path: Path) -> None:
    space = {"training.learning_rate": {"log": [1e-4, 1e-2]}}
    sweep = sweep_from({"space": space, "budget": {"steps": 10}, "search": "tpe", "num_points": 5})
    base, about = plain_base(sweep), {"path": "", "fingerprint": "images", "name": "digits"}
    folder = SweepFolder.create(tmp_path, sweep, base, base, about, Profile().to_dict(), ["ddpm-pipe", "sweep"])
    failed, saved, done = ({"training.learning_rate": rate} for rate in (1e-3, 2e-3, 3e-3))
    begun(folder, Next(failed, 0))
    begun(folder, Next(saved, 0))
    folder.ledger.append(entry(failed, 0, None))
    folder.ledger.append(entry(done, 0, 1.0))
    asked = SweepRequest(sweep, base, Profile())
    plan = make_sweep_plan(asked, "here", 1797, (1, 8, 8))
    trials = SweepDriver(folder, asked, plan, for_trials(Profile()), None, Console(io.StringIO())).trials
    assert trials.has_next()
    found = []
    while isinstance(following := trials.next(), Next):
        found.append(following.point)
        trials.ended(following, "finished", 1.0, {})
    assert found[:2] == [failed, saved]
    assert len(found) == 4  # and two more are drawn, of five
    assert done not in found


@pytest.mark.ray
def test_a_trial_that_is_stopped_alone_is_reported_as_failed(folder: SweepFolder, ray_session: Any) -> None:
    driver, said = driver_of(folder, room=3)
    for name in "abc":
        driver.suggest(name)
    driver.end("a", {"status": "interrupted", "reason": "stopped, saved at step 30"}, None)
    (entry,) = folder.ledger.entries().values()
    assert (entry.status, entry.title) == ("failed", "linear")
    assert entry.reason == "stopped alone: stopped, saved at step 30"
    assert "linear, seed 0: stopped alone" in said.getvalue()
    driver.interrupted = True  # the sweep itself is asked to stop: it goes on with this trial later
    driver.end("b", {"status": "interrupted", "reason": "stopped, saved at step 30"}, None)
    assert len(folder.ledger.entries()) == 1


@pytest.mark.ray
def test_what_a_trial_showed_before_its_process_was_killed_counts(folder: SweepFolder, ray_session: Any) -> None:
    driver, _ = driver_of(folder, room=3, early_stopping=True)
    run = driver.suggest("a")
    assert isinstance(run, Run)
    note(run.folder, {"rung": 0.5, "values": {"kid_x": 0.25}, "identities": {"kid_x": {"metric": "kid"}}})
    driver.end("a", {}, "its process was killed")
    (entry,) = folder.ledger.entries().values()
    assert entry.rungs == {0.5: 0.25}


@pytest.mark.ray
def test_the_room_is_what_the_ray_that_is_up_holds(ray_session: Any) -> None:
    def room(cpus: float, workers: int, wanted: int) -> int:
        profile = Profile(workers=workers, resources_per_worker=Resources(CPU=cpus))
        return Room(profile, workers, wanted)()

    assert room(1, 1, 4) == 2  # of two CPUs
    assert room(0.5, 1, 3) == 3
    assert room(1, 2, 4) == 1
    assert room(2, 2, 4) == 1  # for which there is no room now; it waits
    assert ray_session.cluster_resources()[resource_of_this_node()] == 1


@pytest.mark.ray
def test_a_trial_that_holds_no_gpu_leaves_it_to_ray_which_one_scores(ray_session: Any) -> None:
    profile = Profile(resources_per_worker=Resources(CPU=1, GPU=1))
    # computed in this process, it would take a GPU that is not its own; there is none on a machine of CPUs, which is told at once
    assert list(runner_of(profile)(lambda indices: {}, {})) == []  # type: ignore[arg-type]


def test_the_time_of_all_drivers_counts(folder: SweepFolder) -> None:
    folder.update(summary={SECONDS: 100.0, "best_fid": 1.0})  # of a driver that was killed
    assert folder.seconds == 100.0
    folder.begin()
    folder.tick()
    summary = SweepFolder(folder.folder).state().summary
    assert summary[SECONDS] > 100.0
    assert summary["best_fid"] == 1.0


def test_judgements_on_the_way_survive_a_kill(tmp_path: Path) -> None:
    assert values_by_rung(tmp_path) == {}
    for rung, value in (
        (0.25, 0.5),
        (0.5, 0.4),
        (0.25, 0.3),
        (None, 0.2),
    ):  # taken again, from an earlier checkpoint; for the curve alone
        values = {"kid_x": value, "fid_x": 9.0}
        note(tmp_path, {"rung": rung, "values": values, "identities": {name: {"metric": name[:3]} for name in values}})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"rung": 0.75, "val')
    assert values_by_rung(tmp_path) == {0.25: 0.3, 0.5: 0.4}


def test_an_early_score_says_what_it_is_and_how_far_it_scatters(tmp_path: Path) -> None:
    experiment = load_experiment(find("experiments", "digits"))
    location = ensure_ingested(DataConfig(), tmp_path / "datasets").location
    dataset, compute = Dataset.open(location), sampling_compute(Profile(threads_per_worker=1))
    images = np.random.RandomState(0).randint(0, 256, (256, 1, 8, 8), dtype=np.uint8)
    generation = usual_generation(experiment)
    early = early_scorer(experiment, dataset, tmp_path, 256, compute)
    found = early_score(early, images, generation)
    scorer = scorer_of(dataset, experiment.evaluation, tmp_path, download=False)
    judged = scorer.extractor(images)
    value, error = kid_with_error(scorer.reference.real.features, judged.features)
    fid = frechet_distance(scorer.reference.moments, Moments.of(judged.features))
    assert found.values == pytest.approx({"kid_classifier_n256": value, "fid_classifier_n256": fid}, rel=1e-6)
    spread, identity = found.spreads["kid_classifier_n256"], found.identities["kid_classifier_n256"]
    assert isinstance(identity, MetricIdentity)
    assert spread.standard_error == pytest.approx(error, rel=1e-6)
    assert (identity.num_images, identity.generation) == (256, generation)
    assert identity.extractor_sha256 == scorer.extractor.sha256
    assert set(found.flat()) == {"kid_classifier_n256", "kid_se_classifier_n256", "fid_classifier_n256"}
    assert set(early_score(early, images[:20], generation).values) == {"kid_classifier_n20"}  # FID would be mostly bias


def test_an_early_score_compares_with_images_that_validate_where_there_are_enough(tmp_path: Path) -> None:
    digits = load_experiment(find("experiments", "digits"), ["validation.holdout=0.5"])
    dataset = Dataset.open(ensure_ingested(DataConfig(), tmp_path / "datasets").location)
    compute = sampling_compute(Profile(threads_per_worker=1))
    for holdout, split in ((0.5, "held out of train"), (0.02, "train")):
        trained = ensure_ingested(DataConfig(), tmp_path / "datasets", holdout=holdout)
        held_out = Dataset.open(held_out_location(trained.location))
        early = early_scorer(digits, dataset, tmp_path, 20, compute, held_out)
        of = held_out if holdout == 0.5 else dataset
        assert (early.reference.split, early.reference.dataset) == (split, of.manifest.fingerprint)


def test_the_best_by_fid_needs_enough_images(tmp_path: Path) -> None:
    experiment = load_experiment(find("experiments", "digits"))
    keep = experiment.checkpoint.model_copy(update={"keep_best": KeepBestConfig(metric="fid")})
    experiment = experiment.model_copy(update={"checkpoint": keep})
    dataset = Dataset.open(ensure_ingested(DataConfig(), tmp_path / "datasets").location)
    with pytest.raises(RefusedError, match=r"keep_best.metric: got fid, which needs \d+ images, and 20 are scored"):
        early_scorer(experiment, dataset, tmp_path, 20, sampling_compute(Profile(threads_per_worker=1)))
