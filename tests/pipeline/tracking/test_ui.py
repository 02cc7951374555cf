"""`serve_ui`: a real server, exact hosts, and nothing left when it ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.errors import TrackingError, UsageError
from pipeline.storage.runs import Run
from pipeline.tracking.tracker import Tracker, TrackingSettings
from pipeline.tracking.ui import choose_columns, require_free, serve_ui, server_command, server_environment
from tests.kit.commands import python
from tests.kit.ports import free_port
from tests.kit.waiting import wait_for

SERVE = """
import sys
from pathlib import Path
from pipeline.errors import PipelineError
from pipeline.tracking.ui import serve_ui
try:
    serve_ui(Path(sys.argv[1]), int(sys.argv[2]))
except PipelineError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def serving(run: Run, store: TrackingSettings, home: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    tracker = Tracker(run.folder, store)
    tracker.start("seen", {}, {}, "")
    (run.folder / "fid.json").write_text('{"fid": 1.5}')
    tracker.artifact(run.folder / "fid.json", "fid")
    assert tracker.close()
    port = free_port()
    with python(SERVE, home, port) as process:
        assert process.stdout is not None
        yield process, port, process.stdout.readline()
        process.kill()


def ask(port: int, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


@pytest.mark.slow
def test_it_serves_the_runs_refuses_strangers_and_leaves_nothing(
    serving: tuple[subprocess.Popen[str], int, str], run: Run
) -> None:
    process, port, line = serving
    # what it says opens the experiment in the model-training view
    assert f"http://127.0.0.1:{port}/#/experiments/" in line
    assert "/runs?workflowType=machine_learning" in line
    experiment = line.partition("#/experiments/")[2].partition("/")[0]
    status, body = ask(port, "GET", f"/api/2.0/mlflow/experiments/get?experiment_id={experiment}")
    assert status == 200
    assert json.loads(body)["experiment"]["name"] == "ddpm"
    status, body = ask(port, "GET", f"/get-artifact?path=fid/fid.json&run_uuid={run.mlflow_run_id}")
    assert (status, json.loads(body)) == (200, {"fid": 1.5})
    # strangers
    for host in ("10.evil.example", "192.168.evil.example", "evil.example", f"10.0.0.1:{port}"):
        assert ask(port, "GET", "/api/2.0/mlflow/experiments/search?max_results=1", Host=host)[0] == 403, host
    assert ask(port, "GET", "/health", Host=f"localhost:{port}")[0] == 200
    create = json.dumps({"name": "planted"})
    refused = ask(
        port,
        "POST",
        "/api/2.0/mlflow/experiments/create",
        create,
        Origin="http://evil.example",
        Content_Type="application/json",
    )
    assert refused[0] == 403
    # bound to loopback, no password or address of the store on any command line, no job runner
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    for child in children:
        words = " ".join(child.cmdline())
        assert "mlflow.db" not in words
        assert "huey" not in words
        for connection in child.net_connections("inet"):
            assert connection.status != psutil.CONN_LISTEN or connection.laddr.ip == "127.0.0.1"
    # another one on the same port
    with python(SERVE, run.folder.parent.parent, port) as second:
        out, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert out == f"port {port} cannot be used (Address already in use); choose another with --port\n"
    # Ctrl-C, twice
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    require_free(port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_it_as_well_even_while_it_starts(
    number: signal.Signals, store: TrackingSettings, home: Path
) -> None:
    with python(SERVE, home, free_port()) as process:
        parent = psutil.Process(process.pid)
        children = wait_for(lambda: parent.children(recursive=True))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "stopped\n", "")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_taken_port_is_one_line_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="choose another with --port"):
        serve_ui(tmp_path / "home", taken.getsockname()[1])
    assert not (tmp_path / "home" / "mlflow.db").exists()


@pytest.mark.slow
def test_a_store_that_is_no_database_ends_in_one_line(home: Path) -> None:
    (home / "mlflow.db").write_text("this is no database, and says so at length " * 100)
    with pytest.raises(TrackingError, match="MLflow") as caught:
        serve_ui(home, free_port())
    assert "\n" not in str(caught.value)


def test_the_address_of_a_remote_server_is_printed_without_its_password(home: Path) -> None:
    said: list[str] = []
    port = free_port()
    serve_ui(home, free_port(), uri=f"http://user:secret1@127.0.0.1:{port}/base/", say=said.append)
    assert said == [f"the runs are on an MLflow server: http://127.0.0.1:{port}/base"]


@pytest.mark.slow
def test_the_address_of_a_remote_server_opens_its_experiment(home: Path, mlflow_server: str) -> None:
    client = MlflowClient(mlflow_server)
    experiment = client.create_experiment("there")
    said: list[str] = []
    serve_ui(home, free_port(), uri=mlflow_server, experiment="there", say=said.append)
    address = f"{mlflow_server}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    assert said == [f"the runs are on an MLflow server: {address}"]
    assert client.get_experiment(experiment).tags == {}


def test_the_list_of_runs_opens_with_settings_and_final_scores(store: TrackingSettings) -> None:
    client = MlflowClient(store.uri)
    experiment = client.create_experiment("ddpm")
    sweep = client.create_run(experiment, tags={"kind": "sweep"}).info.run_id
    for name in (
        "score/kid_classifier_n9",
        "score/fid_classifier_n9",
        "score/fid_std_classifier_n9",
        "score/fid_classifier_n9/ddim50_eta0_ema_seed0",
        "train/loss",
        "score/bits_per_dim_prior_train_n9",
    ):
        client.log_metric(sweep, name, 1.0)
    key = choose_columns(client, experiment).removeprefix("&viewStateShareKey=")
    view = json.loads(client.get_experiment(experiment).tags[f"mlflow.sharedViewState.{key}"])
    assert view["runsExpanded"] == {sweep: True}
    assert view["selectedColumns"][:5] == [
        "tags.`ddpm_pipe.run_id`",
        *("params.`diffusion.schedule`", "params.`diffusion.num_timesteps`", "params.`training.steps`"),
        "metrics.`score/fid_classifier_n9`",
    ]
    assert view["selectedColumns"][5:] == ["metrics.`score/kid_classifier_n9`", "metrics.`sweep/rank`"]


def test_the_server_gets_its_store_by_environment_and_does_no_jobs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "true")
    environment = server_environment("postgresql://u:secret1@db/mlflow", home)
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://u:secret1@db/mlflow"
    assert "secret1" not in " ".join(server_command(5000))
