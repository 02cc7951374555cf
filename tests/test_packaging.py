"""What a user installs: the wheel and what is in it, the lock file, the Makefile's set-up, and the MLproject."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_architecture import MODULES, imports

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CASES = [
    {},
    {},
    {},
    {"preset": "digits", "overrides": "training.steps=5 seed=1", "dry_run": "yes"},
    {
        "experiment": "my files/it's $(touch gone) {x}.yaml",
        "data": "a b",
        "cluster": 'q"uote',
        "overrides": "a=* b=[1,2]",
    },
    {"run": "k7m2; touch gone", "num_images": "9", "steps": "20", "seed": "3", "out": "a b", "format": "png"},
    {"run": "k7m2", "metrics": "fid,kid", "num_images": "600", "seeds": "3", "weights": "raw", "dry_run": "yes"},
    {"sweep": "my sweep.yaml", "metric": "kid", "seeds": "2", "overrides": "training.steps=5 seed=1", "dry_run": "yes"},
    {"sweep": "$(touch gone)", "cluster": "a b"},
]
WANTED = [
    ["train"],
    ["sample", "latest", "-n", "64"],
    ["evaluate", "latest", "--seeds", "1"],
    ["train", "--preset", "digits", "--dry-run", "-s", "training.steps=5", "-s", "seed=1"],
    [
        "train",
        "my files/it's $(touch gone) {x}.yaml",
        "--data",
        "a b",
        "--cluster",
        'q"uote',
        "-s",
        "a=*",
        "-s",
        "b=[1,2]",
    ],
    ["sample", "k7m2; touch gone", "-n", "9", "--steps", "20", "--seed", "3", "--format", "png", "--out", "a b"],
    ["evaluate", "k7m2", "--seeds", "3", "--metrics", "fid,kid", "-n", "600", "--weights", "raw", "--dry-run"],
    [
        *("sweep", "my sweep.yaml", "--metric", "kid", "--seeds", "2", "--dry-run"),
        *("-s", "training.steps=5", "-s", "seed=1"),
    ],
    ["sweep", "$(touch gone)", "--cluster", "a b"],
]


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    out = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert not check or out.returncode == 0, out.stdout + out.stderr
    return out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=REPOSITORY)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A throw-away environment with the wheel in it; third-party packages are those of the running one."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    run(*pip, "--disable-pip-version-check", wheel, cwd=folder)
    # A folder named in a .pth file is searched, but the .pth files in it are not read: the checkout stays out of sight.
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "third-party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def tracked(folder: str, suffix: str) -> set[str]:
    """Return the files below `folder` that belong in the package, as paths from the checkout."""
    paths = (REPOSITORY / folder).rglob(f"*{suffix}")
    return {path.relative_to(REPOSITORY).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_packages_presets_profiles_and_weights_and_nothing_else_at_the_top(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"ddpm_pipe-{PROJECT['version']}.dist-info"
    # the command's first module has a name of its own, which no file of a user's replaces
    assert {name.split("/")[0] for name in names} == {"ddpm", "pipeline", "ddpm_pipe_command.py", info}
    assert (tracked("ddpm", ".py") | tracked("pipeline", ".py")) - {"pipeline/ddpm_pipe_command.py"} <= names
    assert {
        f"pipeline/shipped/{name}" for name in tracked("experiments", ".yaml") | tracked("cluster", ".yaml")
    } <= names
    weights = tracked("pipeline", ".safetensors")
    assert weights, "the classifiers for digits and mnist ship with the package"
    assert weights <= names
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|/\.", name)]


def test_the_wheel_runs_outside_the_checkout_from_its_own_files(installed: Path, tmp_path: Path) -> None:
    code = "import pipeline, ddpm, json; from pipeline.config import presets as p;"
    code += "print(json.dumps([pipeline.__file__, ddpm.__file__, *(str(p.folder_of(k)) for k in ('experiments', 'cluster'))]))"
    for path in json.loads(run(installed / "bin" / "python", "-c", code, cwd=tmp_path).stdout):
        assert Path(path).is_relative_to(installed)


def test_the_installed_command_answers_and_resolves_a_shipped_preset(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "ddpm-pipe"
    assert "Usage: ddpm-pipe" in run(command, "--help", cwd=tmp_path).stdout
    assert PROJECT["version"] in run(command, "--version", cwd=tmp_path).stdout
    out = run(command, "train", "--preset", "mnist", "--cluster", "local", "--dry-run", cwd=tmp_path)
    assert "mnist" in out.stdout
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


# --- the lock file


def lock_blocks() -> Iterator[tuple[Requirement, str]]:
    """Yield each pinned requirement of the lock and the text that follows it."""
    for block in re.split(r"\n(?=\S)", (REPOSITORY / "requirements.lock").read_text()):
        if block.strip():
            yield Requirement(block.split("\n")[0].removesuffix("\\").strip()), block


def test_every_line_of_the_lock_is_pinned_and_hashed() -> None:
    blocks = list(lock_blocks())
    assert len(blocks) > 100
    for requirement, block in blocks:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), requirement
        assert "://" not in block, f"{requirement} names a place"


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    """As `make lock` writes it, each entry says who asked for it: those asked for by us are exactly pyproject's, within its bounds."""
    declared = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]
    ours = {canonicalize_name(pin.name) for pin, block in lock_blocks() if "ddpm-pipe (pyproject.toml)" in block}
    assert ours == {canonicalize_name(requirement.name) for requirement in declared}
    for requirement in declared:
        pins = [pin for pin, _ in lock_blocks() if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        for pin in pins:
            (version,) = pin.specifier
            assert requirement.specifier.contains(version.version), f"{pin} is outside {requirement}: run `make lock`"


def test_every_package_that_the_code_imports_is_declared() -> None:
    """One that is only there because a dependency needs it would go away with that need."""
    distributions = packages_distributions()
    asked = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["onnx"]
    declared = {canonicalize_name(Requirement(text).name) for text in asked}
    for module in MODULES:
        packages = (
            {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names) - {"ddpm", "pipeline"}
        )
        undeclared = [
            name for name in packages if not declared & set(map(canonicalize_name, distributions.get(name, [])))
        ]
        assert not undeclared, f"{module} imports {undeclared}, which pyproject.toml doesn't ask for"


def test_the_lock_serves_linux_and_macos() -> None:
    """Nothing in it is for one system only, apart from what says so in a marker: CUDA's libraries on Linux."""
    for requirement, _ in lock_blocks():
        mac = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
        on_mac = requirement.marker is None or requirement.marker.evaluate(mac)
        assert not (on_mac and requirement.name.startswith("nvidia-")), requirement
    names = {requirement.name for requirement, _ in lock_blocks() if requirement.marker is None}
    assert {"torch", "ray", "mlflow", "pyarrow"} <= names


# --- the Makefile


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and what it reads, in a folder whose set-up seems done."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    database = run("make", "-pn", "setup", cwd=tmp_path).stdout
    for variable in ("LOCKED", "INSTALLED"):
        (stamp,) = re.findall(rf"^{variable} := (\S+)$", database, re.MULTILINE)
        (tmp_path / stamp).touch()
    return tmp_path


def test_set_up_is_done_once_and_again_only_where_the_lock_or_the_project_changed(checkout: Path) -> None:
    def plan() -> tuple[bool, bool]:
        out = run("make", "-n", "setup", cwd=checkout).stdout
        return "--require-hashes" in out, "-e ." in out

    assert plan() == (False, False)
    (checkout / "requirements.lock").touch()
    assert plan() == (False, False)
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# another project\n")
    assert plan() == (False, True)
    with (checkout / "requirements.lock").open("a") as file:
        file.write("# another lock\n")
    assert plan() == (True, True)


def fake_python(folder: Path, name: str, version: str, *, suits: bool) -> Path:
    """A Python that knows its version, and ends the set-up after saying what it was asked."""
    python = folder / name
    python.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo Python {version}; exit 0;; -c) exit {0 if suits else 1};; esac\necho asked: $0; exit 1\n"
    )
    python.chmod(0o755)
    return python


