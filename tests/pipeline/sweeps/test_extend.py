"""A sweep's record: what is added to it, what of it is the same as before, and what its winner is trained by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.cluster_profile import Profile
from pipeline.config.context import Context
from pipeline.errors import RunLockedError, UsageError
from pipeline.sweeps.commands import _result, extend, extended, request_of_winner
from pipeline.sweeps.config import Axis, base_experiment, load_sweep, plain_base, sweep_from, trial_experiment
from pipeline.sweeps.folder import SweepFolder
from pipeline.sweeps.points import Checker, active, check_all, completed, drawn, key_of
from pipeline.sweeps.report import write_report
from pipeline.sweeps.text import again
from tests.pipeline.sweeps.swept_entries import entry

MORE = {"seeds": None, "num_points": None}


def first(space: dict[str, Axis], count: int) -> list[dict[str, Any]]:
    points = drawn(space, 0)
    return [next(points) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    """A sweep over two schedules, of an experiment file in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_PIPE_HOME", str(tmp_path))
    Path("mine.yaml").write_text("training: {learning_rate: 1.0e-3, steps: 5000}\nlogging: {every_steps: 25}\n")
    sweep = sweep_from(
        {
            "base": "mine.yaml",
            "overrides": {"logging.every_steps": 100, "training.batch_size": 32},
            "space": {"diffusion.schedule": ["linear", "cosine"]},
            "budget": {"steps": 10},
            "seeds": 2,
        }
    )
    dataset = {"path": str(tmp_path), "fingerprint": "f" * 64, "name": "digits"}
    profile: dict[str, Any] = {}
    return SweepFolder.create(
        tmp_path,
        sweep,
        base_experiment(sweep),
        plain_base(sweep),
        dataset,
        profile,
        ["ddpm-pipe", "sweep", "--cluster", "gpu"],
    )


# -- random search


def test_a_further_setting_leaves_the_draws_of_the_others() -> None:
    space = {"training.learning_rate": Axis(log=(1e-4, 1e-2)), "model.channels": Axis(integer=(16, 64), step=16)}
    before, after = first(space, 20), first({"model.dropout": Axis(uniform=(0, 1)), **space}, 20)
    assert [{key: point[key] for key in space} for point in after] == before
    assert len({json.dumps(point) for point in before}) > 15


@given(st.integers(0, 100))
def test_a_further_value_changes_only_the_points_that_get_it(seed: int) -> None:
    two, three = ({"a": Axis(choice=values)} for values in (("x", "y"), ("x", "y", "z")))
    a, b = drawn(two, seed), drawn(three, seed)
    pairs = [(next(a)["a"], next(b)["a"]) for _ in range(30)]
    assert all(new in (old, "z") for old, new in pairs)
    assert 0 < sum(new == "z" for _, new in pairs) < 22  # 10 expected


def test_listed_values_are_equally_likely() -> None:
    drawn_values = [point["a"] for point in first({"a": Axis(choice=("x", "y", "z"))}, 900)]
    assert all(240 < drawn_values.count(value) < 360 for value in "xyz")  # 300 expected, standard deviation 14


# -- what an extension keeps


def test_a_further_setting_shows_what_is_done_once_with_the_value_of_the_base(folder: SweepFolder) -> None:
    before = folder.sweep
    point = {"diffusion.schedule": "cosine"}
    folder.ledger.append(entry(point, 0, 1.0))
    after = extended(before, ["model.dropout=0,0.1"], MORE)
    base = folder.base
    spelled = completed(after, base, point)
    assert spelled == {"diffusion.schedule": "cosine", "model.dropout": base.model.dropout}
    keys = [key_of(after, trial_experiment(after, base, p, 0), "images", {}) for p in (point, spelled)]
    assert keys[0] == keys[1]  # so it is not done again
    folder.extend(after, ["ddpm-pipe", "sweep", "--extend", folder.id])
    folder.ledger.append(entry(spelled, 1, 1.5))
    (only,) = _result(folder).points
    assert (only.point, only.values) == (spelled, [1.0, 1.5])


