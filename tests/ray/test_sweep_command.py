"""`ddpm-pipe sweep` as a user types it, on real Ray Tune and Ray Train with two CPUs, tiny models, and real kills."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline.storage.runs import Run
from pipeline.sweeps.forecast import START_S
from pipeline.sweeps.ledger import Ledger, LedgerEntry
from tests.kit.attempts import require_resume, starts_of
from tests.kit.commands import Shell, children_of
from tests.kit.sweeps import prepare
from tests.kit.trainer import attempts, newest_step, only_run, verified_step

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def elsewhere(tmp_path: Path, ray_session: Any) -> Iterator[Shell]:
    prepare(tmp_path)
    with Shell(tmp_path) as shell:
        yield shell


def ledger(home: Path) -> dict[str, LedgerEntry]:
    (folder,) = (home / "sweeps").iterdir()
    return Ledger(folder / "ledger.jsonl").entries()


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {point["title"]: (point["values"], point["curve"]) for point in result["points"]}


def test_a_grid_is_ranked_and_what_cannot_be_trained_is_named(swept_shell: Shell, swept: dict[str, Any]) -> None:
    means = [point["mean"] for point in swept["points"]]
    assert len(means) == 4
    assert means == sorted(means)
    assert {tuple(item["point"].values()) for item in swept["refused"]} == {("linear", 2), ("cosine", 2)}
    assert all("sampling.steps" in item["reason"] for item in swept["refused"])
    assert all(set(point["curve"]) == {"2", "4"} for point in swept["points"])
    assert swept["metric"] == "fid_classifier_n128"
    assert "one seed" in swept["statement"]


def test_the_report_needs_nothing_else_and_its_pictures_show_something(
    swept_shell: Shell, swept: dict[str, Any]
) -> None:
    page = Path(swept["report"])
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", text)
    assert "<script" not in text
    for point in swept["points"]:
        assert f"<td>{point['point']['diffusion.schedule']}</td>" in text
    for name in ("ranking", "heatmap", "network_calls", "training_time", "parallel_coordinates", "samples"):
        with Image.open(page.parent / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20, name


def test_trials_are_nested_found_by_words_and_the_best_is_registered(swept_shell: Shell, swept: dict[str, Any]) -> None:
    client = MlflowClient(f"sqlite:///{swept_shell.home}/mlflow.db")
    experiment = client.get_experiment_by_name("ddpm")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.kind = 'sweep'")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 4
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    best = swept["best"]
    (named,) = client.search_runs([experiment.experiment_id], f"attributes.run_name LIKE '{best['title']}, best FID%'")
    assert named.data.metrics["score/fid_classifier_n128"] == best["mean"]
    ranked = client.search_runs([experiment.experiment_id], "", order_by=["metrics.`sweep/rank` ASC"], max_results=4)
    assert [run.data.metrics["sweep/rank"] for run in ranked] == [1, 2, 3, 4]
    assert ranked[0].info.run_id == named.info.run_id
    assert "ddpm-pipe train" in named.data.tags["mlflow.note.content"]
    files = {item.path for item in client.list_artifacts(parent.info.run_id, "report")}
    assert {"report/sweep-report.html", "report/heatmap.png", "report/result.json"} <= files
    assert swept["statement"] in parent.data.tags["mlflow.note.content"]
    assert [dataset.dataset.name for dataset in parent.inputs.dataset_inputs] == ["digits"]
    (model,) = client.search_registered_models()
    (alias,) = model.aliases
    assert alias.startswith("best-fid-classifier-n128-ddim4-")
    version = client.get_model_version_by_alias(model.name, alias)
    assert version.run_id == named.info.run_id
    assert float(version.tags["ddpm_pipe.value"]) == best["mean"]


@pytest.mark.fault(2)
@pytest.mark.all
def test_a_killed_driver_is_resumed_and_ends_in_the_same_numbers(swept: dict[str, Any], elsewhere: Shell) -> None:
    killed = elsewhere.start("sweep", "grid.yaml")
    killed.wait_for(lambda: (elsewhere.home / "sweeps").is_dir() and len(ledger(elsewhere.home)) >= 1)
    processes = children_of(killed.pid)
    killed.send(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    saved = {run.id: verified_step(run) for run in Run.all(elsewhere.home)}
    done = ledger(elsewhere.home)
    assert 1 <= len(done) < 4
    (folder,) = (elsewhere.home / "sweeps").iterdir()

    code, stdout, stderr = elsewhere.type("resume", folder.name, "--json")
    assert code == 0, stderr
    assert numbers(json.loads(stdout)) == numbers(swept)
    begun = {run.id for run in Run.all(elsewhere.home)}
    assert begun == {entry.run for entry in ledger(elsewhere.home).values()}  # four trials, none begun twice
    ended = {entry.run for entry in done.values()}
    for run, step in saved.items():
        again = starts_of((elsewhere.home / "runs" / run / "log.txt").read_text())[1:]
        assert again in ([], [] if run in ended else [step]), run
    spent_s = json.loads(stdout)["seconds"]

    more = ("--over", "diffusion.num_timesteps=20")
    code, stdout, stderr = elsewhere.type("sweep", "--extend", folder.name, *more, "--json")
    assert code == 0, stderr
    extended = json.loads(stdout)
    assert numbers(extended).items() >= numbers(swept).items()
    added = [point for point in extended["points"] if point["point"]["diffusion.num_timesteps"] == 20]
    assert len(added) == len(extended["points"]) - 4 == 1
    assert ("linear", 20) in {tuple(item["point"].values()) for item in extended["refused"]}  # its last beta would be 1
    assert all(point["mean"] is not None for point in added)
    assert {run.id for run in Run.all(elsewhere.home)} > begun
    assert len(Run.all(elsewhere.home)) == 5  # what was done was not done again
    assert extended["seconds"] > spent_s  # of all drivers


@pytest.mark.fault(2)
@pytest.mark.all
def test_a_sweep_whose_driver_is_killed_resumes_from_its_trials_checkpoint(elsewhere: Shell) -> None:
    over = ("--over", "training.learning_rate=1e-3", "--steps", "40", "--seeds", "1")
    killed = elsewhere.start("sweep", "--base", "slow.yaml", *over, "-s", "logging.every_steps=1")
    killed.wait_for(lambda: newest_step(elsewhere.home) >= 10)
    processes = children_of(killed.pid)
    killed.send(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    run, saved = only_run(elsewhere.home), newest_step(elsewhere.home)
    (folder,) = (elsewhere.home / "sweeps").iterdir()
    code, stdout, stderr = elsewhere.type("resume", folder.name, "--json")
    assert code == 0, stderr
    assert [point["status"] for point in json.loads(stdout)["points"]] == ["finished"]
    assert only_run(elsewhere.home).id == run.id
    _, second = attempts(elsewhere.home)
    assert (second.start, second.end) == (saved, 40)


def test_the_forecast_is_measured_and_writes_nothing(elsewhere: Shell) -> None:
    before = set(elsewhere.home.iterdir())
    code, stdout, stderr = elsewhere.type("sweep", "grid.yaml", "--dry-run", "--json")
    assert code == 0, stderr
    forecast = json.loads(stdout)
    assert (forecast["num_trials"], len(forecast["refused"])) == (4, 2)
    # a step of this network takes 0.3 s and a little, whatever else the machine does
    slow = ("--base", "slow.yaml", "--over", "training.learning_rate=1e-3,2e-3,3e-3", "--steps", "40", "--seeds", "1")
    code, stdout, stderr = elsewhere.type("sweep", *slow, "--max-concurrent", "2", "--dry-run", "--json")
    assert code == 0, stderr
    forecast = json.loads(stdout)
    assert START_S + 40 * 0.3 <= forecast["trial_s"] < START_S + 40 * 3
    assert forecast["total_s"] == -(-3 // forecast["max_concurrent"]) * forecast["trial_s"]
    assert not {"runs", "sweeps"} & {path.name for path in set(elsewhere.home.iterdir()) - before}


def test_the_best_point_is_trained_and_says_where_it_comes_from(
    swept_shell: Shell, swept: dict[str, Any], winner: dict[str, Any]
) -> None:
    record = json.loads((swept_shell.home / "runs" / winner["run"] / "run.json").read_text())
    schedule, steps = swept["best"]["point"]["diffusion.schedule"], swept["best"]["point"]["diffusion.num_timesteps"]
    diffusion = record["experiment"]["diffusion"]
    assert (diffusion["schedule"], diffusion["num_timesteps"]) == (schedule, steps)
    assert record["experiment"]["training"]["steps"] == 60  # the base's, not the sweep's
    client = MlflowClient(f"sqlite:///{swept_shell.home}/mlflow.db")
    experiment = client.get_experiment_by_name("ddpm").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`ddpm_pipe.origin` = 'sweep {swept['sweep']}'")
    assert run.data.tags["ddpm_pipe.run_id"] == winner["run"]
    assert client.get_run(run.data.tags["ddpm_pipe.origin_mlflow_run"]).data.tags["kind"] == "sweep"
    assert f"the best point of sweep {swept['sweep']}" in run.data.tags["mlflow.note.content"]


def test_the_worse_trials_are_stopped_early_and_one_that_fails_does_not_end_the_sweep(elsewhere: Shell) -> None:
    code, stdout, stderr = elsewhere.type("sweep", "race.yaml", "--json")
    assert code == 11, stderr
    assert "1 of its trials failed" in stderr
    result = json.loads(stdout)
    by_rate = {point["point"]["training.learning_rate"]: point for point in result["points"]}
    assert result["best"]["point"]["training.learning_rate"] == 3e-3
    assert "diverged at step" in by_rate[1e30]["reasons"][0]
    stopped = [point for point in result["points"] if point["status"] == "stopped"]
    assert stopped  # and the trials after them ran: what they held was given back
    for point in stopped:
        (run,) = point["runs"].values()
        status = json.loads((elsewhere.home / "runs" / run / "status.json").read_text())
        assert status["status"] == "KILLED"
        assert "stopped early" in status["reason"]
        assert 120 <= status["step"] < 240
        assert point["early_kid"]["0"]["0.5"] > by_rate[3e-3]["early_kid"]["0"]["0.5"]
        noted = json.loads((elsewhere.home / "runs" / run / "judgements.jsonl").read_text())
        (name,) = noted["values"]
        assert (noted["rung"], noted["values"][name]) == (0.5, point["early_kid"]["0"]["0.5"])
        assert noted["spreads"][name]["value"] > 0
        assert noted["identities"][name]["num_images"] == 64


def trial_processes(pid: int) -> list[psutil.Process]:
    return [
        p for p in children_of(pid) if "ImplicitFunc" in " ".join(p.cmdline()) or "run_trial" in " ".join(p.cmdline())
    ]


@pytest.mark.fault(1, 20)
@pytest.mark.all
def test_a_trial_resumes_after_a_kill_and_its_sweep_after_ctrl_c_all_in_the_store_of_mlflow_run(
    elsewhere: Shell,
) -> None:
    store, other = (f"sqlite:///{elsewhere.home}/{name}.db" for name in ("chosen", "other"))
    client = MlflowClient(store)
    by_hand = client.create_experiment("by hand", f"file://{elsewhere.home}/artifacts")
    opened = client.create_run(by_hand).info.run_id
    (elsewhere.home / "own.yaml").write_text(f"mlflow: {{tracking_uri: '{other}'}}\n")
    elsewhere.environment |= {"MLFLOW_RUN_ID": opened, "MLFLOW_TRACKING_URI": store}
    arguments = (
        "sweep",
        "--base",
        "slow.yaml",
        "--over",
        "training.learning_rate=1e-3",
        "--steps",
        "40",
        "--seeds",
        "1",
    )
    sweep = elsewhere.start(*arguments, "--cluster", "own.yaml", "-s", "logging.every_steps=1", "--json")

    sweep.wait_for(lambda: newest_step(elsewhere.home) >= 10)
    (trial,) = trial_processes(sweep.pid)
    trial.kill()
    run = only_run(elsewhere.home).folder
    sweep.wait_for(lambda: "attempt 2 starts at step" in (run / "log.txt").read_text())
    sweep.send(signal.SIGINT)
    code, stdout, stderr = sweep.end()
    (folder,) = (elsewhere.home / "sweeps").iterdir()
    assert (code, stdout) == (130, ""), stderr
    assert f"resume with: ddpm-pipe resume {folder.name}" in stderr
    assert json.loads((folder / "status.json").read_text())["status"] == "INTERRUPTED"
    assert ledger(elsewhere.home) == {}  # it is neither done nor failed

    # trials are recorded where the sweep is, in the store and the experiment of `mlflow run`; the profile's has not been made
    (child,) = client.search_runs([by_hand], f"tags.`mlflow.parentRunId` = '{opened}'")
    assert child.data.tags["ddpm_pipe.run_id"] == run.name
    assert not (elsewhere.home / "other.db").exists()

    del elsewhere.environment["MLFLOW_RUN_ID"]
    code, stdout, stderr = elsewhere.type("resume", folder.name, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["points"][0]["status"] == "finished"
    first, second, third = attempts(elsewhere.home)
    require_resume(first, second, every_steps=10)
    assert (third.start, third.end) == (second.end, 40)  # of a signal no step is lost
