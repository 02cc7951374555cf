"""What a command line sends to a cluster's dashboard, what is refused before, and what is said when the cluster fails."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.jobs.job_secrets import PAD_VARIABLE, joined
from tests.pipeline.jobs.dashboard import TOKEN, Dashboard, running_dashboard

# of the argument that Ray's own client gives aiohttp for an address without TLS
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")

JOB = "ddpm-k7m2abcd"
Sending = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with running_dashboard() as running:
        yield running


@pytest.fixture
def profile(home: Path, tmp_path: Path, dashboard: Dashboard) -> Callable[..., str]:
    """Write a profile that sends jobs to the dashboard; return its path."""

    def write(**changes: Any) -> str:
        content = {
            "kind": "job",
            "address": dashboard.url,
            "resources_per_worker": {"CPU": 1},
            "storage": str(tmp_path / "shared"),
            "mlflow": {"tracking_uri": "http://127.0.0.1:9"},
        }
        path = tmp_path / "there.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return str(path)

    return write


@pytest.fixture
def send(
    typed: Callable[..., tuple[int, str, str]], profile: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Sending:
    """Type a command with the profile: send("train", "--detach", profile={...}); return exit code, stdout and stderr."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)

    def call(*words: str, **changes: Any) -> tuple[int, str, str]:
        arguments = [*words, "--cluster", profile(**changes)]
        monkeypatch.setattr("sys.argv", ["ddpm-pipe", *arguments])  # from where the command that is sent is taken
        return typed(*arguments)

    return call


def called(dashboard: Dashboard) -> dict[str, Any]:
    """Return the parameters that the job calls its command with."""
    parameters: dict[str, Any] = json.loads(shlex.split(dashboard.submitted()["entrypoint"])[-1])["parameters"]
    return parameters


