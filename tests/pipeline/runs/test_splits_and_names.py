"""What a run's figures are of: the split they judge by, the classes the model was told, and the name they are tracked under."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import DataConfig, experiment_from
from pipeline.console import Console
from pipeline.ingest.ingest import ensure_ingested
from pipeline.metrics.fid import Moments, frechet_distance
from pipeline.metrics.metric_identity import recorded_split
from pipeline.metrics.scores import MOMENTS_FILE
from pipeline.runs.conclude import conclude
from pipeline.runs.runs_table import headline, with_newest
from pipeline.storage.runs import Run
from pipeline.storage.tensor_file import unpack
from pipeline.tracking.tracker import TrackingSettings
from tests.kit import trainer
from tests.kit.commands import Typed
from tests.kit.data import write_parquet
from tests.kit.experiments import TINY

NAMES = ("nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def split_run(home: Path) -> Run:
    """A run on the train split of the digits; in the test split classes have other numbers, as folders in another order give them."""
    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., None]
    source = home / "source"
    write_parquet(source / "data" / "train-00000-of-00001.parquet", pixels[:1197], digits.target[:1197].tolist(), NAMES)
    turned = (9 - digits.target[1197:]).tolist()
    write_parquet(source / "data" / "test-00000-of-00001.parquet", pixels[1197:], turned, NAMES[::-1])
    experiment = experiment_from(
        TINY
        | {
            "data": {"source": str(source), "split": "train"},
            "model": TINY["model"] | {"class_conditional": True},
            "diffusion": {"num_timesteps": 5, "schedule": "cosine"},
            "sampling": {"steps": 2, "batch_size": 100},
            "training": {"steps": 2, "batch_size": 16, "ema_decay": [0.9, 0.5]},
        }
    )
    dataset = ensure_ingested(DataConfig(source=str(source), split="train"), home / "datasets")
    run = Run.create(
        home,
        name="split",
        experiment=experiment.to_dict(),
        config_hash=experiment.hash(""),
        dataset={"path": str(dataset.folder), "fingerprint": dataset.manifest.fingerprint, "name": "digits"},
        profile=Profile(threads_per_worker=1).to_dict(),
        command=["test"],
    )
    trainer.train(str(run.folder))
    return run


def test_figures_are_of_the_split_that_is_asked_for_and_have_names_of_their_own(
    typed: Typed, home: Path, split_run: Run
) -> None:
    def evaluate(*arguments: str) -> dict[str, Any]:
        code, out, err = typed("evaluate", split_run.id, "-n", "130", *arguments, "--json")
        assert code == 0, err
        told: dict[str, Any] = json.loads(out)
        return told

    own = evaluate("--metrics", "fid,bpd")
    summary = split_run.state().summary
    fid, bits = "fid_classifier_n130", "bits_per_dim_train_n130"
    assert (summary[fid], summary[bits]) == (own["values"][fid], own["values"][bits])
    assert own["identities"][fid]["split"] == own["identities"][bits]["split"] == "train"

    other = evaluate("--metrics", "fid,bpd", "--split", "Test")  # which is taken for what it is recorded as
    of_test = ensure_ingested(
        DataConfig(source=str(home / "source"), split="test"), home / "datasets"
    ).manifest.fingerprint
    for key in (fid, "bits_per_dim_test_n130"):
        identity = other["identities"][key]
        assert (identity["split"], identity["dataset"]) == ("test", of_test)
    kept = [unpack((Path(told["written"][0]).parent / MOMENTS_FILE).read_bytes())[1] for told in (own, other)]
    reference, generated = Moments.from_arrays(kept[1], "reference"), Moments.from_arrays(kept[0], "generated")
    assert frechet_distance(reference, generated) == pytest.approx(other["values"][fid], rel=1e-9)
    assert other["values"][fid] != own["values"][fid]
    summary = split_run.state().summary
    apart = f"{fid}/ddim2_eta0_ema_seed0_against_test"
    assert (summary[fid], summary[apart]) == (own["values"][fid], other["values"][fid])
    assert headline(summary) == fid

    # the run's own way of sampling in other words
    same = evaluate("--metrics", "fid", "--sampler", "ddim", "--steps", "2", "--weights", "ema:0.9", "--seed", "0")
    assert same["values"] == {fid: own["values"][fid]}
    assert set(split_run.state().summary) == set(summary)

    # bits/dim of other weights, and of other noise, beside those of the average
    raw = evaluate("--metrics", "bpd", "--weights", "raw")["values"][bits]
    noise = evaluate("--metrics", "bpd", "--seed", "3")["values"][bits]
    summary = split_run.state().summary
    assert summary[bits] == own["values"][bits]
    assert (summary[f"{bits}/raw_seed0"], summary[f"{bits}/ema_seed3"]) == (raw, noise)
    assert len({own["values"][bits], raw, noise}) == 3


def test_a_split_is_recorded_by_the_name_of_what_is_taken() -> None:
    assert recorded_split("val") == recorded_split("dev") == recorded_split("validation") == "validation"
    assert (recorded_split(None), recorded_split("all"), recorded_split("training")) == ("train", "all", "train")


def test_a_setting_that_does_not_fit_costs_a_finished_training_its_scores_alone(home: Path) -> None:
    run = trainer.make_run(
        home,
        training={"steps": 2, "batch_size": 16},
        sampling={"steps": 2},
        diffusion={"num_timesteps": 5, "schedule": "cosine"},
        evaluation={"num_images": 130, "kid_subset_size": 1000, "metrics": ["fid", "kid", "bpd"]},
    )
    trainer.train(str(run.folder))
    ended = conclude(run, Profile(threads_per_worker=1), TrackingSettings.resolve(home), Console(io.StringIO()))
    assert "evaluation.kid_subset_size: got 1000, more than the 130 images" in ended.skipped
    assert f"ddpm-pipe evaluate {run.id} --metrics fid" in ended.skipped
    assert not (run.folder / "features").exists()  # refused before any image was generated
    assert ended.found is not None
    assert (ended.found.scored, ended.found.measured is None) == (
        None,
        False,
    )  # bits/dim were asked for, and can be had
    assert {name: path.is_file() for name, path in ended.pictures.items()} == {"samples": True, "strip": True}
    assert (run.folder / "model").is_dir()


def test_a_figure_that_is_measured_again_is_the_newest() -> None:
    summary = with_newest({"fid_a": 1.0, "fid_b": 2.0, "kid_b": 3.0}, {"fid_a": 0.5})
    assert summary == {"fid_a": 0.5, "fid_b": 2.0, "kid_b": 3.0}
    assert headline(summary) == "fid_a"
    assert headline(with_newest(summary, {"fid_c/ddim10_eta0_raw_seed0": 0.1, "fid_std_c_seeds3": 0.1})) == "fid_a"


def test_a_training_that_is_not_scored_samples_nothing_at_its_end(home: Path) -> None:
    run = trainer.make_run(
        home, training={"steps": 2, "batch_size": 16}, diffusion={"num_timesteps": 50}, evaluation={"enabled": False}
    )
    trainer.train(str(run.folder))
    ended = conclude(run, Profile(threads_per_worker=1), TrackingSettings.resolve(home), Console(io.StringIO()))
    assert (ended.found, ended.pictures) == (None, {})
    assert "nothing drawn (evaluation.enabled is false); score it with: " in ended.skipped
    assert not list(run.folder.glob("pictures/*.png"))
    assert (run.folder / "model").is_dir()
