"""`ddpm-pipe ui`: MLflow's pages about the runs, served to this machine alone until Ctrl-C."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

from pipeline.console import answer
from pipeline.errors import TrackingError, UsageError
from pipeline.storage.home import artifacts_dir, make_folder
from pipeline.tracking.ui_columns import choose_columns

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0


def serve_ui(
    home: Path,
    port: int,
    uri: str | None = None,
    experiment: str = "ddpm",
    open_browser: bool = False,
    say: Callable[[str], None] = answer,
) -> None:
    """Serve the pages on 127.0.0.1 until Ctrl-C or SIGTERM, then stop every process of the server.

    `uri` is the tracking store (default: as training chooses it). A store that is itself a server needs none here: its
    address is said and nothing started. UsageError if the port is taken, TrackingError if the server does not start.
    """
    from pipeline.tracking.tracker import TrackingSettings

    store = TrackingSettings.resolve(home, uri, experiment).uri
    if store.startswith(("http://", "https://")):
        parts = urlsplit(store)
        say(f"the runs are on a server of their own: {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
        return
    make_folder(home)
    require_free(port)
    with tempfile.TemporaryFile() as messages, _asked_to_stop() as asked:
        server = _start(home, store, port, messages)
        try:
            if _wait_until_ready(server, port, asked):
                address = experiment_address(port, experiment)
                say(f"serving {home} at {address}\nCtrl-C stops it")
                if open_browser:
                    webbrowser.open(address)
            while not asked and server.poll() is None:
                time.sleep(0.1)
            if not asked:
                raise TrackingError(f"the MLflow server ended by itself with exit code {server.returncode}")
            say("stopped")
        except TrackingError as error:
            messages.seek(0)
            last = messages.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise TrackingError(f"{error}; its last message: {last or 'none'}") from None
        finally:
            stop_group(server)


def require_free(port: int) -> None:
    """UsageError where something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from error


def server_environment(store: str, home: Path) -> dict[str, str]:
    """Return the environment of the server: the store's address is in it, not on the command line, where others can see it."""
    dropped = {"MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts_dir(home).as_uri(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }


def server_command(port: int) -> list[str]:
    """Return the command of the server. MLflow's own list of allowed hosts matches `10.evil.example`: ours is exact."""
    hosts = f"{HOST}:{port},localhost:{port}"
    origins = f"http://{HOST}:{port},http://localhost:{port}"
    return [
        *(sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--allowed-hosts", hosts, "--cors-allowed-origins", origins, "--uvicorn-opts", "--log-level warning"),
    ]


def _start(home: Path, store: str, port: int, messages: IO[bytes]) -> subprocess.Popen[bytes]:
    from pipeline.tracking.run import prepare_store

    with prepare_store(store):
        pass
    return subprocess.Popen(
        server_command(port),
        env=server_environment(store, home),
        stdin=subprocess.DEVNULL,
        stdout=messages,
        stderr=messages,
        start_new_session=True,
    )


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, asked: list[int]) -> bool:
    """Return whether the server answers; False when it was asked to stop, or ended, before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not asked and server.poll() is None:
        if time.monotonic() > deadline:
            raise TrackingError(f"the MLflow server did not answer on port {port} within {START_TIMEOUT_S:.0f} s")
        with suppress(OSError, http.client.HTTPException):
            if _get(port, "/health")[0] == 200:
                return True
        time.sleep(0.1)
    return False


def experiment_address(port: int, experiment: str) -> str:
    """Return the address of the experiment's runs in the model-training view (MLflow opens in another one by itself), with our columns."""
    status, body = _get(port, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(experiment)}")
    root = f"http://{HOST}:{port}/#/experiments"
    if status != 200:  # no run yet
        return root
    experiment_id = json.loads(body)["experiment"]["experiment_id"]
    view = choose_columns(lambda path, content: _post(port, path, content), experiment_id)
    return f"{root}/{experiment_id}/runs?workflowType=machine_learning{view}"


def _get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _post(port: int, path: str, content: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    finally:
        connection.close()


def stop_group(server: subprocess.Popen[bytes]) -> None:
    """End the server with all its children, and wait until none is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            server.poll()  # reaps it, so that its group can vanish
            try:
                os.killpg(server.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collect the signals that ask to stop; an exception in the wrong place would leave the server behind."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda received, frame: asked.append(received)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