def test_completing_a_point_that_has_all_its_settings_leaves_it_alone(folder: SweepFolder) -> None:
    sweep = sweep_from(
        {
            "space": {
                "training.min_snr_gamma": {"grid": [1, 9], "when": {"training.objective": "min_snr"}},
                "training.objective": ["simple", "min_snr"],
            },
            "budget": {"steps": 1},
        }
    )
    checker = Checker(sweep, folder.base, lambda experiment: [])
    check_all(sweep, folder.base, checker)
    for point in checker.points:
        assert completed(sweep, folder.base, point) == point
        assert list(completed(sweep, folder.base, point)) == list(
            active(sweep.space, point | {"training.min_snr_gamma": 0})
        )


@pytest.mark.parametrize(
    ("over", "options", "told"),
    [
        ([], {"seeds": 1}, "--seeds: got 1, but the sweep has 4"),
        ([], {"num_points": 5}, "--num-points: got 5, but the sweep has 9"),
        (["model.dropout=0.1"], {}, "draws it from a range"),
        (["diffusion.schedule={uniform: [0, 1]}"], {}, "lists its values"),
    ],
)
def test_an_extension_takes_nothing_away(over: list[str], options: dict[str, Any], told: str) -> None:
    space = {"model.dropout": {"uniform": [0, 0.5]}, "diffusion.schedule": {"choice": ["linear"]}}
    sweep = sweep_from({"space": space, "budget": {"steps": 1}, "seeds": 4, "search": "random", "num_points": 9})
    with pytest.raises(UsageError, match=told):
        extended(sweep, over, {**MORE, **options})
    assert extended(sweep, ["diffusion.schedule=linear,cosine"], {"seeds": 4}).space["diffusion.schedule"].values == (
        "linear",
        "cosine",
    )


def test_a_sweep_that_somebody_works_on_is_not_changed(folder: SweepFolder) -> None:
    before = (folder.folder / "sweep.json").read_bytes()
    with folder.lock(), pytest.raises(RunLockedError, match=f"sweep {folder.id} is being worked on"):
        extend(Context(Profile()), folder.id, ["diffusion.schedule=sigmoid"], MORE, None)
    assert (folder.folder / "sweep.json").read_bytes() == before


def test_the_report_tells_how_the_whole_of_an_extended_sweep_is_done_again(folder: SweepFolder, tmp_path: Path) -> None:
    assert again(folder.record) == "ddpm-pipe sweep --cluster gpu"
    whole = extended(folder.sweep, ["diffusion.schedule=sigmoid"], {"seeds": 3})
    folder.extend(whole, ["ddpm-pipe", "sweep", "--extend", folder.id, "--seeds", "3"])
    folder.report.mkdir()
    page = write_report(folder, _result(folder), {}, folder.report)
    command = again(folder.record)
    assert command == f"ddpm-pipe sweep sweeps/{folder.id}/report/sweep.yaml --cluster gpu"
    assert command in page.read_text()
    assert f"sweep --extend {folder.id} --seeds 3" in page.read_text()
    assert load_sweep(command.split()[2], [], {}) == whole


# -- the winner


def test_the_winner_is_trained_by_the_base_as_it_was(folder: SweepFolder) -> None:
    folder.ledger.append(entry({"diffusion.schedule": "linear"}, 0, 2.0))
    folder.ledger.append(entry({"diffusion.schedule": "cosine"}, 0, 1.0))
    Path("mine.yaml").write_text("training: {learning_rate: 5.0e-1, steps: 1}\n")
    winner = request_of_winner(Context(Profile()), folder.id, []).experiment
    training, logging = winner.training, winner.logging
    assert (training.learning_rate, training.steps, training.batch_size) == (1e-3, 5000, 32)
    assert logging.every_steps == 25  # the sweep's thrift is not the winner's
    assert winner.diffusion.schedule == "cosine"
