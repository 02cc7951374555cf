"""The commands that a message proposes: typed as they are printed, they work where the command did that printed them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.commands.output import next_lines
from pipeline.storage.next_command import cluster_in, typeable
from pipeline.storage.provenance import JOB_VARIABLE
from tests.kit.commands import Typed


@pytest.mark.parametrize("words", [["--cluster", "my gpu.yaml"], ["--cluster=my gpu.yaml"]])
def test_a_profile_is_named_again(words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["ddpm-pipe", "train", *words, "-s", "seed=1"])
    assert typeable("ui") == "ddpm-pipe ui --cluster 'my gpu.yaml'"
    assert cluster_in(["ddpm-pipe", "train"]) is None


def test_a_home_elsewhere_is_named_but_not_that_of_a_job(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert typeable("ui") == f"DDPM_PIPE_HOME={home} ddpm-pipe ui"
    monkeypatch.setenv(JOB_VARIABLE, "a-job")
    assert typeable("ui") == "ddpm-pipe ui"


def test_lines_in_errors_name_profile_and_home(typed: Typed, home: Path, tmp_path: Path) -> None:
    (home / "profile.yaml").write_text("kind: local\n")
    elsewhere = tmp_path / "other home"
    elsewhere.mkdir()
    command = ["compare", "--cluster", "profile.yaml"]
    code, _, err = typed(*command, env={"DDPM_PIPE_HOME": str(elsewhere)})
    assert (code, err.split("; ")[-1]) == (
        2, f"DDPM_PIPE_HOME='{elsewhere}' ddpm-pipe evaluate RUN --cluster profile.yaml\n",
    )  # fmt: skip
    code, _, err = typed("resume", "k7m2", "--cluster", "profile.yaml")
    assert code == 2
    assert "`ddpm-pipe train --cluster profile.yaml`" in err


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
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert typeable("ui") == f"DDPM_PIPE_HOME={home}{named.format(here=home)} ddpm-pipe ui"


def test_what_a_line_is_for_stands_behind_it_as_a_comment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    lines = next_lines({"ui": "pages", "sample k7m2": "more images"})
    assert lines == ["next:", "  ddpm-pipe ui           # pages", "  ddpm-pipe sample k7m2  # more images"]
