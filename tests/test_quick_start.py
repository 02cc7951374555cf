"""The quick start of README, as a new user types it: once in full, judged by its digits, and the commands after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline.pictures.pictures import read_grid
from pipeline.tracking.names import Group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SHORT = (
    "-s",
    "training.steps=20",
    "-s",
    "logging.every_steps=5",
    "-s",
    "logging.grid_every_steps=10",
    "-s",
    "sampling.steps=4",
)


def digits_are_good(scores: dict[str, Any]) -> bool:
    """The acceptance of the default training: nine digits in ten are clear to the classifier, and no class is missing."""
    return scores["confident"]["generated"] >= 0.9 and min(scores["class_shares"].values()) >= 0.04


@pytest.mark.all
@pytest.mark.timeout(1800)  # seven minutes on slow cores, alone
def test_the_default_training_makes_digits_and_an_untrained_model_does_not(start, typed):
    trained = start("train", "--json").end(1500)
    assert trained.code == 0, trained.stderr
    scores = json.loads(trained.stdout)["scores"]
    assert digits_are_good(scores), scores
    (fid,) = (value for key, value in scores["values"].items() if key.startswith("fid"))
    real, noise = (scores["yardsticks"][side]["fid"] for side in ("real_half", "uniform_noise"))
    assert fid < noise / 10
    assert fid < 10 * real

    code, stdout, stderr = typed("train", "--json", "-s", "training.steps=1")
    assert code == 0, stderr
    assert not digits_are_good(json.loads(stdout)["scores"])


def test_a_run_is_found_listed_sampled_scored_and_tracked(typed, home):
    code, stdout, stderr = typed("train", *SHORT)
    assert code == 0, stderr
    (folder,) = (home / "runs").iterdir()
    for said in (
        "fid_classifier_n559",
        "real half against real half",
        "uniform noise",
        f"ddpm-pipe sample {folder.name}",
        f"report:  {folder / 'report.html'}",
    ):
        assert said in stdout
    (row,) = json.loads(typed("runs", "--json")[1])
    assert (row["id"], row["status"], row["steps"], row["T"]) == (folder.name, "FINISHED", "20/20", 1000)
    assert row["metric"] == "fid_classifier_n559"

    code, stdout, stderr = typed("sample", "latest", "-n", "9", "--json")
    assert code == 0, stderr
    grid = next(Path(path) for path in json.loads(stdout)["written"] if path.endswith(".png"))
    code, _, stderr = typed("sample", "latest", "-n", "9", "--format", "png", "--out", "nine")
    assert code == 0, stderr
    nine = [np.asarray(Image.open(path))[None] for path in sorted((home / "nine").rglob("*.png"))]
    np.testing.assert_array_equal(read_grid(grid, (1, 8, 8), 9), np.stack(nine))

    code, stdout, stderr = typed("evaluate", folder.name[:5], "--steps", "2", "--json")
    assert code == 0, stderr
    identity = json.loads(stdout)["identities"]["fid_classifier_n559"]
    assert (identity["generation"]["steps"], identity["generation"]["weights"]) == (2, "ema")

    tracked_as_a_reader_finds_it(home, folder)


def tracked_as_a_reader_finds_it(home: Path, folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("ddpm")
    assert (
        experiment.artifact_location == f"file://{home}/mlartifacts"
        or str(home / "mlartifacts") in experiment.artifact_location
    )
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["ddpm_pipe.run_id"] == folder.name
    assert (
        run.data.params["diffusion.schedule"]
        == json.loads((folder / "run.json").read_text())["experiment"]["diffusion"]["schedule"]
    )
    assert "ddpm-pipe train" in run.data.tags["mlflow.note.content"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [5, 10, 15, 20]
    wanted = {
        "train/grad_norm",
        "train/learning_rate",
        "system/images_per_s",
        "system/data_wait_share",
        "system/training_s",
        "score/fid_classifier_n559",
        "score/kid_classifier_n559",
        "score/confident",
    }
    assert wanted <= run.data.metrics.keys()
    assert any(key.startswith("train/loss_t_quartile_") for key in run.data.metrics)
    assert {key.partition("/")[0] for key in run.data.metrics} <= set(get_args(Group))
    # what does not change with the model is a tag, and no chart
    assert {"yardstick_real_half_fid_classifier_n559", "yardstick_uniform_noise_confident"} <= run.data.tags.keys()
    best = client.search_runs(
        [experiment.experiment_id], "metrics.`score/fid_classifier_n559` < 1e9 AND metrics.`train/loss` > 0"
    )
    assert [found.info.run_id for found in best] == [run.info.run_id]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "digits"
    pictures = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "images")]
    for step in (0, 10, 20):
        assert any(f"samples+step+{step}+" in p or f"samples%step%{step}%" in p for p in pictures), pictures
    assert {a.path for a in client.list_artifacts(run.info.run_id, "pictures")} == {
        "pictures/samples.png",
        "pictures/denoising.png",
        "pictures/schedule.png",
    }
    assert "report.html" in {a.path for a in client.list_artifacts(run.info.run_id)}
    assert "fid_classifier_n559" in (folder / "report.html").read_text()
    scores = client.list_artifacts(run.info.run_id, "evaluations")
    assert len(scores) == 2
    files = {Path(a.path).name for a in client.list_artifacts(run.info.run_id, scores[0].path)}
    assert files == {"scores.json", "moments.safetensors", "grid.png"}
    assert len(client.search_logged_models([experiment.experiment_id])) == 1


def test_images_without_labels_end_with_samples_and_say_what_was_skipped(typed, home):
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    np.savez(home / "noise.npz", images=images)
    code, stdout, stderr = typed("train", "--data", "noise.npz", *SHORT, "-s", "training.batch_size=32")
    assert code == 0, stderr
    assert "ingesting" in stderr
    assert "was skipped" in stdout
    assert "ddpm-pipe evaluate" in stdout
    (grid,) = home.glob("runs/*/pictures/samples.png")
    with Image.open(grid) as picture:
        assert picture.mode == "RGB"
