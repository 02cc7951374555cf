"""The commands that a command proposes: typed as they are printed, they work where it did."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.context import Context, cluster_in
from pipeline.storage.provenance import JOB_VARIABLE


@pytest.mark.parametrize("words", [["--cluster", "my gpu.yaml"], ["--cluster=my gpu.yaml"]])
def test_a_profile_is_named_again(words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    command = ["ddpm-pipe", "train", *words, "-s", "seed=1"]
    assert Context.load("local", command).typed("ui") == "ddpm-pipe ui --cluster 'my gpu.yaml'"
    assert cluster_in(["ddpm-pipe", "train"]) is None


def test_a_home_elsewhere_is_named_but_not_that_of_a_job_or_of_a_profile(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert Context.load(None).typed("ui") == f"DDPM_PIPE_HOME={home} ddpm-pipe ui"
    profile = here / "profile.yaml"
    profile.write_text(f"storage: {home}\n")
    command = ["ddpm-pipe", "train", "--cluster", "profile.yaml"]
    assert Context.load("profile.yaml", command).typed("ui") == "ddpm-pipe ui --cluster profile.yaml"
    monkeypatch.setenv(JOB_VARIABLE, "a-job")
    assert Context.load(None).typed("ui") == "ddpm-pipe ui"


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("sqlite:///mlflow.db", " MLFLOW_TRACKING_URI=sqlite:///{here}/mlflow.db"),
        ("http://127.0.0.1:9", " MLFLOW_TRACKING_URI=http://127.0.0.1:9"),
        ("http://me:password@127.0.0.1:9", ""),
    ],
)
def test_mlflow_run_chooses_folder_and_store_which_are_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, uri: str, named: str
) -> None:
    """Without them `ddpm-pipe ui` would open the store of the home, which is empty."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    context = Context.load(None)
    monkeypatch.delenv("MLFLOW_RUN_ID")  # taken out by the tracking settings
    assert context.typed("ui") == f"DDPM_PIPE_HOME={home}{named.format(here=home)} ddpm-pipe ui"


def test_what_a_line_is_for_stands_behind_it_as_a_comment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    lines = Context.load(None, ["ddpm-pipe", "train"]).next_lines({"ui": "pages", "sample k7m2": "more images"})
    assert lines == ["next:", "  ddpm-pipe ui           # pages", "  ddpm-pipe sample k7m2  # more images"]
