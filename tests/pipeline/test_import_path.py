"""A user's files may be called like our modules and libraries: the installed ones win, in the command and in what Ray starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.import_path import LATE_FOLDERS, allow_modules_in, environment_for_ray, replacing
from tests.kit.commands import Started

TAKEN = "raise SystemExit('a file of the user was imported in place of an installed module')\n"
OWN = """
name: own
model: {type: "own:Net"}
training: {steps: 2, batch_size: 16}
logging: {grid_every_steps: null}
evaluation: {enabled: false}
sampling: {steps: 2}
"""
NAMES = ("pipeline.py", "ray.py", "mlflow.py", "click.py", "torch.py", "numpy.py", "pydantic.py", "random.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a user's with modules called like others, and a network."""
    place = tmp_path / "user"
    (place / "ddpm").mkdir(parents=True)
    (place / "ddpm" / "__init__.py").write_text(TAKEN)
    for name in NAMES:
        (place / name).write_text(TAKEN)
    (place / "own.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net = nn.Conv2d(1, 1, 3, padding=1)\n\n    def forward(self, x, t):\n        return self.net(x)\n"
    )
    (place / "own.yaml").write_text(OWN)
    return place


def test_installed_modules_win_over_pythonpath_and_the_current_folder(
    folder: Path, home: Path, start: Callable[..., Started]
):
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    found = start(
        *("train", "own.yaml", "--dry-run", "--no-probe"),
        cwd=folder,
        env={"PYTHONPATH": path, "DDPM_PIPE_HOME": str(home)},
    ).end()
    assert found.code == 0, found.stderr
    assert "own:Net" in found.stdout + found.stderr


def test_names_of_libraries_and_of_the_standard_library_are_found():
    files = ["ray.py", "ddpm/__init__.py", "random.py", "own.py", "docs/ray.py", "torch/notes.txt", "tools/__init__.py"]
    assert replacing(files) == ["ddpm/__init__.py", "random.py", "ray.py"]


def test_folders_that_would_replace_a_library_come_last_in_the_processes_of_ray(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "plain").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(tmp_path / "plain"), str(tmp_path / "absent")]))
    found = environment_for_ray()
    assert found == {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "plain"), str(tmp_path / "absent")]),
        LATE_FOLDERS: str(folder),
    }
    monkeypatch.setenv(LATE_FOLDERS, found[LATE_FOLDERS])
    monkeypatch.setattr(sys, "path", ["first", "second"])
    allow_modules_in(str(tmp_path))
    assert sys.path == ["first", "second", str(tmp_path), str(folder)]


def test_without_such_folders_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert environment_for_ray() == {}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.all
def test_a_training_with_two_workers_in_such_a_folder(folder: Path, start: Callable[..., Started], home: Path):
    (folder / "two.yaml").write_text("workers: 2\nresources_per_worker: {CPU: 1}\nthreads_per_worker: 1\n")
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    found = start(
        *("train", "own.yaml", "--cluster", "two.yaml"),
        cwd=folder,
        env={"PYTHONPATH": path, "DDPM_PIPE_HOME": str(home)},
    ).end()
    assert found.code == 0, found.stderr
