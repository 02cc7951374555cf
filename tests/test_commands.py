"""What a user mistypes or asks for in vain: one line, a documented exit code, nothing half-written. And dry runs, which write nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.gpus import usable_gpus
from pipeline.tracking.tracker import Tracker, TrackingSettings
from tests.kit import trainer
from tests.kit.commands import run_command as run

MISTAKES = {
    "unknown key": (["-s", "training.learning_rat=1"], 2, "did you mean 'learning_rate'"),
    "unknown section": (["-s", "trainig.steps=1"], 2, "did you mean 'training'"),
    "out of range": (["-s", "training.steps=0"], 2, "training.steps: got 0"),
    "not finite": (["-s", "training.learning_rate=.inf"], 2, "not finite"),
    "no value": (["-s", "training.steps"], 2, "expected key=value"),
    "T of one": (["-s", "diffusion.num_timesteps=1"], 2, "num_timesteps"),
    "refused schedule": (
        ["-s", "diffusion={schedule: linear, num_timesteps: 15}", "-s", "sampling.steps=5"],
        2,
        "linear_raw",
    ),
    "unknown schedule": (["-s", "diffusion.schedule=cosin"], 2, "cosine"),
    "unknown prediction": (["-s", "diffusion.prediction=epsilon"], 2, "eps"),
    "network that does not fit": (["-s", "model.channel_multipliers=[1,2,2,2,2]"], 2, "model:"),
    "groups that do not divide": (["-s", "model.norm_groups=7"], 2, "model:"),
    "batch above the dataset": (["-s", "training.batch_size=4096"], 2, "more than the dataset's 1797"),
    "streams that do not divide": (["-s", "training.num_streams=7"], 2, "does not divide batch_size"),
    "unknown preset": (["--preset", "digit"], 2, "did you mean 'digits'"),
    "file and preset": (["x.yaml", "--preset", "digits"], 2, "give one of them"),
    "missing file": (["x.yaml"], 2, "no such file"),
    "missing data": (["--data", "nowhere/at/all"], 3, "nowhere/at/all"),
    "unknown profile": (["--cluster", "gpus"], 2, "did you mean 'gpu'"),
    "unknown network module": (["-s", "model={type: 'no_such_module:Net'}"], 2, "cannot import 'no_such_module'"),
    "unknown network class": (["-s", "model={type: 'torch.nn:Linearr'}"], 2, "did you mean 'Linear'"),
    "network that refuses its arguments": (
        ["-s", "model={type: 'torch.nn:Linear', arguments: {a: 1}}"],
        2,
        "refused them",
    ),
    "something that is no network": (
        ["-s", "model={type: 'collections:OrderedDict'}"],
        2,
        "expected a torch.nn.Module",
    ),
    "unknown option": (["--stepz", "1"], 2, "No such option"),
}


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "real"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistyped_training_ends_in_one_line_and_makes_no_run(typed, home, mistake, dry):
    arguments, code, told = MISTAKES[mistake]
    got, out, err = typed("train", *arguments, *(["--dry-run"] if dry else []))
    assert (got, out) == (code, ""), err
    last = err.strip().splitlines()[-1]
    assert last.startswith("ddpm-pipe: ")
    assert told in last
    assert "Traceback" not in err
    assert not (home / "runs").exists()
    assert not (home / "mlflow.db").exists()


def test_a_dry_run_tells_and_writes_nothing(typed, home):
    code, out, err = typed("train", "--dry-run", "-s", "diffusion.schedule=quadratic", "-s", "training.batch_size=100")
    assert (code, err) == (0, "")
    assert "schedule: quadratic" in out
    assert "1,797 of 1x8x8" in out
    assert "steps per epoch: 18.0" in out
    assert "images/s" in out
    assert list(home.iterdir()) == []


def test_a_dry_run_of_a_preset_whose_data_must_be_downloaded_says_so(typed, home):
    code, out, _ = typed("train", "--preset", "ddpm-cifar10", "--dry-run", "--no-probe")
    assert code == 0
    assert "download" in out
    assert "35,746,307" in out  # the paper's network, known without the images
    assert list(home.iterdir()) == []


def test_a_dry_run_knows_what_the_papers_network_weighs(typed, home):
    import numpy as np

    np.savez(home / "images.npz", images=np.random.default_rng(0).integers(0, 256, (130, 32, 32, 3), dtype=np.uint8))
    assert run(["ingest", "images.npz", "data"]) == 0
    typed("runs")
    code, out, _ = typed("train", "--preset", "ddpm-cifar10", "--data", "data", "--dry-run", "--no-probe", "--json")
    plan = json.loads(out)
    assert (code, plan["num_parameters"]) == (0, 35_746_307)  # REFERENCE: Ho et al. 2020
    assert plan["checkpoint_bytes"] == 16 * 35_746_307
    assert plan["steps_per_epoch"] == 130 / 128


def test_more_workers_than_the_machine_holds_are_named_at_once(typed, home):
    (home / "many.yaml").write_text("workers: 64\nresources_per_worker: {CPU: 1}")
    code, _, err = typed(
        "train", "--cluster", "many.yaml", "-s", "training.batch_size=64", "-s", "training.num_streams=64"
    )
    assert code == 8
    assert "64 workers" in err
    assert "on this machine, expected 64 for 64 workers" in err


def test_workers_that_do_not_divide_the_streams_are_refused_with_those_that_do(typed, home):
    (home / "three.yaml").write_text("workers: 3")
    code, _, err = typed("train", "--cluster", "three.yaml")
    assert code == 2
    assert "use 1, 2, 4, 8 or 16 workers" in err


@pytest.mark.parametrize(
    "text", ["workers: 0", "worker: 2", "workers: {min: 3, max: 2}", "env: {A: [1]}", "kind: cloud"]
)
def test_a_bad_profile_is_reported(typed, home, text):
    (home / "bad.yaml").write_text(text)
    code, _, err = typed("train", "--cluster", "bad.yaml")
    assert code == 2
    assert "bad.yaml" in err


@pytest.mark.fault(7)
def test_a_home_that_cannot_be_written_is_reported(typed, home):
    (home / "file").write_text("")
    code, _, err = typed("train", env={"DDPM_PIPE_HOME": str(home / "file" / "home")})
    assert code == 6, err
    assert str(home / "file") in err


@pytest.mark.parametrize("command", ["resume", "sample", "evaluate", "sync"])
def test_unknown_runs_are_reported(typed, trained, command):
    code, _, err = typed(command, "zzzz")
    assert code == 2
    assert trained.id in err


@pytest.mark.fault(22)
def test_a_resume_with_other_settings_is_refused_field_by_field(typed, trained):
    code, _, err = typed("resume", trained.id, "-s", "diffusion.num_timesteps=500", "-s", "seed=1")
    assert code == 4
    assert "diffusion.num_timesteps: 1000 -> 500" in err
    assert "seed: 0 -> 1" in err
    assert "--fork" in err


def test_a_number_of_trials_is_for_sweeps_alone(typed, trained):
    code, _, stderr = typed("resume", "latest", "--max-concurrent", "2")
    assert code == 2
    assert "latest is no sweep" in stderr


@pytest.mark.fault(22)
def test_a_resume_on_other_images_is_refused(typed, trained, home):
    import numpy as np

    folder = Path(trained.record.dataset["path"])
    folder.rename(home / "the real ones")
    np.savez(home / "other.npz", images=np.zeros((40, 8, 8, 1), dtype=np.uint8))
    assert run(["ingest", str(home / "other.npz"), str(folder)]) == 0
    typed("runs")
    code, _, err = typed("resume", trained.id)
    assert code == 4
    assert trained.record.dataset["fingerprint"][:12] in err


def test_samples_are_the_same_bytes_however_many_are_asked_for(typed, trained, home):
    for count in ("3", "7"):
        code, _, err = typed(
            "sample", trained.id, "-n", count, "--steps", "4", "--format", "png", "--out", f"out{count}"
        )
        assert code == 0, err
    names = [f"{i:06d}.png" for i in range(3)]
    assert all((home / "out3" / n).read_bytes() == (home / "out7" / n).read_bytes() for n in names)
    assert (home / "out3" / names[0]).read_bytes() != (home / "out3" / names[1]).read_bytes()
    assert json.loads((home / "out7" / "samples.json").read_text())["steps"] == 4
    code, _, err = typed("sample", trained.id, "--out", "out3")
    assert code == 2
    assert "not an empty folder" in err


def test_samples_as_parquet_hold_the_bytes_of_the_png_files(typed, trained, home):
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    for form in ("png", "parquet"):
        assert typed("sample", trained.id, "-n", "4", "--steps", "2", "--format", form, "--out", form)[0] == 0
    rows = pq.read_table(home / "parquet" / "samples.parquet", page_checksum_verification=True)["image"].to_pylist()
    for index, row in enumerate(rows):
        with Image.open(home / "png" / f"{index:06d}.png") as picture:
            assert np.asarray(picture).tobytes() == row


def test_sampling_steps_beyond_the_process_are_reported(typed, trained):
    code, _, err = typed("sample", trained.id, "--steps", "1001")
    assert code == 2
    assert "T = 1000" in err


def test_a_checkpoint_that_is_not_there_is_reported_with_those_that_are(typed, trained):
    code, _, err = typed("sample", trained.id, "--checkpoint", "17")
    assert code == 2
    assert "there are: 28, 30" in err


def test_dry_runs_of_sample_and_evaluate_compute_nothing(typed, trained):
    before = sorted(path for path in trained.folder.rglob("*"))
    for command in ("sample", "evaluate"):
        code, out, _ = typed(command, trained.id, "--dry-run", "--json")
        assert code == 0
        assert json.loads(out)["sampler"] == "ddim"
    assert sorted(path for path in trained.folder.rglob("*")) == before


def test_the_latest_run_that_has_a_model_is_sampled_and_scored(typed, trained, new_run):
    newer = new_run()
    said = f"latest: run {trained.id} ({trained.record.name}); newer ones that were skipped: {newer.id} (no checkpoint yet)"
    for words in (["sample"], ["sample", "--format", "strip"], ["evaluate"], ["evaluate", "--grid", "steps=2,3"]):
        code, out, err = typed(words[0], "latest", *words[1:], "--dry-run", "--json")
        assert (code, json.loads(out)["run"], err.splitlines()[0]) == (0, trained.id, said)
    imported = new_run(dataset={"path": "", "fingerprint": "", "name": "none"}, imported_from="/x")
    imported.update(status="FINISHED")
    skipped = f"{imported.id} (imported), {newer.id} (finished)"
    newer.update(status="FINISHED", step=100)
    trained.update(status="INTERRUPTED")
    _, _, err = typed("resume", "latest")
    assert err.splitlines()[0].endswith(
        f"run {trained.id} ({trained.record.name}); newer ones that were skipped: {skipped}"
    )


def test_sync_delivers_to_the_store_of_the_runs_own_profile(typed, home):
    from pipeline.config.cluster_profile import Profile

    elsewhere = home / "elsewhere.db"
    profile = Profile.model_validate({"mlflow": {"tracking_uri": f"sqlite:///{elsewhere}", "experiment": "mine"}})
    made = trainer.make_run(home, profile=profile)
    tracker = Tracker(made.folder, TrackingSettings("http://127.0.0.1:9", "mine"))  # nobody listens there
    tracker.start("tiny", {}, {}, "", None)
    tracker.metrics(1, {"loss": 0.5})
    assert not tracker.close()
    code, out, err = typed("sync", made.id)
    assert code == 0, err
    assert str(elsewhere) in out
    assert elsewhere.exists()
    assert not (home / "mlflow.db").exists()


def test_ingest_says_which_split_it_took(typed, home):
    import numpy as np
    from PIL import Image

    for split in ("train", "test"):
        folder = home / "set" / split
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(folder / "a.png")
    code, _, err = typed("ingest", "set", "data")
    assert code == 0, err
    assert "taking split 'train'" in err


@pytest.mark.parametrize("preset", ["ddpm-celebahq-256", "ddpm-lsun-256"])
def test_a_dry_run_without_the_images_prints_the_rest_and_how_to_get_them(typed, preset):
    code, out, _ = typed("train", "--preset", preset, "--dry-run")
    assert code == 0
    assert "113,673,219" in out  # REFERENCE: Ho et al. 2020
    assert re.search(
        r"data: +data/\S+-256 is not here: .*https://.*ddpm-pipe ingest FOLDER data/\S+ --image-size 256 --mode RGB",
        out,
    )
    assert re.search(r"missing: +the images", out)
    code, _, err = typed("train", "--preset", preset)
    assert (code, "is not here" in err) == (3, True)


@pytest.mark.skipif(usable_gpus() > 0, reason="this machine has a GPU")
def test_a_dry_run_for_another_machine_prints_what_is_missing_here(typed):
    code, out, _ = typed("train", "--cluster", "gpu", "--dry-run")
    assert code == 0
    assert re.search(r"parameters: +651,041", out)
    assert re.search(r"missing: +profile 'gpu': got 0 usable GPUs on this machine, expected 1", out)
    code, _, err = typed("train", "--cluster", "gpu")
    assert (code, "got 0 usable GPUs" in err) == (8, True)


def test_a_dry_run_says_which_scores_would_mean_nothing(typed, home):
    np.savez(home / "few.npz", images=np.zeros((200, 32, 32, 3), np.uint8))
    asked = ("train", "--preset", "ddpm-cifar10", "--data", "few.npz", "--dry-run", "--no-probe")
    code, out, _ = typed(*asked)
    assert code == 0
    assert "will not be scored: Inception's features need 4,096 images on each side" in out
    assert "and half of 200 images give 100" in out
    assert "will not be scored" not in typed(*asked, "-s", "evaluation.metrics=[bpd]")[1]


@pytest.mark.parametrize("words", [["train", "--dry-run", "--no-probe"], ["evaluate", "latest", "--dry-run"], ["runs"]])
def test_a_profile_is_read_once(home, trained, words):
    (home / "here.yaml").write_text("workers: 1")
    code = """
import sys
from pipeline.cli import main
opened = []
sys.addaudithook(lambda event, told: event == "open" and opened.append(str(told[0])))
sys.argv = ["ddpm-pipe", *sys.argv[1:]]
try:
    main()
finally:
    print(len([path for path in opened if path.endswith("here.yaml")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--cluster", "here.yaml"],
        cwd=home,
        env={**os.environ, "DDPM_PIPE_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1"