def test_another_python_is_refused_in_one_line(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    python = fake_python(checkout, "python3.10", "3.10.12", suits=False)
    out = run("make", "setup", f"PYTHON={python}", cwd=checkout, check=False)
    assert out.returncode != 0
    line = out.stderr.splitlines()[0]
    assert line.startswith(
        f"Python 3.11 to 3.14 is needed; {python} is Python 3.10.12. Get one: uv python install 3.13"
    )
    assert line.endswith("or name it: make PYTHON=/path/to/python3.13")
    assert not (checkout / ".venv").exists()


def test_set_up_takes_the_newest_python_that_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(checkout / ".venv")
    fake_python(checkout, "python3.14", "", suits=False)  # as pyenv's for a version that is not chosen
    newest = fake_python(checkout, "python3.13", "3.13.7", suits=True)
    fake_python(checkout, "python3.11", "3.11.9", suits=True)
    monkeypatch.setenv("PATH", f"{checkout}:/usr/bin:/bin")
    assert f"asked: {newest}" in run("make", "setup", cwd=checkout, check=False).stdout


def test_help_lists_every_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    listed = re.findall(r"^  make ([\w-]+)", run("make", "help", cwd=REPOSITORY).stdout, re.MULTILINE)
    assert sorted(listed) == sorted(targets.split())


# --- the MLproject


def handed_over(entry: str, parameters: dict[str, str], folder: Path) -> list[str]:
    """Run MLflow's own command in the shell it uses, where a `ddpm-pipe` that only prints its arguments comes first; return these."""
    from mlflow.projects import load_project

    command = load_project(str(REPOSITORY)).get_entry_point(entry).compute_command(parameters, None)
    printer = folder / "ddpm-pipe"
    printer.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    printer.chmod(0o755)
    out = run("env", f"PATH={folder}:/usr/bin:/bin", "bash", "-c", command, cwd=folder)
    return out.stdout.split("\0")[:-1]


@pytest.mark.parametrize(("parameters", "wanted"), list(zip(CASES, WANTED, strict=True)))
def test_mlproject_hands_its_parameters_over_unharmed(
    parameters: dict[str, str], wanted: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a=file").touch()  # what an unguarded `*` would pick up
    assert handed_over(wanted[0], parameters, tmp_path) == wanted
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("entry", ["train", "sweep", "sample", "evaluate"])
@pytest.mark.parametrize("off", ["", "0", "no", "No", "false", "False", "FALSE"])
def test_mlproject_takes_a_dry_run_that_is_false_for_what_it_says(entry: str, off: str, tmp_path: Path) -> None:
    """Else a training that was asked for would end at once, as a success."""
    assert "--dry-run" not in handed_over(entry, {"dry_run": off}, tmp_path)
    assert "--dry-run" in handed_over(entry, {"dry_run": "true"}, tmp_path)


def mlflow_run(home: Path, entry: str, **parameters: str) -> None:
    """Type `mlflow run` as in the activated environment."""
    mlflow = Path(sys.executable).with_name("mlflow")
    words: list[str | Path] = ["run", REPOSITORY, "-e", entry, "--env-manager", "local"]
    for name, value in parameters.items():
        words += ["-P", f"{name}={value}"]
    environment = [f"PATH={mlflow.parent}:/usr/bin:/bin", f"MLFLOW_TRACKING_URI=sqlite:///{home}/mlflow.db"]
    run("env", *environment, mlflow, *words, cwd=home)


@pytest.mark.slow
def test_mlflow_run_trains_samples_and_scores_in_the_runs_that_it_opened(home: Path) -> None:
    """In the store of its environment, though the profile names another one that nobody serves."""
    (home / "elsewhere.yaml").write_text("mlflow: {tracking_uri: 'http://127.0.0.1:9'}\n")
    settings = "training.steps=4 training.batch_size=16 logging.grid_every_steps=null evaluation.enabled=false"
    sampling = "sampling.steps=2 seed=3"
    mlflow_run(home, "train", preset="digits", cluster=str(home / "elsewhere.yaml"), overrides=f"{settings} {sampling}")
    mlflow_run(home, "sample", num_images="4")
    mlflow_run(home, "evaluate", num_images="200", extractor="classifier", steps="2", seed="7")

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    found = {run.data.tags["mlflow.project.entryPoint"]: run for run in client.search_runs(["0"])}
    assert found.keys() == {"train", "sample", "evaluate"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    (ours,) = (home / "runs").iterdir()
    trained = found["train"]
    assert trained.data.tags["ddpm_pipe.run_id"] == ours.name
    assert "train/loss" in trained.data.metrics
    assert trained.data.params["preset"] == "digits"  # MLflow's own parameters, beside ours
    assert trained.data.params["training.steps"] == "4"
    for entry in ("sample", "evaluate"):
        assert found[entry].data.tags["ddpm_pipe.of_run"] == ours.name
        assert found[entry].data.tags["ddpm_pipe.of_mlflow_run"] == trained.info.run_id
    assert [a.path for a in client.list_artifacts(found["sample"].info.run_id)]
    scores = found["evaluate"].data.metrics
    assert any(name.startswith("score/fid_classifier") for name in scores)
    assert any(a.path.endswith("grid.png") for a in client.list_artifacts(found["evaluate"].info.run_id))


def test_the_environment_file_names_the_lock_and_a_python_that_the_project_allows() -> None:
    environment = yaml.safe_load((REPOSITORY / "python_env.yaml").read_text())
    assert environment["dependencies"] == ["-r requirements.lock", "."]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(f"{environment['python']}.0")
