"""Scores while training, and the best checkpoint by them: what is kept is what the recorded curve says, wherever a kill falls."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import experiment_from
from pipeline.console import Console
from pipeline.data.labels import NO_CLASSES
from pipeline.errors import UsageError
from pipeline.metrics.score_table import score_lines
from pipeline.runs.conclude import best_lines
from pipeline.runs.evaluate import ScoreRequest, score_run
from pipeline.storage import judgements
from pipeline.storage.judgements import FILE, best_first, curve
from pipeline.storage.retention import read_which
from pipeline.storage.run_checkpoints import RunCheckpoints, Saver
from pipeline.storage.runs import Run
from pipeline.training.device import Compute
from pipeline.training.loop import TrainState
from pipeline.training.models import build_model
from pipeline.training.team import Team
from pipeline.training.trained import Trained, experiment_of
from pipeline.worker import worker as worker_module
from pipeline.worker.preview import Preview
from pipeline.worker.worker import Worker
from tests.kit.experiments import TINY
from tests.kit.forks import PROCESSES, run_team
from tests.kit.trainer import Alone, copied, final_digests, job_of, make_run, train

STEPS, EVERY, MILESTONE = 10, 2, 5
SMALL: dict[str, Any] = {
    "model": TINY["model"] | {"channels": 8, "channel_multipliers": [1], "attention_resolutions": []},
    "training": {"steps": STEPS, "batch_size": 16, "warmup_steps": 2, "ema_decay": 0.5, "learning_rate": 0.01},
    "diffusion": {"num_timesteps": 30},
    "sampling": {"steps": 2, "batch_size": 4},
}
SCORED: dict[str, Any] = SMALL | {
    "checkpoint": {"every_steps": 3, "every_minutes": None, "keep_best": {"n": 2}, "milestones": [MILESTONE]},
    "evaluation": {"every_steps": EVERY, "early_images": 12},
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("calm"), **SCORED)
    assert train(str(run.folder)) == "finished"
    return run


def kept_steps(run: Run) -> set[int]:
    return {checkpoint.step for checkpoint in RunCheckpoints(run).committed()}


def curve_of(run: Run) -> list[tuple[int, float]]:
    return [(scored.step, scored.value) for scored in curve(run.folder, "kid")]


def expected_steps(run: Run) -> set[int]:
    """Return what is to be kept, from the lines of the file alone: the newest two, the best two, the milestone."""
    lines = [json.loads(line) for line in (run.folder / FILE).read_text().splitlines()]
    values = {line["step"]: line["values"]["kid_classifier_n12"] for line in lines}
    assert sorted(values) == [2, 4, 6, 8, 10]
    return {9, STEPS, MILESTONE, *sorted(values, key=lambda step: values[step])[:2]}


def test_the_best_the_milestones_and_the_newest_are_kept_and_the_weights_are_those_without_scores(calm, tmp_path):
    assert kept_steps(calm) == expected_steps(calm)
    plain = make_run(tmp_path, **SMALL, checkpoint={"every_steps": 3, "every_minutes": None})
    assert train(str(plain.folder)) == "finished"
    assert final_digests(plain) == final_digests(calm)
    assert kept_steps(plain) == {9, STEPS}
    with pytest.raises(UsageError, match=r"has no best checkpoint: got no kid of a step, .*; train with -s evaluation"):
        Trained.from_run(plain, "best")


def test_the_best_is_the_lowest_recorded_value_and_says_of_how_many(calm):
    first, *_ = best_first(calm.folder, "kid")
    trained = Trained.from_run(calm, "best")
    assert (trained.step, trained.selection) == (first.step, "best of 5 by kid_classifier_n12")
    (line,) = best_lines(calm, experiment_of(calm))
    assert f"step {first.step} is the best of 5 by kid_classifier_n12; score it with: " in line
    assert f"ddpm-pipe evaluate {calm.id} --checkpoint best" in line
    assert first.value == min(scored.value for scored in curve(calm.folder, "kid"))
    assert Trained.from_run(calm).selection == Trained.from_run(calm, MILESTONE).selection == "last"


class Killed(BaseException):
    """The end of a process, at one point of its code."""


def before(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise Killed


def after(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    original(*args, **kwargs)
    raise Killed


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function: let a call number `count` of a function end the process, before or after it did its work."""

    def arm(owner: Any, name: str, when: Callable[..., Any], count: int) -> None:
        original, calls = getattr(owner, name), []

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return when(original, *args, **kwargs) if len(calls) == count else original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    return arm


@pytest.mark.parametrize(
    ("owner", "name", "when"),
    [
        (Saver, "save", after),
        (worker_module, "early_score", before),
        (worker_module, "note", after),
        (RunCheckpoints, "prune", before),
    ],
    ids=["saved", "unscored", "recorded", "unpruned"],
)
def test_what_is_kept_is_what_the_curve_says_wherever_a_kill_falls(
    calm, tmp_path, killed_at, monkeypatch, owner, name, when
):
    run = make_run(tmp_path, **SCORED)
    killed_at(owner, name, when, 3)
    with pytest.raises(Killed):
        Worker(job_of(run), Team(), Alone()).work()
    monkeypatch.undo()
    assert train(str(run.folder)) == "finished"
    assert curve_of(run) == curve_of(calm)
    assert kept_steps(run) == expected_steps(run)
    assert final_digests(run) == final_digests(calm)


