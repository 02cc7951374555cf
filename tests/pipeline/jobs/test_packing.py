"""What is sent with a job, file by file, and how its secrets and its log travel."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import cli
from pipeline.cli_in_job import invoke
from pipeline.commands.submit import typed_parameters
from pipeline.errors import UsageError
from pipeline.jobs import packing
from pipeline.jobs.job_log import RESULT_MARK, LogLines
from pipeline.jobs.job_secrets import halves, joined
from pipeline.jobs.submit import ENTRY

SENT = ["own.py", "net/deep.py", "conf/a b.yaml", "secrets.py", "notes.md", "runs.py"]
KEPT = [
    *(
        ".hg/store",
        "net/__pycache__/deep.pyc",
        ".venv/bin/python",
        ".mypy_cache/x",
        "mlflow.db",
        "mlruns/0/meta.yaml",
        "run.log",
    ),
    *(
        "runs/k7m2/run.json",
        "datasets/d/manifest.json",
        "data/x.parquet",
        "weights.safetensors",
        "photo.png",
        "set.npz",
    ),
    *(
        ".env",
        "prod.env",
        "sub/.env.local",
        "key.pem",
        ".ssh/id_rsa",
        "id_ed25519",
        ".aws/credentials",
        "gcp-credentials.json",
    ),
    *(".ENV", "Credentials.json", "ID_RSA", "data/DSC0001.JPG", "Backup.Zip"),
    *(".netrc", "auth_token", "my-secret.yaml", "kubeconfig", ".kube/config", "terraform.tfstate", ".pypirc"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    for name in (*SENT, *KEPT):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return root


def test_code_and_settings_travel_and_nothing_else(folder):
    package, _ = packing.working_folder(folder, ())
    assert sorted(package.files) == sorted(SENT)


def test_a_file_with_a_token_in_it_stays_and_is_named(folder):
    (folder / "notes.md").write_text("use hf_" + "a1B2c3D4e5F6g7H8i9k0L1m2N3o4P5q6R7 for the hub\n")
    package, _ = packing.working_folder(folder, ())
    assert "notes.md" not in package.files
    assert package.left_out == ["notes.md"]


def test_links_that_lead_out_of_the_folder_are_not_followed(folder, tmp_path):
    (tmp_path / "private.txt").write_text("mine")
    (folder / "link.txt").symlink_to(tmp_path / "private.txt")
    (folder / "etc").symlink_to("/etc")
    package, _ = packing.working_folder(folder, ())
    assert sorted(package.files) == sorted(SENT)


def test_what_git_ignores_stays(folder):
    (folder / ".gitignore").write_text("net/\n")
    git(folder, "init", "-q")
    package, _ = packing.working_folder(folder, ())
    assert sorted(package.files) == sorted({*SENT, ".gitignore"} - {"net/deep.py"})


def failing_git(monkeypatch: pytest.MonkeyPatch, places: Path, script: str) -> None:
    """Put a git first on PATH that is a shell script."""
    places.mkdir()
    (places / "git").write_text(f"#!/bin/sh\n{script}\n")
    (places / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{places}:/usr/bin:/bin")


@pytest.mark.parametrize("below", ["", "net"])
@pytest.mark.parametrize("trouble", ["another's", "slow", "missing"])
def test_where_git_fails_in_a_checkout_nothing_is_sent(folder, tmp_path, monkeypatch, trouble, below):
    git(folder, "init", "-q")
    if trouble == "another's":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        said = "dubious ownership"
    elif trouble == "slow":
        monkeypatch.setattr(packing, "GIT_S", 0.2)
        failing_git(monkeypatch, tmp_path / "slow", "exec sleep 20")
        said = r"no answer within 0\.2 s"
    else:
        monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
        said = "No such file or directory"
    with pytest.raises(UsageError, match=rf"^\S+ is in a git checkout.*{said}.*; make `git status` work there"):
        packing.working_folder(folder / below, ())
    packing.working_folder(folder, (), whole=False)  # which asks nothing of git


def test_without_a_checkout_a_git_that_fails_is_not_needed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert sorted(packing.working_folder(folder, ())[0].files) == sorted(SENT)


def test_a_folder_of_a_checkout_whose_files_are_all_ignored_sends_none_of_them(folder):
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text("deep.py\n")
    assert packing.working_folder(folder / "net", ())[0].files == {}


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_a_folder_that_the_checkout_around_it_ignores_travels_as_one_without_a_checkout(folder):
    git(folder.parent, "init", "-q")
    (folder.parent / ".gitignore").write_text("mine/\n")
    package, _ = packing.working_folder(folder, ())
    assert sorted(package.files) == sorted(SENT)


def test_submodules_travel_as_git_has_them(folder, tmp_path):
    other, outer = tmp_path / "other", tmp_path / "outer"
    for made in (other, outer):
        made.mkdir()
        git(made, "init", "-q")
    (other / "layer.py").write_text("x = 1\n")
    (other / ".gitignore").write_text("notes/\n")
    git(other, "add", ".")
    git(other, "commit", "-q", "-m", "one")
    git(outer, "submodule", "add", "-q", str(other), "nets/other")
    (outer / "nets" / "other" / "notes").mkdir()
    (outer / "nets" / "other" / "notes" / "mine.md").write_text("ignored there")
    (outer / "away").symlink_to(other)  # a link that leads out is not followed, though what it names is a checkout
    package, _ = packing.working_folder(outer, ())
    assert sorted(package.files) == [".gitmodules", "nets/other/.gitignore", "nets/other/layer.py"]


def test_a_module_travels_without_what_a_folder_travels_without(folder, tmp_path):
    (folder / "notes.md").write_text("use hf_" + "a1B2c3D4e5F6g7H8i9k0L1m2N3o4P5q6R7 for the hub\n")
    (tmp_path / "private.txt").write_text("mine")
    (folder / "link.txt").symlink_to(tmp_path / "private.txt")
    sent = packing.code([str(folder)], ["conf/"])
    of_module = {name.removeprefix("mine/") for name in sent.files if name.startswith("mine/")}
    inside = {
        "runs/k7m2/run.json",
        "datasets/d/manifest.json",
    }  # names that are ours in the folder of the command alone
    assert of_module == {*SENT, *inside} - {"notes.md", "conf/a b.yaml"}
    assert sent.left_out == ["mine/notes.md"]


def test_our_own_code_travels_whole():
    root = Path(packing.__file__).parent.parent
    sent = {path for name, path in packing.code().files.items() if not name.startswith("pipeline/shipped/")}
    wanted = [*root.rglob("*.py"), *root.rglob("*.safetensors"), *(root.parent / "ddpm").rglob("*.py")]
    assert sent >= set(wanted)


def test_a_module_of_which_nothing_would_be_sent_is_refused(tmp_path):
    module = tmp_path / "tables"
    module.mkdir()
    (module / "table.npz").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"nothing of '.*tables' in .* would be sent"):
        packing.code([str(module)])


def test_a_network_that_does_not_travel_with_the_folder_is_sent_on_its_own(folder, monkeypatch):
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text("ignored_net/\n")
    site = folder / ".venv" / "lib" / "site-packages"
    for name in ("installed_net/__init__.py", "installed_net/deep.py", "one_file_net.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("x = 1\n")
    for name in ("own_net/__init__.py", "ignored_net/__init__.py", "src/below_net.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(folder / "src"))
    sent, _ = packing.working_folder(folder, ())

    def files_of(module: str) -> set[str]:
        place = packing.own_module(module, folder, sent)
        code = packing.code([] if place is None else [place])
        return {name for name in code.files if name.partition("/")[0] not in ("ddpm", "pipeline")}

    assert files_of("installed_net.deep") == {"installed_net/__init__.py", "installed_net/deep.py"}
    assert files_of("one_file_net") == {"one_file_net.py"}
    assert files_of("ignored_net") == {"ignored_net/__init__.py"}
    assert files_of("below_net") == {"below_net.py"}  # a job looks into the folder, not below it
    assert packing.own_module("own_net", folder, sent) is None
    assert packing.own_module("no_such_net", folder, sent) is None


def test_named_files_travel_wherever_they_stand(folder, tmp_path):
    outside = tmp_path / "x" / "an experiment.yaml"
    outside.parent.mkdir()
    outside.write_text("seed: 1\n")
    inside = folder / "set.npz"
    package, names = packing.working_folder(folder, (), [outside, inside])
    assert names == {outside: ".ddpm-pipe/0/an experiment.yaml", inside: "set.npz"}
    with zipfile.ZipFile(io.BytesIO(package.archive())) as archive:
        assert archive.read(names[outside]) == b"seed: 1\n"
    alone, _ = packing.working_folder(folder, (), [outside], whole=False)
    assert list(alone.files) == [".ddpm-pipe/0/an experiment.yaml"]


def test_excludes_name_folders_files_and_patterns(folder):
    package, _ = packing.working_folder(folder, ["net/", "*.md", "conf/a b.yaml"])
    assert sorted(package.files) == ["own.py", "runs.py", "secrets.py"]


def test_too_much_is_refused_with_the_largest_named(folder):
    (folder / "blob.dat").write_bytes(b"x" * 3_000_000)
    package, _ = packing.working_folder(folder, ())
    package.require_size(4)
    with pytest.raises(UsageError, match=r"3\.0 MB would be sent.*max_mb 2 \(largest: blob\.dat 3\.0 MB"):
        package.require_size(2)


def test_the_same_files_make_the_same_archive(folder):
    first = packing.working_folder(folder, ())[0].archive()
    for path in folder.rglob("*.py"):
        path.touch()
    assert packing.working_folder(folder, ())[0].archive() == first
    (folder / "own.py").write_text("# changed\n")
    assert packing.working_folder(folder, ())[0].archive() != first


def test_the_code_that_runs_takes_the_place_of_what_is_called_like_it(folder, tmp_path):
    for name in ("net/own.py", "net/set.yaml", "yaml/x.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "__init__.py").write_text("here = True\n")
    work, names = packing.working_folder(folder, (), [folder / "net" / "set.yaml"])
    sent = work.with_code(packing.code([str(tmp_path / "net")]), list(names.values()))
    assert {name for name in sent.files if name.startswith("net/")} == {"net/__init__.py", "net/set.yaml"}
    assert {"own.py", "yaml/x.py", "ddpm/__init__.py", "pipeline/shipped/experiments/digits.yaml"} <= sent.files.keys()


@pytest.mark.slow
def test_the_code_that_is_sent_runs_without_a_checkout(tmp_path):
    with zipfile.ZipFile(io.BytesIO(packing.code(["yaml"]).archive())) as archive:
        archive.extractall(tmp_path)
    assert (tmp_path / "yaml" / "__init__.py").is_file()
    parameters = {"preset": "mnist", "dry_run": True, "probe": False, "as_json": True}
    call = json.dumps({"command": "train", "parameters": parameters, "typed": ["train", "--dry-run"]})
    told = subprocess.run(
        [sys.executable, "-P", "-m", "pipeline.cli_in_job", call],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert all(line.startswith(RESULT_MARK) for line in told.stdout.splitlines())
    assert '"name": "mnist"' in told.stdout


def test_a_module_that_is_not_there_is_reported():
    with pytest.raises(UsageError, match="no module 'no_such_module' can be imported here"):
        packing.code(["no_such_module"])


@given(st.dictionaries(st.from_regex(r"[A-Z_]{1,9}", fullmatch=True), st.text(min_size=1), min_size=1))
def test_secrets_need_both_their_halves(values):
    pad, other = halves(values)
    assert joined(pad, other) == values
    assert halves(values)[1] != other  # another pad each time


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_a_shell_hands_arguments_on_as_they_are(arguments):
    assert shlex.split(shlex.join([*ENTRY, *arguments])) == [*ENTRY, *arguments]


@pytest.mark.parametrize(
    "typed",
    [
        ["train", "--preset", "mnist", "-s", "name=a b", "-s", "seed=1", "--json"],
        ["train", "my file.yaml", "--detach", "--no-probe"],
        ["train", "--", "--odd.yaml"],
        ["sample", "k7m2", "--out", "/a b/c", "--interpolate", "1", "two.png", "--eta", "0.5", "--label=#3"],
        ["evaluate", "k7m2", "--metrics", "fid,kid", "--seeds", "3"],
    ],
    ids=" ".join,
)
def test_a_job_calls_the_command_as_it_was_parsed_here(typed):
    name, *words = typed
    asked = cli.commands[name].make_context(name, words, parent=click.Context(cli))
    sent = json.loads(json.dumps(typed_parameters(asked), default=str))
    called: dict[str, Any] = {}
    there = click.Group(
        commands={
            name: click.Command(name, params=cli.commands[name].params, callback=lambda **given: called.update(given))
        }
    )
    invoke(there, name, sent)
    assert called == asked.params | {"detach": False}


def test_each_line_of_a_log_is_shown_once_however_it_comes():
    out: list[str] = []
    log: list[str] = []
    lines = LogLines(out.append, log.append)
    whole = (
        f"Running entrypoint for job x: y\nfirst\n{RESULT_MARK}result\nddpm-pipe: stopped, saved at step 3; go on\nlast"
    )
    lines.rewind()
    for piece in (whole[:35], whole[35:60]):
        lines.write(piece)
    lines.rewind()  # the connection was lost
    lines.write(whole[:80])
    lines.rewind()
    lines.write(whole)
    lines.close()
    assert out == ["result"]
    assert log == ["first", "ddpm-pipe: stopped, saved at step 3; go on", "last"]
    assert lines.saved