def test_the_run_that_mlflow_opened_goes_with_the_job_and_with_its_store(send, dashboard, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc123")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    code, _, err = send("train", "--detach")
    assert code == 0, err
    env = dashboard.submitted()["runtime_env"]["env_vars"]
    assert env["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5999"  # though the profile names another
    assert "MLFLOW_RUN_ID" not in env  # every worker would get it, and each trial of a sweep take it for its own
    (half,) = [body for method, path, body in dashboard.sent if method == "PUT" and "/ddpm-pipe-" in path]
    assert joined(env[PAD_VARIABLE], half) == {"MLFLOW_RUN_ID": "abc123"}


def test_a_run_that_the_job_could_not_write_to_is_refused(send, dashboard, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc123")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    code, _, err = send("train", "--detach")
    assert code == 2
    assert "MLFLOW_RUN_ID names a run in sqlite:///" in err
    assert "set MLFLOW_TRACKING_URI to a server's http(s) address" in err
    assert not [path for method, path, _ in dashboard.sent if method != "GET"]


def test_without_mlflows_run_the_profile_says_where_runs_are_recorded(send, dashboard, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    assert send("train", "--detach")[0] == 0
    assert "MLFLOW_TRACKING_URI" not in dashboard.submitted()["runtime_env"]["env_vars"]


def test_image_files_between_which_to_draw_are_sent(send, dashboard, home, tmp_path):
    elsewhere = tmp_path / "a seven.png"
    elsewhere.write_bytes(b"not looked at here")
    code, _, err = send("sample", "k7m2", "--detach", "--interpolate", "12", str(elsewhere))
    assert code == 0, err
    assert called(dashboard)["between"] == ["12", ".ddpm-pipe/0/a seven.png"]


def test_a_folder_that_is_called_like_a_preset_is_not_taken_for_it(send, dashboard, home):
    (home / "digits").mkdir()
    code, _, err = send("train", "digits", "--data", "digits", "--detach")
    assert code == 0, err
    assert called(dashboard)["experiment"] == "digits"
    assert called(dashboard)["data"] == str(home / "digits")  # where a folder is what is meant


@pytest.mark.parametrize(
    "argument",
    ["api_key=q8Zt4Lw0", "x.password=hunter22", "hf_" + "a1B2c3D4e5F6g7H8i9" + "k" * 16, "of-correct-horse-9-battery"],
)
def test_secrets_in_arguments_are_refused_before_anything_is_sent(send, dashboard, monkeypatch, argument):
    monkeypatch.setenv("MY_SECRET", "correct-horse-9")
    code, _, err = send("sample", "k7m2", "--label", argument, "--detach")
    assert code == 2
    assert "forward_env" in err
    assert argument not in err
    assert not [path for method, path, _ in dashboard.sent if method != "GET"]


@pytest.mark.parametrize("argument", ["num_tokens=64", "tokenizer=bpe", "token_grid=[8,8]"])
def test_settings_that_sound_like_secrets_and_are_none_are_sent(send, dashboard, argument):
    code, _, err = send("sample", "k7m2", "--label", argument, "--detach")
    assert code == 0, err
    assert called(dashboard)["labels"] == argument


def test_results_go_where_they_can_be_found_again(send, dashboard, tmp_path):
    for out in ("here", "s3://bucket/x"):
        code, _, err = send("sample", "k7m2", "--out", out, "--detach")
        assert code == 2
        assert "the job writes on another machine; give an absolute folder" in err
    assert send("sample", "k7m2", "--out", str(tmp_path / "out"), "--detach")[0] == 0
    assert called(dashboard)["out"] == str(tmp_path / "out")


def test_a_plan_that_measures_nothing_needs_no_cluster(send):
    nobody = {"address": "http://127.0.0.1:9", "storage": "s3://bucket/nowhere"}
    code, out, err = send("train", "--dry-run", "--no-probe", **nobody)
    assert code == 0, err
    assert "what the cluster has of it was not looked at" in out
    assert "no Ray cluster answers" in send("train", "--dry-run", **nobody)[2]


def test_a_cluster_that_lets_anybody_in_is_refused(send, dashboard):
    dashboard.open_to_all = True
    for command in (["train", "--detach"], ["jobs", "list"]):
        code, _, err = send(*command)
        assert code == 2
        assert "lets anybody run code on it" in err
    assert {path for _, path, _ in dashboard.sent} == {"/api/version"}
    assert send("jobs", "list", insecure=True)[0] == 0


FAULTS = {
    "listing": (["jobs", "list"], r"^GET /api/jobs/$"),
    "following": (["jobs", "follow", "latest"], r"^GET /api/jobs/$"),
    "stopping": (["jobs", "stop", "latest"], r"/stop$"),
    "looking at the job to stop": (["jobs", "stop", "latest"], rf"{JOB}$"),
    "looking for packages": (["train", "--detach"], r"^GET /api/packages"),
    "taking files": (["train", "--detach"], r"^PUT /api/packages"),
    "taking the job": (["train", "--detach"], r"^POST /api/jobs/$"),
}


CASES = [(when, fault) for when in FAULTS for fault in (500, "drop")]


@pytest.mark.parametrize(("when", "fault"), CASES)
def test_a_dashboard_that_fails_is_reported_in_one_line(send, dashboard, when, fault):
    command, pattern = FAULTS[when]
    dashboard.add_job(JOB, "RUNNING")
    dashboard.fault = lambda method, path: fault if re.search(pattern, f"{method} {path}") else None
    code, out, err = send(*command)
    assert (code, out) == (8, ""), err
    last = err.strip().splitlines()[-1]
    assert re.match(r"ddpm-pipe: profile 'there': the cluster did not .*\S", last)
    assert "Traceback" not in err


def test_what_does_not_speak_as_the_address_says_is_reported(send, dashboard):
    code, _, err = send("jobs", "list", address=dashboard.url.replace("http://", "https://"))
    assert code == 8
    assert "no secure connection" in err
    assert "SSL_CERT_FILE" in err


@pytest.mark.parametrize(("left", "code"), [(0, 0), (3, 3), (75, 75), (143, 143), (137, 8), (-9, 8), (139, 8)])
def test_a_driver_that_was_killed_is_told_from_one_that_ended(send, dashboard, left, code):
    dashboard.add_job(JOB, "FAILED" if left else "SUCCEEDED", left)
    got, _, err = send("jobs", "follow", "latest")
    assert got == code, err
    if code == 8:
        name = "SIGSEGV" if left == 139 else "SIGKILL"
        assert f"the driver of job {JOB} was killed on the cluster by {name}" in err


def test_a_lost_connection_is_reported_and_restored(send, dashboard):
    dashboard.add_job(JOB, "RUNNING")
    dashboard.log = "one\ntwo\n"
    seen: list[str] = []

    def fault(method: str, path: str) -> str | None:
        seen.append(path)
        tails = [path for path in seen if path.endswith("/tail")]
        if len(tails) == 5:
            dashboard.log = "one\ntwo\nthree\n"
            dashboard.add_job(JOB, "SUCCEEDED", 0)
        return "drop" if path.endswith("/tail") and len(tails) in (2, 3) else None  # the client tries twice by itself

    dashboard.fault = fault
    code, _, err = send("jobs", "follow", "latest")
    assert code == 0, err
    lines = err.splitlines()
    assert [line for line in lines if line in ("one", "two", "three")] == ["one", "two", "three"]
    assert sum(f"lost the connection to {JOB}" in line for line in lines) == 1
    assert sum(f"following {JOB} again" in line for line in lines) == 1


def test_following_ends_at_once_where_the_job_is_gone(send, dashboard):
    dashboard.add_job(JOB, "RUNNING")

    def fault(method: str, path: str) -> str | None:
        if path.endswith("/tail"):
            dashboard.jobs.clear()  # the cluster was started anew
            return "drop"
        return None

    dashboard.fault = fault
    code, _, err = send("jobs", "follow", "latest")
    assert code == 8
    assert f"knows no job {JOB} any more" in err