@pytest.mark.all
@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_is_what_the_curve_says_after_real_kills(calm: Run, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    run = make_run(tmp_path, **SCORED)
    for _ in range(6):
        process = PROCESSES.Process(target=train, args=(str(run.folder),))
        process.start()
        process.join(chance.uniform(0.5, 4))
        if process.exitcode is None:
            process.kill()
            process.join()
    assert train(str(run.folder)) == "finished"
    assert curve_of(run) == curve_of(calm), f"seed {seed}"
    assert kept_steps(run) == expected_steps(run), f"seed {seed}"
    assert final_digests(run) == final_digests(calm), f"seed {seed}"


def generated(team: Team) -> torch.Tensor:
    """Return the images of a score by new weights, as one of the workers of a team has them."""
    experiment = experiment_from(SCORED)
    compute = Compute(torch.device("cpu"), "gloo", threads=1)
    compute.start()
    model = build_model(experiment, (1, 8, 8))
    train_state = TrainState.create(model, experiment.training, experiment.diffusion.num_timesteps, compute)
    preview = Preview(experiment, (1, 8, 8), NO_CLASSES)
    preview.copy(train_state)
    images, _ = preview.scored_images(10, compute, team)
    return images


def be_a_worker(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(generated(Team.join(60)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_workers_share_the_images_of_a_score_and_have_those_of_one(tmp_path: Path) -> None:
    run_team(be_a_worker, (2, str(tmp_path)), 2)
    alone = generated(Team())
    assert len({image.numpy().tobytes() for image in alone}) == 10
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone)


def test_a_stop_leaves_the_score_of_its_step_to_the_resumed_run(calm, tmp_path):
    run = make_run(tmp_path, **SCORED)
    assert train(str(run.folder), stop_after=4) == "stopped"
    assert [scored.step for scored in curve(run.folder, "kid")] == [2]
    assert train(str(run.folder)) == "finished"
    assert curve_of(run) == curve_of(calm)


def test_scores_of_the_best_say_how_it_was_chosen_and_have_other_seeds(calm: Run) -> None:
    profile, quiet = Profile(threads_per_worker=1), Console(io.StringIO())
    found = score_run(calm, ScoreRequest(checkpoint="best", metrics=("kid", "bpd"), num_images=130), profile, quiet)
    assert found.scored is not None
    assert found.measured is not None
    (identity,) = found.scored.scores.identities.values()
    chosen = "best of 5 by kid_classifier_n12"
    assert identity.generation.selection == found.measured.identity.to_json()["selection"] == chosen
    assert found.scored.label.endswith("_best")
    assert found.measured.label.endswith("_best")
    line = json.loads((calm.folder / FILE).read_text().splitlines()[0])
    (curve_identity,) = line["identities"].values()
    assert curve_identity["generation"]["seed"] != identity.generation.seed == 0
    for lines in (score_lines(found.scored.scores), found.measured.lines()):
        assert f"biased: this checkpoint is the {chosen}" in "\n".join(lines)
    last = score_run(calm, ScoreRequest(metrics=("kid",), num_images=130), profile, quiet)
    assert last.scored is not None
    assert last.scored.label == ""
    assert "biased" not in "\n".join(score_lines(last.scored.scores))


def test_scores_of_another_kind_do_not_choose_and_a_line_cut_short_is_none(tmp_path):
    def note(step: int, value: float, kind: str = "a") -> None:
        identity = {"metric": "kid", "extractor": kind}
        line = {"rung": None, "step": step, "checkpoint": f"step-{step}", "values": {"kid_x": value}}
        judgements.note(tmp_path, line | {"identities": {"kid_x": identity}})

    note(1, 0.1, kind="b")
    note(2, 0.5)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"rung": null, "st')
    note(3, 0.7)
    note(2, 0.6)  # made again, from an earlier checkpoint
    note(4, float("nan"))
    assert [(scored.step, scored.value) for scored in best_first(tmp_path, "kid")] == [(2, 0.6), (3, 0.7)]
    assert best_first(tmp_path, "fid") == []


def test_a_best_that_is_not_kept_is_one_clear_line(calm, tmp_path):
    run = copied(calm, tmp_path)
    best = Trained.from_run(run, "best").step
    for checkpoint in RunCheckpoints(run).committed():
        if checkpoint.step == best:
            (checkpoint.folder / "MANIFEST.json").unlink()
    with pytest.raises(
        UsageError, match=rf"step {best} is the best by kid_classifier_n12, but its checkpoint is not kept"
    ):
        Trained.from_run(run, "best")


def test_a_score_to_keep_by_needs_scores_and_a_checkpoint_is_named_by_step_or_word():
    with pytest.raises(UsageError, match=r"checkpoint.keep_best: got a score .*; set evaluation.every_steps"):
        experiment_from(TINY | {"checkpoint": {"keep_best": {"n": 1}}})
    assert [read_which(text) for text in ("latest", "best", "12")] == [None, "best", 12]
    for text in ("newest", "-1", "1.5"):
        with pytest.raises(ValueError, match=text):
            read_which(text)
