"""A grid of sampler settings: its points, its table and picture, and what a stop or a repeat costs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest

from pipeline.commands.output import table_lines
from pipeline.errors import UsageError
from pipeline.metrics.scores import Spread
from pipeline.runs.evaluate import ScoreRequest
from pipeline.runs.grid import Grid, Point, grid_figure, parse_grid, setting_of, write_grid
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import Tracker, TrackingSettings
from tests.kit import trainer
from tests.kit.commands import run_command
from tests.kit.drawings import holds, points_of


def test_points_are_every_combination_the_last_key_fastest():
    keys, points = parse_grid("sampler=ddim,ancestral  steps=5,10 eta=0.5", ScoreRequest(num_seeds=2))
    assert keys == ["sampler", "steps", "eta"]
    assert [(p.sampler, p.steps, p.eta, p.num_seeds) for p in points] == [
        *(("ddim", 5, 0.5, 2), ("ddim", 10, 0.5, 2)),
        *(("ancestral", 5, 0.5, 2), ("ancestral", 10, 0.5, 2)),
    ]
    assert [p.compile for p in parse_grid("compile=true,false", ScoreRequest())[1]] == [True, False]
    assert len(parse_grid("steps=5,5,5", ScoreRequest())[1]) == 1
    keys, points = parse_grid("checkpoint=20,best,latest", ScoreRequest())
    assert [p.checkpoint for p in points] == [20, "best", None]
    assert [setting_of(p, keys)["checkpoint"] for p in points] == [20, "best", "latest"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stepz=5", "did you mean 'steps'"),
        ("num_images=5", "unknown key 'num_images'"),
        ("steps", "expected key=value"),
        ("steps=", "expected key=value"),
        ("steps=,", "expected key=value"),
        ("steps=five", "expected a number"),
        ("compile=yes", "expected true or false"),
        ("checkpoint=newest", "expected a step, latest or best"),
        ("steps=5 steps=6", "appears twice"),
        ("seed=1,2", "its own option"),
        ("  ", "nothing to vary"),
    ],
)
def test_what_makes_no_grid_is_reported(text, told):
    with pytest.raises(UsageError, match=told):
        parse_grid(text, ScoreRequest(seed=3))


def made_up() -> Grid:
    points = [
        Point(
            {"sampler": s, "steps": n},
            n,
            {"fid": 9 / n + k, "kid": -0.01 * k},
            {"kid": Spread(0.1, "3 seeds", (1.0, 2.0))},
        )
        for k, s in enumerate(("ddim", "ancestral"))
        for n in (1000, 10, 100)
    ]
    return Grid(["sampler", "steps"], points, {"real_half": {"fid": 0.3, "kid": 0.0}})


def test_the_table_is_the_same_for_people_and_programs():
    grid = made_up()
    rows = list(csv.DictReader(grid.csv().splitlines()))
    assert [(r["sampler"], r["steps"], float(r["fid"]), float(r["kid_std"])) for r in rows[:2]] == [
        ("ddim", "1000", 0.009, 0.1),
        ("ddim", "10", 0.9, 0.1),
    ]
    table = grid.table()
    assert table["columns"] == list(rows[0])
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == grid.rows()
    lines = table_lines(grid.shown())
    assert lines[0].split() == ["sampler", "steps", "network", "calls", "fid", "kid"]
    assert lines[-2].split() == ["ancestral", "100", "100", "1.09", "-0.01", "±", "0.1"]
    assert lines[-1].split() == ["real", "half", "-", "-", "0.3", "0"]


def test_the_picture_shows_every_value_over_its_network_calls(tmp_path: Path):
    grid = made_up()
    figure = grid_figure(grid)
    looks = set()
    for panel, name, real in zip(figure.axes, ("fid", "kid"), (0.3, 0.0), strict=True):
        assert (panel.get_title("left"), panel.get_xlabel()) == (name, "network calls per image")
        drawn = {bars.get_label(): bars for bars in panel.containers}
        assert list(drawn) == ["ddim", "ancestral"]
        for sampler, bars in drawn.items():
            points = sorted(
                (point.nfe, point.values[name]) for point in grid.points if point.setting["sampler"] == sampler
            )
            np.testing.assert_allclose(points_of(bars[0]), points)
            looks.add((name, bars[0].get_color(), bars[0].get_marker()))
            assert bool(bars[2]) == (name == "kid")  # fid has no spread over seeds
            if name == "kid":
                ends = [segment[:, 1].tolist() for segment in bars[2][0].get_segments()]
                np.testing.assert_allclose(ends, [(value - 0.1, value + 0.1) for _, value in points])
        (yardstick,) = (line for line in panel.lines if "real half" in str(line.get_label()))
        assert list(yardstick.get_ydata()) == [real, real]
    assert len(looks) == 4
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["real half against real half", "ddim", "ancestral"]
    assert holds(write_grid(grid, tmp_path)[2], figure)


def test_a_spread_is_named_for_what_it_is():
    error = Spread(0.02, "100 images (standard error)", standard_error=0.02)
    over_seeds = Spread(0.1, "3 seeds", (1.0, 2.0), 0.06)
    point = Point({"steps": 5}, 5, {"bits_per_dim": 3.0, "fid": 1.0}, {"bits_per_dim": error, "fid": over_seeds})
    (row,) = Grid(["steps"], [point], {}).rows()
    assert (row["bits_per_dim_se"], row["fid_std"]) == (0.02, 0.1)
    assert "bits_per_dim_std" not in row


@pytest.fixture
def coarse(home: Path) -> Run:
    """A run with 25 steps of diffusion."""
    return trainer.trained_run(
        home,
        diffusion={"num_timesteps": 25, "schedule": "cosine"},
        sampling={"steps": 2, "batch_size": 100},
        training={"steps": 2, "batch_size": 16},
    )


def test_a_grid_is_one_table_and_continues_where_it_was_stopped(coarse, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    store = TrackingSettings.resolve(home)
    tracker = Tracker(coarse.folder, store)
    tracker.start("tiny", {}, {}, "")
    assert tracker.close()
    command = [
        "evaluate",
        coarse.id,
        "--grid",
        "sampler=ddim,ancestral steps=1,2",
        "-n",
        "200",
        "--metrics",
        "fid,kid",
    ]

    assert (
        run_command(["evaluate", coarse.id, "--grid", "sampler=ddim steps=1,26"]) == 2
    )  # before any point is computed
    assert "T = 25" in capsys.readouterr().err
    assert not (coarse.folder / "features").exists()
    assert run_command([*command, "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 4
    assert not (coarse.folder / "features").exists()

    assert run_command([*command[:2], "--sampler", "ddim", "--steps", "2", "-n", "200", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["values"]["fid_classifier_n200"]
    kept = {path: path.stat().st_mtime_ns for path in coarse.folder.glob("features/*/chunk-*")}
    assert run_command([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["sampler"], row["steps"]) for row in told["rows"]] == [
        *(("ddim", 1), ("ddim", 2)),
        *(("ancestral", 1), ("ancestral", 2)),
    ]
    assert told["rows"][1]["fid"] == alone  # the same point by itself, which was not computed again
    chunks = {path: path.stat().st_mtime_ns for path in coarse.folder.glob("features/*/chunk-*")}
    assert kept.items() < chunks.items()
    assert [Path(path).name for path in told["written"]] == ["table.json", "grid.csv", "grid.png"]
    assert all(Path(path).is_file() for path in told["written"])

    assert run_command([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == told["rows"]
    assert {path: path.stat().st_mtime_ns for path in coarse.folder.glob("features/*/chunk-*")} == chunks

    folder = Path(told["written"][0]).parent.name
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    experiment = mlflow.get_experiment_by_name("ddpm")
    assert experiment is not None
    table = mlflow.MlflowClient().load_table(
        experiment.experiment_id, f"evaluations/{folder}/table.json", run_ids=[coarse.mlflow_run_id]
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert table["fid"].tolist() == [row["fid"] for row in told["rows"]]

    assert run_command(["compare", coarse.id, "--metric", "fid", "--across", "sampler,steps", "--json"]) == 0
    (ranking,) = json.loads(capsys.readouterr().out)["rankings"]
    best = min(told["rows"], key=lambda row: row["fid"])
    first = ranking["ranking"][0]
    assert (first["generation.sampler"], first["generation.steps"]) == (best["sampler"], best["steps"])
