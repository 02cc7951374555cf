"""`ddpm-pipe ui`: serves MLflow's pages on the loopback interface until Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.console import answer
from pipeline.errors import TrackingError, UsageError
from pipeline.signals import Signals, listening
from pipeline.storage.home import artifacts_dir, make_folder
from pipeline.tracking.names import metric_name
from pipeline.tracking.run import RUN_ID_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
VIEW = "ddpm-pipe"
PARAMETERS = ("diffusion.schedule", "diffusion.num_timesteps", "training.steps")
SCORE = re.compile(r"score/(fid|kid|bits_per_dim)_[A-Za-z0-9_]*")
PART = re.compile(r"_(std|prior|divergences|decoder)_")
MAX_SCORES = 4


def serve_ui(
    home: Path,
    port: int,
    uri: str | None = None,
    experiment: str | None = None,
    open_browser: bool = False,
    say: Callable[[str], None] = answer,
) -> None:
    """Serve the pages on 127.0.0.1 until Ctrl-C or SIGTERM, then stop every process of the server.

    `uri` is the tracking store (default: as training chooses it). If the store is itself a server, print its address and start nothing.
    UsageError if the port is taken, TrackingError if the server does not start.
    """
    from pipeline.tracking.tracker import TrackingSettings

    settings = TrackingSettings.resolve(home, uri, experiment)
    store, experiment = settings.uri, settings.experiment
    if store.startswith(("http://", "https://")):
        parts = urlsplit(store)
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        say(f"the runs are on an MLflow server: {experiment_address(store, address, experiment)}")
        return
    make_folder(home)
    require_free(port)
    with tempfile.TemporaryFile() as messages, listening(signal.SIGHUP) as signals:
        server = _start(home, store, port, messages)
        try:
            if _wait_until_ready(server, port, signals):
                address = experiment_address(store, f"http://{HOST}:{port}", experiment, columns=True)
                say(f"serving {home} at {address}\nCtrl-C stops it")
                if open_browser:
                    webbrowser.open(address)
            while signals.first is None and server.poll() is None:
                time.sleep(0.1)
            if signals.first is None:
                raise TrackingError(f"the MLflow server exited with code {server.returncode}")
            say("stopped")
        except TrackingError as error:
            messages.seek(0)
            last = messages.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise TrackingError(f"{error}; its last message: {last or 'none'}") from None
        finally:
            stop_group(server)


def require_free(port: int) -> None:
    """Raise UsageError if the port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from error


def server_environment(store: str, home: Path) -> dict[str, str]:
    """Return the server's environment. It holds the store's address, which other users could see on a command line."""
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
    """Return the server's command. MLflow's default list of allowed hosts matches `10.evil.example`; this one is exact."""
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


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, signals: Signals) -> bool:
    """Return whether the server answers; False if it ended, or a signal arrived, before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while signals.first is None and server.poll() is None:
        if time.monotonic() > deadline:
            raise TrackingError(f"the MLflow server did not answer on port {port} within {START_TIMEOUT_S:.0f} s")
        with suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=10):
            return True
        time.sleep(0.1)
    return False


def experiment_address(store: str, server: str, experiment: str, *, columns: bool = False) -> str:
    """Return the address of an experiment's runs in the model-training view, with our columns if asked.

    Returns the server's own address if it cannot be reached, and MLflow's list of experiments if this one does not exist yet.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from pipeline.tracking.writer import prepare_environment

    prepare_environment()
    try:
        client = MlflowClient(store)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return f"{server}/#/experiments"
        view = choose_columns(client, found.experiment_id) if columns else ""
    except MlflowException:
        return server
    return f"{server}/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning{view}"


def choose_columns(client: MlflowClient, experiment_id: str) -> str:
    """Store the columns that MLflow's list of runs opens with, and return the part of the address that selects them.

    MLflow keeps such a view as JSON in a tag of the experiment; its Share button stores the same tag.
    """
    runs = client.search_runs([experiment_id], max_results=200)
    found = [SCORE.fullmatch(name) for run in runs for name in run.data.metrics if not PART.search(name)]
    scores = {(("fid", "kid", "bits_per_dim").index(score[1]), score[0]) for score in found if score}
    ordered = [name for _, name in sorted(scores)][:MAX_SCORES]
    columns = [f"params.`{name}`" for name in PARAMETERS] + [f"metrics.`{name}`" for name in ordered]
    view = {
        "selectedColumns": [f"tags.`{RUN_ID_TAG}`", *columns, f"metrics.`{metric_name('sweep', 'rank')}`"],
        "runsExpanded": {run.info.run_id: True for run in runs if run.data.tags.get("kind") == "sweep"},
    }
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    return f"&viewStateShareKey={VIEW}"


def stop_group(server: subprocess.Popen[bytes]) -> None:
    """End the server and its child processes, and wait for them."""
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
