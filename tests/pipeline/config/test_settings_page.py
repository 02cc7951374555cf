"""docs/settings.md, the JSON schemas for editors, and the files of `ddpm-pipe init`: made from the schema, and nothing is left out."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.config import presets, settings_page
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, load_experiment
from pipeline.config.yaml_files import flatten
from tests.kit.commands import Typed

PRESETS = presets.names("experiments")


def test_the_files_of_docs_are_those_that_the_schema_makes() -> None:
    for path, text in settings_page.documents().items():
        assert path.read_text() == text, f"{path.name}: run python -m pipeline.config.settings_page"


def test_the_page_explains_every_setting_in_one_line() -> None:
    experiment, profile = settings_page.page().split("## Cluster profile")
    for text, settings in ((experiment, Experiment()), (profile, Profile())):
        rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| (.+\.) \|$", text, re.MULTILINE))
        assert set(flatten(settings.to_dict())) <= set(rows)
        assert all(len(line) <= 140 for line in rows.values())


@pytest.mark.parametrize(("kind", "settings"), [("experiments", Experiment), ("cluster", Profile)])
def test_an_editor_accepts_the_shipped_files_and_marks_mistakes(
    kind: str, settings: type[Experiment | Profile]
) -> None:
    check = jsonschema.Draft202012Validator(settings_page.schema_of(settings))
    for name in presets.names(kind):
        check.validate(yaml.safe_load(presets.find(kind, name).read_text()))
    assert not check.is_valid({"trainig": {}})
    assert not check.is_valid({"seed": -1} if settings is Experiment else {"workers": 0})
    if settings is Experiment:
        check.validate({"base": "digits", "training": {"ema_decay": [0.9, 0.99]}})
    else:
        check.validate({"workers": {"min": 1, "max": 2}})


@pytest.mark.parametrize("name", PRESETS)
def test_init_writes_a_preset_with_every_setting_that_it_reads(name: str, tmp_path: Path) -> None:
    path = settings_page.write_experiment(name, tmp_path)
    found = load_experiment(presets.find("experiments", name))
    assert load_experiment(path) == found
    written = list(flatten(yaml.safe_load(path.read_text())))
    known = [key for key in flatten(Experiment().to_dict()) if key not in ("model.arguments", "model.latent_dim")]
    assert written == known or found.model.type == "vae"
    for before, line in pairwise(path.read_text().splitlines()):
        assert not re.match(r" *\w+:", line) or re.match(r" *# .*\.( \(.+; default: .+\))?$", before), line


def test_init_writes_what_other_networks_read(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "betas.txt").write_text("0.1 0.2 0.3")
    own = "base: digits\nmodel: {type: 'my:Net', arguments: {width: 64}}\ndiffusion: {betas_file: betas.txt}\nsampling: {steps: 2}\n"
    (other / "own.yaml").write_text(own)
    path = settings_page.write_experiment(str(other / "own.yaml"), tmp_path)
    assert load_experiment(path) == load_experiment(other / "own.yaml")
    assert "channels:" not in path.read_text()
    vae = settings_page.write_experiment("digits-vae", tmp_path).read_text()
    unread = {"diffusion:", "objective:", "eta:", "num_res_blocks:", "arguments:"}
    assert not unread & set(vae.split())
    assert {"latent_dim:", "batch_size:", "learning_rate:"} <= set(vae.split())


def test_init_prints_path_and_next_command_and_overwrites_nothing(
    typed: Typed, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert typed("init") == (0, f"{home / 'digits.yaml'}\nnext: ddpm-pipe train digits.yaml --dry-run\n", "")
    assert typed("train", "digits.yaml", "--dry-run", "--no-probe")[0] == 0
    (home / "digits.yaml").write_text("mine")
    code, out, err = typed("init", "digits")
    assert (code, out) == (2, "")
    assert (
        "digits.yaml: got a name that is taken, expected a new file. Train with it (ddpm-pipe train digits.yaml)" in err
    )
    assert (home / "digits.yaml").read_text() == "mine"
    (home / "mnist.yaml").symlink_to("nowhere")
    assert typed("init", "mnist")[0] == 2
    code, _, err = typed("init", "mnits")
    assert code == 2
    assert "did you mean 'mnist'" in err


def test_a_file_in_a_checkout_names_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "yaml-language-server" not in settings_page.write_experiment("mnist", tmp_path).read_text()
    docs = tmp_path / "checkout" / "docs"
    (docs / "deep").mkdir(parents=True)
    (docs / settings_page.EXPERIMENT_SCHEMA).touch()
    monkeypatch.setattr(settings_page, "DOCS", docs)
    first = settings_page.write_experiment("mnist", docs / "deep").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../experiment.schema.json"
