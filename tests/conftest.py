"""What every test stands on: a safe environment, and fixtures for the command line, real data and Ray."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import settings

from tests.guard import network_guard
from tests.hermetic import MARKER, hermetic_environment, make_root

if TYPE_CHECKING:
    from tests.object_store import ObjectStore

# Before anything else is imported: a plain `pytest` gets the environment that `make test` gives (tests/hermetic.py).
if MARKER not in os.environ:
    _root = make_root()
    _environment = hermetic_environment(_root, os.environ)
    os.environ.clear()
    os.environ.update(_environment)
    _owner = os.getpid()

    def _remove_root() -> None:
        if os.getpid() == _owner:  # not a forked child's to remove
            shutil.rmtree(_root, ignore_errors=True)

    atexit.register(_remove_root)
network_guard.install()
# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread in the test process: bit-exactness is promised per thread count, and the machine is shared with the test's own workers.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray reads this when first imported; on Linux it alone makes Ray listen on loopback only, whatever `_node_ip_address` says.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# MLflow reads these when first imported, which here a test may do before our own code, and would talk on stderr and to its makers.
os.environ["MLFLOW_LOGGING_LEVEL"] = "WARNING"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
pytest_plugins = ["tests.kit.scheduling", "tests.kit.costs", "tests.kit.skips"]
IN_PROCESS_ONLY = {
    "OMP_NUM_THREADS",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    "MLFLOW_LOGGING_LEVEL",
    "MLFLOW_DISABLE_TELEMETRY",
}

settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def _no_declared_secrets_left() -> Iterator[None]:
    """A profile that is read declares its secrets for the life of the process: here, where one process plays many, for that of a test."""
    yield
    from pipeline.redaction import DECLARED_SECRETS

    os.environ.pop(DECLARED_SECRETS, None)


class CliResult(NamedTuple):
    """What a `ddpm-pipe` process returned and printed."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DDPM_PIPE_HOME of this test's own."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("DDPM_PIPE_HOME", str(path))
    return path


@pytest.fixture
def user_environment(home: Path) -> dict[str, str]:
    """The environment for a process that stands for a user's own: isolated, but without what eases tests in this process."""
    return {name: value for name, value in os.environ.items() if name not in IN_PROCESS_ONLY}


@pytest.fixture
def cli(home: Path, user_environment: dict[str, str]) -> Callable[..., CliResult]:
    """Run `ddpm-pipe ARGUMENTS` as users do, in its own process: cli("runs", "--json", cwd=..., env={...}, timeout_s=...).

    The process works in `home` unless told otherwise, with the threads a user has. One that outlasts `timeout_s` is
    ended with its children.
    """

    def run(
        *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout_s: float = 500
    ) -> CliResult:
        command = [str(Path(sys.executable).with_name("ddpm-pipe")), *map(str, arguments)]
        with subprocess.Popen(
            command,
            cwd=cwd or home,
            env=user_environment | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout_s)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return CliResult(process.returncode, stdout, stderr)

    return run


def restore_environment(before: Mapping[str, str]) -> None:
    """Make the environment what it was, variable by variable: threads of Ray and MLflow may be reading it."""
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def type_here(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Type a command in this process, in a folder and with variables of its own; return exit code, stdout and stderr.

    What it leaves in the environment, and modules of the folder (networks of a user's own), are forgotten afterwards.
    """
    from pipeline.cli import run

    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    known, before = set(sys.modules), dict(os.environ)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", ["ddpm-pipe", *arguments])
        os.environ.update(env or {})
        try:
            code = run(arguments)
        finally:
            restore_environment(before)
            for name in set(sys.modules) - known:
                if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                    del sys.modules[name]
    return code, *(stream.buffer.getvalue().decode() for stream in (stdout, stderr))  # type: ignore[attr-defined, return-value]


@pytest.fixture
def typed(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process, in an empty folder, where the test is, too; return exit code, stdout and stderr."""
    monkeypatch.chdir(home)
    return partial(type_here, home)


@pytest.fixture
def ending() -> Iterator[Callable[[subprocess.Popen[str]], subprocess.Popen[str]]]:
    """End processes that a test started, each the head of a session of its own, whatever happens: ending(subprocess.Popen(...))."""
    started: list[subprocess.Popen[str]] = []

    def note(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        started.append(process)
        return process

    yield note
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real image sets (`mnist/`, `cifar10/`, Hugging Face style Parquet); skips where it isn't."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    path = Path(os.environ.get("DDPM_PIPE_TEST_DATA", beside))
    if not path.is_dir():
        pytest.skip("no real image sets here: name their folder in DDPM_PIPE_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    from tests.object_store import running_store

    with running_store() as store:
        yield store


@pytest.fixture
def object_store(_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A real S3 server on loopback, one for the session; this process's environment names it and holds credentials."""
    from tests.object_store import CREDENTIALS

    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": _object_store.url}).items():
        monkeypatch.setenv(name, value)
    _object_store.refuse = lambda method, path: False
    _object_store.requests.clear()
    return _object_store


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    """The address of an empty bucket."""
    return object_store.new_bucket()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """One local Ray of two CPUs for the whole test session, started as commands start theirs; yields the `ray` module.

    A command that runs in this process (`typed`) uses it, and saves the half of a minute's work that a process and a Ray of its own take.
    """
    from pipeline.cluster.session import local_ray
    from pipeline.settings.cluster_profile import Profile, Resources
    from pipeline.sweeps.tune import ENVIRONMENT

    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    with local_ray(Profile(workers=2, resources_per_worker=Resources(CPU=1)), num_workers=2):
        import ray

        restore_environment(before)  # what Ray has been told is not for the processes that tests start
        yield ray


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
    folder, port = tmp_path_factory.mktemp("server"), _free_port()
    shutil.copy(migrated_database, folder / "mlflow.db")
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
