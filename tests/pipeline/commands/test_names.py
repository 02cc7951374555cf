"""Names of files, folders, classes and experiments that are not UTF-8, long, or with spaces: taken, or one line says what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.experiment import load_experiment
from pipeline.redaction import redact
from tests.kit.commands import Typed

LATIN = os.fsdecode(b"caf\xe9")


def folder_of_images(folder: Path, *classes: str, name: str = "x") -> Path:
    for label in classes:
        (folder / label).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / label / f"{number}{name}.png")
    return folder


@pytest.mark.parametrize("name", [LATIN, "y" * 240, "my name", "two\nlines", "#3"])
def test_classes_and_images_of_any_name_are_taken_and_shown(typed: Typed, home: Path, name: str) -> None:
    folder_of_images(home / "images", name, "other", name=name)
    code, out, err = typed("ingest", "images", "set")
    assert (code, "classes: 2" in err) == (0, True), err
    assert name in out
    code, out, err = typed("inspect", "set", "--json")
    assert code == 0, err
    assert json.loads(out)["classes"] == sorted([name, "other"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ingest", "images", LATIN], "got a name that is not UTF-8, expected one that is. Rename it."),
        (["ingest", "images", "z" * 300], f"{'z' * 80}...: got a name of 300 characters, expected a shorter one."),
        (["train", "z" * 300], f"{'z' * 80}...: got a name of 300 characters, expected a shorter one."),
        (["train", "--data", "z" * 300], "got a name of 300 characters, expected a shorter one."),
    ],
)
def test_a_name_that_cannot_be_used_is_one_line(typed: Typed, home: Path, words: list[str], message: str) -> None:
    folder_of_images(home / "images", "a", "b")
    code, out, err = typed(*words)
    assert (code, out) == (2, "")
    assert err.endswith(f"{message}\n")


def test_an_experiment_has_its_files_name_in_letters_that_every_store_takes(tmp_path: Path) -> None:
    for stem, name in {"my exp": "my-exp", LATIN: "caf", "q" * 100: "q" * 64}.items():
        (tmp_path / f"{stem}.yaml").write_text("base: digits\n")
        assert load_experiment(tmp_path / f"{stem}.yaml", []).name == name


def test_what_leaves_is_utf_8() -> None:
    assert redact(f"/data/{LATIN}") == "/data/caf\\udce9"
