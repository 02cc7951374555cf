"""Real MLflow stores: what they hold, a real server, and a way to cut it off."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.tracking.tracker import TrackingSettings
from tests.kit.commands import Started
from tests.kit.ports import free_port


def client_of(settings: TrackingSettings) -> Any:
    """MLflow's own client, which says what the store holds."""
    from mlflow import MlflowClient

    return MlflowClient(settings.uri, settings.uri)


def history(settings: TrackingSettings, run_id: str | None, key: str) -> list[tuple[int, float]]:
    """Every stored (step, value) of a metric, as the store lists them."""
    return [(metric.step, metric.value) for metric in client_of(settings).get_metric_history(run_id, key)]


def forget_receipts(run_folder: Path, last: int | None = None) -> None:
    """Remove receipts from a spool, the last ones or all, as if the process had died before it wrote them."""
    log = run_folder / "spool" / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    receipts = [number for number, line in enumerate(lines) if '"received"' in line]
    assert receipts
    dropped = set(receipts if last is None else receipts[-last:])
    log.write_text("".join(line for number, line in enumerate(lines) if number not in dropped))


def runs_in(settings: TrackingSettings) -> list[Any]:
    """Every MLflow run of the store."""
    client = client_of(settings)
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Run a real `mlflow server` on loopback on the store `folder/mlflow.db`; yields its address."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    with Started(command, folder, {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}) as server:
        server.wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}"


def answers(address: str) -> bool:
    """Return whether a server answers at an address."""
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
        return True
    return False


class Gate:
    """A TCP relay in front of the server, with a door: `open`, `refusing` (nobody listens) or `hanging` (never an answer)."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.requests = 0
        self._target = target
        self._state = "refusing"
        self._listener: socket.socket | None = None
        self._sockets: list[socket.socket] = []

    def set(self, state: str) -> None:
        """Change the door; connections that are open are cut."""
        self.close()
        self._state = state
        if state != "refusing":
            self._listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        """Close everything."""
        for item in [self._listener, *self._sockets]:
            if item is not None:
                with contextlib.suppress(OSError):
                    item.shutdown(socket.SHUT_RDWR)
                item.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            self.requests += 1
            if self._state == "open":
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets.append(far)
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
