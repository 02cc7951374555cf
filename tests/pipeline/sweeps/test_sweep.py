"""The parts of a sweep that need no Ray: its space, its order of trials, early stopping, the ledger, and what it says at the end."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import load_experiment
from pipeline.config.presets import find
from pipeline.errors import StorageError, UsageError
from pipeline.pictures.pictures import read_grid, save_grid
from pipeline.sweeps.config import Axis, Sweep, base_experiment, load_sweep, sweep_from, trial_experiment
from pipeline.sweeps.halving import Halving
from pipeline.sweeps.ledger import Ledger
from pipeline.sweeps.plan import max_concurrent
from pipeline.sweeps.points import MAX_DRAWS, Checker, active, check_all, grid, key_of, title
from pipeline.sweeps.search import TPE, Next, Trials
from tests.pipeline.sweeps.swept_entries import entry

JUDGE = {"extractor": "classifier", "extractor_sha256": "a", "num_images": 559}


def a_sweep(**changes: Any) -> Sweep:
    space = {"diffusion.schedule": ["linear", "cosine"], "diffusion.num_timesteps": [100, 250]}
    return sweep_from({"base": "digits", "space": space, "budget": {"steps": 100}, **changes})


# -- the space


def test_a_grid_is_every_combination_once_and_conditions_leave_settings_out() -> None:
    space = {
        "training.objective": Axis(grid=("simple", "min_snr")),
        "training.min_snr_gamma": Axis(grid=(1, 5, 9), when={"training.objective": "min_snr"}),
        "model.dropout": Axis(grid=(0.0, 0.1)),
    }
    points = list(grid(space))
    with_gamma = [point for point in points if "training.min_snr_gamma" in point]
    assert len(points) == 2 + 3 * 2
    assert {point["training.objective"] for point in with_gamma} == {"min_snr"}
    assert len({json.dumps(point) for point in points}) == len(points)


@given(u=st.floats(0, 1, exclude_max=True))
def test_every_axis_stays_inside_its_range(u: float) -> None:
    assert 1e-4 <= Axis(log=(1e-4, 1e-2)).at(u) <= 1e-2
    assert -1 <= Axis(uniform=(-1, 3)).at(u) <= 3
    assert Axis(integer=(16, 64), step=16).at(u) in (16, 32, 48, 64)
    assert (
        0.123456 <= Axis(log=(0.123456, 0.654321)).at(u) <= 0.654321
    )  # rounded to four digits, both ends leave the range


def test_a_log_axis_is_uniform_in_the_exponent() -> None:
    axis = Axis(log=(1e-4, 1e-2))
    assert axis.at(0.5) == pytest.approx(1e-3, rel=1e-3)


MISTAKES = {
    "training loss": ({"metric": "loss"}, "not comparable"),
    "range in a grid": ({"space": {"model.dropout": {"uniform": [0, 0.5]}}}, "random or tpe"),
    "two kinds": ({"space": {"model.dropout": {"uniform": [0, 0.5], "log": [0.1, 1]}}}, "give one of them"),
    "log from zero": ({"space": {"model.dropout": {"log": [0, 0.5]}}, "search": "tpe", "num_points": 3}, "above 0"),
    "seed as an axis": ({"space": {"seed": [0, 1]}}, "use 'seeds'"),
    "two budgets": ({"budget": {"steps": 3, "images": 4}}, "steps and images"),
    "no budget": ({"budget": {}}, "give steps, images or minutes"),
    "random without a count": ({"search": "random"}, "num_points"),
    "condition on nothing": ({"space": {"model.dropout": {"grid": [0], "when": {"x": 1}}}}, "is not in the space"),
    "unknown key": ({"budgets": {}}, "did you mean 'budget'"),
    "another dataset": ({"space": {"data.source": ["digits", "mnist"]}}, "train on the base's images.*-s data.source="),
    "other images of it": (
        {"space": {"data.image_size": [16, 32]}},
        "or vary data.horizontal_flip or data.shuffle_window",
    ),
    "a circle": (
        {
            "space": {
                "training.grad_clip": {"grid": [1], "when": {"model.dropout": 0}},
                "model.dropout": {"grid": [0], "when": {"training.grad_clip": 1}},
            }
        },
        "circle: .*grad_clip.*dropout|circle: .*dropout.*grad_clip",
    ),
    "a date": ({"space": {"model.dropout": [datetime.date(2026, 1, 1)]}}, "expected numbers, words"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_sweep_is_reported_in_one_line(mistake: str) -> None:
    changes, told = MISTAKES[mistake]
    with pytest.raises(UsageError, match=told):
        a_sweep(**changes)


def test_the_command_line_stands_above_the_file() -> None:
    sweep = load_sweep(
        None, ["diffusion.schedule=linear,cosine"], {"seeds": 3, "metric": None}, ["training.batch_size=32"]
    )
    assert list(sweep.space) == ["diffusion.schedule"]
    assert (sweep.seeds, sweep.overrides["training.batch_size"]) == (3, 32)
    added = load_sweep("sweep-schedules", ["model.dropout=0,0.1"], {})
    assert set(added.space) == {"diffusion.schedule", "diffusion.num_timesteps", "model.dropout"}
    with pytest.raises(UsageError, match=r"did you mean 'diffusion\.schedule'"):
        base_experiment(load_sweep(None, ["diffusion.schedul=a,b"], {}))
    with pytest.raises(UsageError, match="unknown sweep 'digits'"):
        load_sweep("digits", [], {})
    with pytest.raises(UsageError, match="is no sweep"):
        load_sweep(str(find("experiments", "digits")), [], {})


def test_a_budget_is_the_same_for_every_trial() -> None:
    base = load_experiment(find("experiments", "digits"))
    by_images = a_sweep(budget={"images": 6400}, space={"training.batch_size": [32, 64]})
    steps = [trial_experiment(by_images, base, {"training.batch_size": b}, 0).training.steps for b in (32, 64)]
    assert steps == [200, 100]


def test_refused_points_are_listed_and_the_others_kept() -> None:
    sweep = a_sweep(space={"diffusion.num_timesteps": [1, 100, 250], "sampling.steps": [50, 200]})
    base = base_experiment(sweep)
    found = Checker(sweep, base, lambda experiment: [])
    check_all(sweep, base, found)
    assert [title(point) for point in found.points] == [
        "T = 100, steps = 50",
        "T = 250, steps = 50",
        "T = 250, steps = 200",
    ]
    reasons = {title(item.point): item.reason for item in found.refused}
    assert "more than diffusion.num_timesteps 100" in reasons["T = 100, steps = 200"]
    assert "T = 1, steps = 50" in reasons


def test_a_key_stands_for_all_that_decides_the_number_and_for_nothing_else() -> None:
    sweep = a_sweep()
    base = base_experiment(sweep)
    point = {"diffusion.schedule": "cosine"}  # the base's own schedule, spelled out
    key = key_of(sweep, trial_experiment(sweep, base, point, 0), "images", JUDGE)
    same = [trial_experiment(sweep, base, {}, 0), trial_experiment(sweep, base, {"logging.every_steps": 7}, 0)]
    assert {key_of(sweep, experiment, "images", JUDGE) for experiment in same} == {key}
    others = [
        key_of(sweep, trial_experiment(sweep, base, point, 1), "images", JUDGE),
        key_of(sweep, trial_experiment(sweep, base, point, 0), "other images", JUDGE),
        key_of(sweep, trial_experiment(sweep, base, {"sampling.steps": 20}, 0), "images", JUDGE),
        key_of(a_sweep(budget={"steps": 101}), trial_experiment(sweep, base, point, 0), "images", JUDGE),
        key_of(a_sweep(metric="kid"), trial_experiment(sweep, base, point, 0), "images", JUDGE),
        key_of(sweep, trial_experiment(sweep, base, point, 0), "images", {**JUDGE, "extractor_sha256": "b"}),
        key_of(sweep, trial_experiment(sweep, base, {"evaluation.num_images": 300}, 0), "images", JUDGE),
    ]
    assert key not in others
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    ("profile", "asked", "expected"),
    [
        ({"resources_per_worker": {"CPU": 1}}, None, 2),
        ({"resources_per_worker": {"CPU": 2}}, None, 1),
        ({"resources_per_worker": {"CPU": 1}}, 1, 1),
        ({"resources_per_worker": {"CPU": None}}, None, 2),
    ],
)
def test_trials_at_once_are_those_that_two_cpus_hold(
    profile: dict[str, Any], asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert max_concurrent(Profile.model_validate(profile), 1, 10, asked) == expected


# -- what is tried next


def all_of(trials: Trials, value: Any) -> list[Next]:
    found = []
    while isinstance(following := trials.next(), Next):
        found.append(following)
        trials.ended(following, "finished", value(following), {})
    return found


def test_every_point_gets_its_first_seed_before_any_gets_its_second() -> None:
    points = list(grid(a_sweep().space))
    found = all_of(Trials(a_sweep(seeds=3), points), lambda following: 1.0)
    assert [following.seed for following in found] == [0] * 4 + [1] * 4 + [2] * 4
    assert [following.point for following in found[:4]] == points


def test_with_early_stopping_only_survivors_are_repeated() -> None:
    points = list(grid(a_sweep().space))
    trials = Trials(a_sweep(seeds=2, early_stopping={}), points)
    first = [trials.next() for _ in points]
    assert trials.next() is None  # nothing is known yet: wait
    for i, following in enumerate(first):
        assert isinstance(following, Next)
        trials.ended(following, "stopped" if i else "finished", None if i else 1.0, {})
    last = trials.next()
    assert last == Next(points[0], 1)
    assert isinstance(last, Next)
    trials.ended(last, "finished", 1.0, {})
    assert trials.next() is None


def a_space() -> dict[str, Axis]:
    return {
        "a": Axis(choice=("x", "y")),
        "b": Axis(log=(1e-4, 1e-1)),
        "c": Axis(integer=(2, 10), step=2, when={"a": "x"}),
    }


def value_of(point: dict[str, Any]) -> float:
    return float((np.log10(point["b"]) + 2.5) ** 2 + (point["a"] == "y"))


def tpe(seeds: int = 1) -> tuple[TPE, Trials]:
    source = TPE(a_space(), 30, 0, lambda point: point["b"] > 0.05)
    sweep = a_sweep(search="tpe", num_points=30, seeds=seeds, space={"model.dropout": {"uniform": [0, 0.5]}})
    return source, Trials(sweep, tpe=source)


def test_tpe_finds_the_valley_repeats_itself_and_never_gives_a_refused_point() -> None:
    found = all_of(tpe()[1], lambda following: value_of(following.point))
    again = all_of(tpe()[1], lambda following: value_of(following.point))
    assert found == again
    assert len(found) == 30
    assert all(following.point["b"] <= 0.05 for following in found)
    assert all(("c" in following.point) == (following.point["a"] == "x") for following in found)
    late, early = ([value_of(f.point) for f in part] for part in (found[20:], found[:10]))
    assert np.mean(late) < np.mean(early)


def test_tpe_takes_up_what_a_killed_driver_had_finished() -> None:
    before = all_of(tpe()[1], lambda following: value_of(following.point))[:20]
    _, trials = tpe()
    trials.known([entry(following.point, 0, value_of(following.point)) for following in before])
    rest = all_of(trials, lambda following: value_of(following.point))
    assert len(rest) == 10
    assert not {json.dumps(f.point) for f in rest} & {json.dumps(f.point) for f in before}


def test_further_seeds_of_what_tpe_finished_draw_no_further_points() -> None:
    before = all_of(tpe()[1], lambda following: value_of(following.point))
    source, trials = tpe(seeds=2)
    trials.known([entry(following.point, 0, value_of(following.point)) for following in before])
    waiting = [trials.next() for _ in range(31)]  # before any of them is told
    assert waiting[:30] == [Next(following.point, 1) for following in before]
    assert waiting[30] is None
    assert source.draw() is None


def test_tpe_draws_no_more_where_its_space_has_no_more_until_it_hears_something() -> None:
    asked: list[Any] = []

    def refuses(point: dict[str, Any]) -> bool:
        asked.append(point)
        return bool(point == {"a": 2, "b": "y"})

    source = TPE({"a": Axis(choice=(1, 2)), "b": Axis(choice=("x", "y", "z"))}, 20, 0, refuses)
    points = []
    while (point := source.draw()) is not None:
        points.append(point)
    assert len(points) == 5
    assert len(asked) == 6  # each once
    tried = len(source._study.trials)
    assert [source.draw() for _ in range(50)] == [None] * 50
    assert len(source._study.trials) == tried
    source.tell(points[0], 1.0, None)
    assert source.draw() is None
    assert len(source._study.trials) == tried + MAX_DRAWS


def test_tpe_hears_the_mean_over_seeds_and_completes_a_point_first() -> None:
    _, trials = tpe(seeds=2)
    found = all_of(trials, lambda following: value_of(following.point) + following.seed)
    assert [following.seed for following in found] == [0, 1] * 30
    assert all(a.point == b.point for a, b in zip(found[::2], found[1::2], strict=True))


def stopping(trials: Trials, keeps_learning: bool) -> list[Next]:
    """Run all trials, of which all in the upper half of the axis are stopped early, showing how bad they are."""
    found = []
    while isinstance(following := trials.next(), Next):
        found.append(following)
        value = value_of(following.point)
        bad = value > 0.5
        rungs = {0.1: value} if keeps_learning else {}
        trials.ended(
            following,
            "stopped" if bad and keeps_learning else "failed" if bad else "finished",
            None if bad else value,
            rungs,
        )
    return found


def test_tpe_learns_from_what_was_stopped_early() -> None:
    learns, ignores = (
        np.mean([value_of(f.point) > 0.5 for f in stopping(tpe()[1], keeps)[12:]]) for keeps in (True, False)
    )
    assert learns < 0.7 * ignores


def test_tpe_takes_up_what_was_stopped_early_and_what_was_rounded_at_an_end() -> None:
    space = {"b": Axis(log=(1.23456e-4, 9.87654e-2)), "k": Axis(integer=(2, 11), step=2)}
    source = TPE(space, 12, 0, lambda point: False)
    trials = Trials(a_sweep(search="tpe", num_points=12, space={"model.dropout": {"uniform": [0, 0.5]}}), tpe=source)
    ends = [{"b": axis, "k": 2} for axis in (space["b"].rounded(1.23456e-4), space["b"].rounded(9.87654e-2))]
    known = [entry(ends[0], 0, None, status="stopped", rungs={1 / 9: 2.0, 1 / 3: 1.5}), entry(ends[1], 0, 0.3)]
    trials.known(known)
    study = source._study
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]
    assert study.trials[0].intermediate_values == {111111: 2.0, 333333: 1.5}
    found = all_of(trials, lambda following: following.point["b"])
    assert len(found) == 10
    assert all(1.23456e-4 <= following.point["b"] <= 9.87654e-2 for following in found)
    assert {following.point["k"] for following in found} <= {2, 4, 6, 8, 10}


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(-3, 3)), max_size=40),
    st.integers(2, 4),
)
def test_asha_decides_as_ray_tunes_own_bracket(reports: list[tuple[int, float]], factor: int) -> None:
    from ray.tune.schedulers.async_hyperband import _Bracket

    ours = Halving(factor)
    theirs = _Bracket(1, 100, factor, 0)
    milestones = sorted(milestone for milestone, _ in theirs._rungs)
    stopped = set()
    seen: dict[int, int] = {}
    for trial, value in reports:
        rung = seen.get(trial, 0)
        if trial in stopped or rung == len(milestones):
            continue
        seen[trial] = rung + 1
        expected = theirs.on_result(SimpleNamespace(trial_id=str(trial)), milestones[rung], -value) == "CONTINUE"
        assert ours.goes_on(milestones[rung], str(trial), value) == expected
        if not expected:
            stopped.add(trial)


def test_asha_stops_once_and_for_all() -> None:
    halving = Halving(2)
    assert halving.goes_on(0.5, "a", 1.0)
    assert not halving.goes_on(0.5, "b", 2.0)
    assert halving.goes_on(0.5, "c", 0.5)
    for _ in range(2):  # its process was killed before it stopped, and shows the rung again
        assert not halving.goes_on(0.5, "b", 0.1)
        assert halving.goes_on(0.5, "a", 9.0)
    assert halving.rungs_of("b") == {0.5: 2.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_asha_stops_what_shows_no_number_and_counts_it_as_the_worst(value: float) -> None:
    halving = Halving(2)
    assert not halving.goes_on(0.5, "first", value)
    assert halving.goes_on(0.5, "a", 1.0)
    assert not halving.goes_on(0.5, "b", value)
    assert halving.goes_on(0.5, "c", 2.0)  # of four, two are below nothing


def test_asha_with_diverged_trials_is_asha_with_very_bad_ones() -> None:
    generator = np.random.default_rng(0)
    values = [float(v) for v in np.where(generator.random(60) < 0.3, np.nan, generator.normal(0, 1, 60))]
    ours, large = Halving(3), Halving(3)
    for i, value in enumerate(values):
        finite = np.isfinite(value)
        stand_in = large.goes_on(0.1, str(i), value if finite else 1e300)
        assert ours.goes_on(0.1, str(i), value) == (stand_in and bool(finite))


# -- the ledger


def test_a_ledger_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.entries() == {}
    first = entry({"a": 1}, 0, 0.5, curve={10: 0.7, 50: 0.5}, rungs={0.1: 2.0}, identity={"metric": "fid"})
    second = entry({"a": 2}, 0, None, reason="killed")
    ledger.append(first)
    whole = ledger.path.read_bytes()
    ledger.append(second)
    line = ledger.path.read_bytes()[len(whole) :]
    for cut in range(len(line)):  # 0: nothing was written; all but the newline: not known to be whole
        ledger.path.write_bytes(whole + line[:cut])
        assert list(ledger.entries().values()) == [first]
        ledger.append(second)
        assert list(ledger.entries().values()) == [first, second]


def test_a_damaged_ledger_is_reported_with_its_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(entry({}, 0, 1.0))
    ledger.path.write_bytes(b"{}\n" + ledger.path.read_bytes())
    with pytest.raises(StorageError, match="line 1"):
        ledger.entries()


def test_no_flipped_bit_of_a_ledger_is_believed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(entry({"a": 1}, 0, 0.5, curve={10: 0.7}, rungs={0.1: 2.0}, identity={"metric": "fid"}))
    whole, right = ledger.path.read_bytes(), ledger.entries()
    for bit in range(8 * (len(whole) - 1)):  # without its newline, a line counts as cut short
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        ledger.path.write_bytes(flipped)
        try:
            assert ledger.entries() == right  # another way to write the same
        except StorageError as error:
            assert re.search(r"line \d: cannot be read \(.*\); remove the line", str(error))  # noqa: PT017


def test_the_newest_line_of_a_trial_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for value in (None, 0.25):
        ledger.append(entry({"a": 1}, 0, value))
    (found,) = ledger.entries().values()
    assert found.value == 0.25


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 28, 28), (3, 70, 70)])
def test_a_grid_is_read_back_as_it_was(shape: tuple[int, int, int], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (11, *shape), dtype=np.uint8)
    save_grid(images, tmp_path / "grid.png")
    np.testing.assert_array_equal(read_grid(tmp_path / "grid.png", shape, 5), images[:5])
    np.testing.assert_array_equal(read_grid(tmp_path / "grid.png", shape, 99)[:11], images)


def test_how_images_are_read_may_be_varied() -> None:
    assert len(list(grid(a_sweep(space={"data.horizontal_flip": [False, True]}).space))) == 2


def test_a_condition_on_a_setting_that_is_left_out_does_not_hold() -> None:
    space = {  # listed before what they depend on
        "c": Axis(grid=(7, 8), when={"b": 3}),
        "b": Axis(grid=(3, 4), when={"a": 2}),
        "a": Axis(grid=(1, 2)),
    }
    assert active(space, {"a": 1, "b": 3, "c": 7}) == {"a": 1}
    assert list(grid(space)) == [{"a": 1}, {"c": 7, "b": 3, "a": 2}, {"b": 4, "a": 2}, {"c": 8, "b": 3, "a": 2}]


RANGES = {
    "training.learning_rate={log: [1e-4, 1e-2]}": Axis(log=(1e-4, 1e-2)),
    "model.dropout={uniform: [0, 0.3]}": Axis(uniform=(0, 0.3)),
    "model.channels={integer: [16, 64], step: 16}": Axis(integer=(16, 64), step=16),
    "model.channel_multipliers=[1,2],[1,2,4]": Axis(grid=([1, 2], [1, 2, 4])),
}


@pytest.mark.parametrize("over", RANGES)
def test_the_command_line_has_the_axes_of_a_file(over: str) -> None:
    sweep = load_sweep(None, [over], {"search": "random", "num_points": 3, "budget": {"minutes": 2}})
    assert list(sweep.space.values()) == [RANGES[over]]
    assert sweep.budget.minutes == 2
    two = "diffusion.schedule=linear,cosine"
    conditional = load_sweep(None, [two, "model.dropout={grid: [0.1, 0.2], when: {diffusion.schedule: cosine}}"], {})
    assert len(list(grid(conditional.space))) == 1 + 2


@pytest.mark.parametrize(
    ("text", "over", "settings", "told"),
    [
        ("space:\nbudget: {steps: 3}", ["model.dropout=0,0.1"], [], None),
        ("space:\nbudget: {steps: 3}", [], [], "space"),
        ("space: [1]\nbudget: {steps: 3}", ["model.dropout=0,0.1"], [], "space: got list; expected settings"),
        ("space: {model.dropout: [0]}\noverrides:\nbudget: {steps: 3}", [], ["seed=3"], None),
        (
            "space: {model.dropout: [0]}\noverrides: [1]\nbudget: {steps: 3}",
            [],
            ["seed=3"],
            "overrides: got list; expected",
        ),
    ],
)
def test_an_empty_section_of_a_file_is_none_and_a_list_is_refused(
    text: str, over: list[str], settings: list[str], told: str | None, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    if told is None:
        assert load_sweep(str(tmp_path / "mine.yaml"), over, {}, settings).space
        return
    with pytest.raises(UsageError, match=told) as error:
        load_sweep(str(tmp_path / "mine.yaml"), over, {}, settings)
    assert "\n" not in str(error.value)


def test_conditions_hold_by_value() -> None:
    space = {"a": Axis(grid=(1, 2)), "b": Axis(grid=(3,), when={"a": [2, 5]})}
    assert active(space, {"a": 1, "b": 3}) == {"a": 1}
    assert active(space, {"a": 2, "b": 3}) == {"a": 2, "b": 3}
