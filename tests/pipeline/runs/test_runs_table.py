"""What `ddpm-pipe runs` lists and what a run's description says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.config.experiment import Experiment, with_overrides
from pipeline.runs.record import Trial
from pipeline.runs.runs_table import COLUMNS, headline, runs_table
from pipeline.runs.tracked import _recorded_settings
from pipeline.storage.runs import Run
from pipeline.tracking.monitor import sample_system
from pipeline.tracking.text import describe
from pipeline.worker.job import Allowance
from tests.hermetic import REPOSITORY
from tests.kit.commands import Typed


@pytest.mark.parametrize("steps", ["x", "\0", [], {"a": 1}, 1e400])
def test_damaged_settings_hide_no_run(new_run: Callable[..., Run], home: Path, steps: object) -> None:
    run = new_run()
    record = json.loads((run.folder / "run.json").read_text())
    record["experiment"] |= {"training": {"steps": steps}}
    (run.folder / "run.json").write_text(json.dumps(record))
    for override in ("seed=1", "training.steps"):
        run.update(overrides=[override])
        assert [row["id"] for row in runs_table(home)] == [run.id]


def test_a_row_says_what_a_run_was_and_how_far_it_came(new_run: Callable[..., Run], home: Path) -> None:
    assert runs_table(home) == []
    first, second = new_run(name="one"), new_run(name="two")
    first.update(
        status="FINISHED",
        step=100,
        summary={"kid_x": 0.1, "fid_classifier-ab_500": 12.5, "yardstick_real_half_fid_b": 1.0},
    )
    second.update(status="RUNNING", step=40, overrides=["training.steps=250", "name=x"])
    rows = runs_table(home)
    assert [row["id"] for row in rows] == [first.id, second.id]
    assert set(COLUMNS) <= set(rows[0])
    assert {key: rows[0][key] for key in ("name", "dataset", "schedule", "T", "steps", "fid", "metric", "status")} == {
        "name": "one",
        "dataset": "digits",
        "schedule": "cosine",
        "T": 50,
        "steps": "100/100",
        "fid": 12.5,
        "metric": "fid_classifier-ab_500",
        "status": "FINISHED",
    }
    assert (rows[1]["steps"], rows[1]["status"], rows[1]["fid"]) == ("40/250", "INTERRUPTED", None)
    json.dumps(rows)


def test_the_list_is_a_screenful_newest_first_and_says_how_many_are_not_shown(
    new_run: Callable[..., Run], typed: Typed, home: Path
) -> None:
    ids = [new_run().id for _ in range(22)]
    *table, last = typed("runs").stdout.splitlines()[1:]
    assert [line.split()[0] for line in table] == ids[:1:-1]
    assert last == "2 older runs not shown; list all with: ddpm-pipe runs --limit 22"
    assert [line.split()[0] for line in typed("runs", "--limit", "22").stdout.splitlines()[1:]] == ids[::-1]
    assert [row["id"] for row in json.loads(typed("runs", "--json").stdout)] == ids[::-1]
    Run(home / "runs" / ids[-1]).update(status="RUNNING", step=4)  # by nobody
    (home / "profile.yaml").write_text("{}")
    line = typed("runs", "--cluster", "profile.yaml").stdout.splitlines()[-1]
    assert line.endswith(f"ddpm-pipe resume {ids[-1]} --cluster profile.yaml")
    assert [row["id"] for row in json.loads(typed("runs", "--json", "--limit", "1").stdout)] == ids[-1:]


def test_an_imported_run_has_the_steps_of_its_training_where_they_are_known(
    new_run: Callable[..., Run], home: Path
) -> None:
    known, unknown = new_run(imported_from="/a"), new_run(imported_from="/b")
    known.update(status="FINISHED", step=40)
    unknown.update(status="FINISHED")
    assert [(row["steps"], row["total_steps"]) for row in runs_table(home)] == [("40", None), (None, None)]


@pytest.mark.parametrize(("typed", "steps"), [("1e4", 10_000), ("1_000", 1000), ("' 250'", 250), ("250.0", 250)])
def test_the_steps_of_a_resume_are_read_as_the_settings_are(
    new_run: Callable[..., Run], home: Path, typed: str, steps: int
) -> None:
    override = f"training.steps={typed}"
    assert with_overrides(Experiment(), [override]).training.steps == steps
    new_run().update(overrides=["training.steps=7", override])
    (row,) = runs_table(home)
    assert (row["total_steps"], row["steps"]) == (steps, f"0/{steps}")


def test_the_headline_is_the_newest_fid_and_never_a_yardstick() -> None:
    assert headline({}) is None
    assert headline({"kid": 1.0, "yardstick_noise_fid_b": 2.0}) is None
    assert headline({"fid_a": 1.0, "fid_b": 2.0, "yardstick_noise_fid_b": 3.0}) == "fid_b"
    assert headline({"fid_a_seeds3": 1.0, "fid_std_a_seeds3": 0.1}) == "fid_a_seeds3"


def test_listing_runs_needs_no_mlflow_and_no_torch(run: Run, home: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from pipeline.runs.runs_table import runs_table
import pipeline.tracking.ui, pipeline.tracking.tracker
assert len(runs_table(Path({str(home)!r}))) == 1
heavy = {{"mlflow", "torch", "ray", "pandas", "numpy", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_the_description_tells_a_reader_what_it_was_what_came_out_and_how_to_do_it_again(
    new_run: Callable[..., Run],
) -> None:
    run = new_run(
        experiment=Experiment().to_dict(),
        command=["ddpm-pipe", "train", "--data", "/my data", "-s", "training.steps=5"],
    )
    summary = {
        "fid_classifier_n500": 12.3456789,
        "kid_classifier_n500": 0.25,
        "yardstick_real_half_fid_classifier_n500": 1.0,
        "yardstick_noise_fid_classifier_n500": 300.0,
        "yardstick_noise_kid_classifier_n500": 4.0,
    }
    described = describe(run, summary)
    cells = [cell for line in described.splitlines() if line.startswith("| ") for cell in line.split("|")[1:-1]]
    assert all(
        cell.strip() == "---" or cell.endswith("&nbsp; ") for cell in cells
    )  # MLflow's page puts no distance between cells
    text = described.replace("&nbsp;", "").replace("  ", " ")
    for part in (
        "`digits`", "linear, T = 1,000", "800,000 steps", "batch of 128", "128 channels x (1, 2, 2, 2)", "ddim, 50 steps",
        "| figure | this model | real half | noise |",
        "| `score/fid_classifier_n500` | 12.35 | 1 | 300 |", "| `score/kid_classifier_n500` | 0.25 | | 4 |", "abababab",
        "ddpm-pipe train --data '/my data' -s training.steps=5", f"ddpm-pipe resume {run.id}", run.record.code_version,
    ):  # fmt: skip
        assert part in text, part
    assert "Not scored yet" in describe(run, {})
    assert "Changed by" not in text
    run.update(overrides=["training.steps=8", "sampling.steps=20", "training.steps=12"])
    resumed = describe(run, summary)
    for part in ("12 steps", "ddim, 20 steps", "Changed by `resume`: `training.steps=12`, `sampling.steps=20`.",
        "ddpm-pipe train --data '/my data' -s training.steps=5 -s training.steps=12 -s sampling.steps=20",
    ):  # fmt: skip
        assert part in resumed, part


def test_of_a_trial_that_the_clock_ends_the_description_tells_minutes_and_the_steps_that_they_were(
    new_run: Callable[..., Run],
) -> None:
    trial = Trial("k7m2", "key", {}, "linear", 0, Allowance(seconds=300.0))
    run = new_run(experiment={"training": {"steps": 10**9, "batch_size": 64}}, trial=trial.to_json())
    assert "5 minutes of training at a batch of 64." in describe(run, {})
    told = describe(run, {"fid_x_n1": 1.0}, 2345)
    assert "5 minutes of training (2,345 steps) at a batch of 64." in told
    assert "1,000,000,000" not in told
    (row,) = runs_table(run.folder.parent.parent)
    assert (row["steps"], row["total_steps"]) == ("0", None)
    experiment = Experiment()
    assert set(experiment.flat()) - set(_recorded_settings(experiment, trial)) == {"training.steps"}
    assert _recorded_settings(experiment, None) == experiment.flat()


def test_the_machine_is_sampled_in_the_kernels_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's pages with figures of our own: of 100 s of all cores 75 are spent with work, between one look and the next."""
    here = tmp_path / str(os.getpid())
    here.mkdir()
    for name in ("stat", "status"):  # which process this is
        shutil.copy(f"/proc/self/{name}", here)
    pages = 300 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    (here / "statm").write_text(f"{2 * pages} {pages} 0 0 0 0 0\n")
    (tmp_path / "meminfo").write_text(
        "".join(
            f"{name}: {size} kB\n"
            for name, size in {
                "MemTotal": 1_000_000,
                "MemFree": 100_000,
                "MemAvailable": 400_000,
                "Buffers": 0,
                "Cached": 300_000,
                "Shmem": 0,
                "Active": 0,
                "Inactive": 0,
            }.items()
        )
    )
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    found = []
    # user, nice, system, idle, iowait, irq, softirq, steal, guest (which user has), guest_nice; in hundredths of a second
    for spent in ((1000, 0, 500, 8000, 400, 0, 0, 0, 100, 0), (6000, 500, 2000, 9500, 1400, 0, 500, 0, 3100, 0)):
        (tmp_path / "stat").write_text(f"cpu {' '.join(map(str, spent))}\n")
        found.append(sample_system())
    assert found[1] == {
        "cpu_utilization_percentage": pytest.approx(75),
        "system_memory_usage_percentage": pytest.approx(60),
        "process_memory_usage_megabytes": pytest.approx(300 * 1.048576),
    }
