"""`ddpm-pipe doctor` against healthy clusters, and against each fault it names, really made to happen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CliResult

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ALL = ["cluster", "versions", "resources", "clocks", "disk", "storage", "dataset", "all-reduce", "step", "mlflow"]
WORKS = {"green", "yellow"}  # a busy or small machine is yellow, and may be the one that tests run on


def found(result: CliResult) -> dict[str, dict[str, Any]]:
    assert "Traceback" not in result.stderr
    findings = json.loads(result.stdout)["checks"]
    assert [finding["check"] for finding in findings] == ALL
    return {finding["check"]: finding for finding in findings}


def reds(result: CliResult) -> set[str]:
    return {name for name, finding in found(result).items() if finding["verdict"] == "red"}


def test_this_machine_needs_no_profile_and_nothing_stays(cli, home):
    result = cli("doctor")
    assert result.code == 0, result
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert [line[8:20].strip() for line in lines] == ALL
    assert list(home.iterdir()) == []


def test_a_read_only_place_without_room(home, user_environment):
    """In a mount namespace of its own, where the storage is a small read-only file system."""
    place = home / "place"
    place.mkdir()
    (home / "there.yaml").write_text(f"storage: {place}\nresources_per_worker: {{CPU: 1}}\nthreads_per_worker: 1\n")
    ddpm_pipe = Path(sys.executable).with_name("ddpm-pipe")
    script = f"mount -t tmpfs -o size=20m,ro tmpfs {place} && exec {ddpm_pipe} doctor --cluster there.yaml --json"
    alone = (
        ["unshare", "--mount", "sh", "-c"]
        if os.geteuid() == 0
        else ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    )
    if subprocess.run([*alone, f"mount -t tmpfs tmpfs {place}"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run([*alone, script], cwd=home, env=user_environment, capture_output=True, text=True, timeout=300)
    result = CliResult(done.returncode, done.stdout, done.stderr)
    assert result.code == 10, result
    assert reds(result) >= {"disk", "storage"}
    seen = found(result)
    assert "Read-only file system" in seen["storage"]["says"]
    assert str(place) in seen["disk"]["says"]


def test_a_dataset_that_hangs_is_red_and_ends_in_time(cli, home, tmp_path):
    """Reading a pipe that nobody writes to never ends: what a dead network file system does."""
    (tmp_path / "hanging").mkdir()
    os.mkfifo(tmp_path / "hanging" / "manifest.json")
    result = cli("doctor", "--data", tmp_path / "hanging", "--json", timeout_s=120)
    assert result.code == 10, result
    assert reds(result) == {"dataset"}
    assert "no answer" in found(result)["dataset"]["says"]
