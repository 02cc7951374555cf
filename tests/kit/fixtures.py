"""Every fixture that tests of several folders share, registered once. What is heavy is imported by the tests that ask for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.hermetic import REPOSITORY
from tests.kit.commands import Result, Shell, Started, Typed
from tests.kit.environment import restore_environment

if TYPE_CHECKING:
    from pipeline.data.shards import Dataset
    from pipeline.storage.runs import Run
    from tests.kit.object_store import ObjectStore


@pytest.fixture(autouse=True)
def _no_declared_secrets_left() -> Iterator[None]:
    """A profile that is read declares its secrets for the life of the process: here, where one process plays many, for that of a test."""
    yield
    from pipeline.redaction import DECLARED_SECRETS

    os.environ.pop(DECLARED_SECRETS, None)


# commands


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DDPM_PIPE_HOME of this test's own."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("DDPM_PIPE_HOME", str(path))
    return path


@pytest.fixture
def shell(home: Path) -> Iterator[Shell]:
    """A user's shell in `home`; what it has started is ended with the test."""
    with Shell(home) as shell:
        yield shell


@pytest.fixture
def user_environment(shell: Shell) -> dict[str, str]:
    """The environment of a process that a user starts in `home`."""
    return shell.process_environment()


@pytest.fixture
def cli(shell: Shell) -> Callable[..., Result]:
    """Run `ddpm-pipe ARGUMENTS` to its end in a forked process: cli("runs", "--json", cwd=..., env={...}, timeout_s=...)."""
    return shell.run


@pytest.fixture
def start(shell: Shell) -> Callable[..., Started]:
    """Start `ddpm-pipe ARGUMENTS` in the background: start("train", "x.yaml", cwd=..., env={...})."""
    return shell.start


@pytest.fixture
def typed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Type a command in this process, in the empty folder `home`, where the test is, too."""
    monkeypatch.chdir(shell.home)
    return shell.type


# data and trained runs


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real image sets (`mnist/`, `cifar10/`, Hugging Face style Parquet); skips where it isn't."""
    path = Path(os.environ.get("DDPM_PIPE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no real image sets here: name their folder in DDPM_PIPE_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The digits, ingested; to be read only."""
    from pipeline.config.experiment import DataConfig
    from pipeline.ingest.ingest import ensure_ingested

    return ensure_ingested(DataConfig(), tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from tests.kit.trainer import trained_run

    return trained_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def trained(_trained: Run, home: Path) -> Run:
    """A run of the tiny experiment in `home`, trained to its end, step 30, without Ray."""
    from tests.kit.trainer import copied

    return copied(_trained, home)


# object stores and tracking servers


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    from tests.kit.object_store import running_store

    with running_store() as store:
        yield store


@pytest.fixture
def object_store(_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A real S3 server on loopback, one for the session; this process's environment names it and holds credentials."""
    from tests.kit.object_store import CREDENTIALS, UNAVAILABLE

    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": _object_store.url}).items():
        monkeypatch.setenv(name, value)
    _object_store.refuse = lambda method, path: False
    _object_store.refusal = UNAVAILABLE
    _object_store.ignores_conditions = False
    _object_store.ahead_s = 0.0
    _object_store.requests.clear()
    return _object_store


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    """The address of an empty bucket."""
    return object_store.new_bucket()


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store of MLflow's whose tables are made; making them takes seconds, copying the file none."""
    from pipeline.tracking.writer import prepare_environment

    prepare_environment()
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[str]:
    """The address of a real `mlflow server` on loopback."""
    from tests.kit.tracking import running_server

    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_database, folder / "mlflow.db")
    with running_server(folder) as address:
        yield address


# Ray


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """One local Ray of two CPUs for the whole test session, started as commands start theirs; yields the `ray` module.

    A command that runs in this process (`typed`) uses it, and saves the half of a minute's work that a process and a Ray of its own take.
    """
    from pipeline.cluster.session import local_ray
    from pipeline.config.cluster_profile import Profile, Resources
    from pipeline.sweeps.tune import ENVIRONMENT

    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    with local_ray(Profile(workers=2, resources_per_worker=Resources(CPU=1)), num_workers=2):
        import ray

        restore_environment(before)  # what Ray has been told is not for the processes that tests start
        yield ray


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[int], dict[str, str]]:
    """What the slow training of tests.kit.experiments ends with on one worker or two if nobody disturbs it: its digests."""
    from tests.kit.experiments import TWO_WORKERS, slow_experiment
    from tests.kit.trainer import final_digests, only_run

    @cache
    def train(workers: int) -> dict[str, str]:
        shell = Shell(tmp_path_factory.mktemp("calm"))
        (shell.home / "two.yaml").write_text(TWO_WORKERS)
        chosen = []
        if workers == 2:
            request.getfixturevalue("ray_session")
            chosen = ["--cluster", "two.yaml"]
        code, _, stderr = shell.type("train", slow_experiment(shell.home, pause=0.0), *chosen)
        assert code == 0, stderr
        return final_digests(only_run(shell.home))

    return train


@pytest.fixture(scope="session")
def swept_shell(tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> Iterator[Shell]:
    """The shell in whose home the sweep of `swept` and its winner are."""
    from tests.kit.sweeps import prepare

    with Shell(tmp_path_factory.mktemp("swept")) as shell:
        prepare(shell.home)
        yield shell


@pytest.fixture(scope="session")
def swept(swept_shell: Shell) -> dict[str, Any]:
    """The grid sweep of tests.kit.sweeps, run once in full: its result, as `--json` prints it."""
    code, stdout, stderr = swept_shell.type("sweep", "grid.yaml", "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


@pytest.fixture(scope="session")
def winner(swept_shell: Shell, swept: dict[str, Any]) -> dict[str, Any]:
    """The grid sweep's best point, trained as `train --from` does, with grids of samples on the way."""
    code, stdout, stderr = swept_shell.type(
        "train", "--from", swept["sweep"], "-s", "logging.grid_every_steps=20", "--json"
    )
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


@pytest.fixture
def new_run(home: Path) -> Callable[..., Run]:
    """Make a run folder: new_run(name="x")."""

    from pipeline.storage.runs import Run

    def make(**changes: Any) -> Run:
        content: dict[str, Any] = {
            "name": "test",
            "experiment": {"training": {"steps": 100}, "diffusion": {"schedule": "cosine", "num_timesteps": 50}},
            "config_hash": "0123456789abcdef",
            "dataset": {"path": "/data/digits", "fingerprint": "ab" * 32, "name": "digits"},
            "profile": {"name": "local"},
            "command": ["ddpm-pipe", "train", "--preset", "digits"],
        }
        return Run.create(home, **{**content, **changes})

    return make


@pytest.fixture
def run(new_run: Callable[..., Run]) -> Run:
    """A fresh run folder."""
    return new_run()
