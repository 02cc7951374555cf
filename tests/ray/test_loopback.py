"""Ray as `ddpm-pipe` starts it on this machine: it can't be reached from another one, and is started again where it hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kit.ports import listening_addresses
from tests.kit.waiting import wait_for
from tests.test_hermetic import ASK_OUTSIDE

HOLD_RAY = """
import sys
from pipeline.cluster.session import local_ray
from pipeline.config.cluster_profile import load_profile
with local_ray(load_profile("local"), num_workers=1):
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    print("up", *(node["NodeManagerAddress"] for node in ray.nodes()), flush=True)
    sys.stdin.read()
try:
    ray.put(1)
except ray.exceptions.RaySystemError:
    pass
sys.exit(ray.is_initialized())
"""


@pytest.mark.ray
def test_ray_workers_are_guarded(ray_session: Any) -> None:
    def attempt() -> tuple[str, bool]:
        namespace: dict[str, Any] = {}
        exec(ASK_OUTSIDE, namespace)
        result: tuple[str, bool] = namespace["attempt"]()
        return result

    assert ray_session.get(ray_session.remote(attempt).remote()) == ("ENETUNREACH", True)


@pytest.mark.ray
def test_the_shared_ray_listens_on_loopback_alone(ray_session: Any) -> None:
    addresses = listening_addresses(psutil.Process())
    assert addresses
    assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
    assert {node["NodeManagerAddress"] for node in ray_session.nodes()} == {"127.0.0.1"}


@pytest.mark.fault(20)
@pytest.mark.ray
def test_sigterm_is_read_after_ray_has_gone(user_environment: dict[str, str]) -> None:
    """Scoring follows a training whose Ray was shut down: a stop there is a stop like any other."""
    terminated = """
import os, signal, time
from pipeline.signals import Terminated, raising
with raising():
    with local_ray(load_profile("local"), num_workers=1):
        pass
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except Terminated:
        print("read")
"""
    done = subprocess.run(
        [sys.executable, "-c", HOLD_RAY.partition("with local_ray")[0] + terminated],
        env=user_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


@pytest.mark.fault(2)
@pytest.mark.ray
def test_ray_of_the_local_profile_listens_on_loopback_alone_and_a_worker_that_hangs_does_not_outlive_its_driver(
    user_environment: dict[str, str],
) -> None:
    hangs = """
class Hanging:
    def __init__(self):
        import atexit, signal, time
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        atexit.register(time.sleep, 600)
    def pid(self):
        import os
        return os.getpid()
hanging = ray.remote(Hanging).remote()
print(ray.get(hanging.pid.remote()), flush=True)
del hanging  # told to end
"""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_RAY.replace("    sys.stdin", textwrap.indent(hangs, "    ") + "    sys.stdin")],
        env=user_environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["up", "127.0.0.1"]
        worker = psutil.Process(int(process.stdout.readline()))
        addresses = listening_addresses(psutil.Process(process.pid))
        process.communicate()
    assert process.returncode == 0
    assert addresses
    assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.wait(timeout=5)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.all
def test_a_start_that_takes_too_long_is_ended_and_tried_again(user_environment: dict[str, str]) -> None:
    """The first raylet stands still, as on a machine that is too busy; Ray gives it half a minute."""

    def raylets(process: psutil.Process) -> list[psutil.Process]:
        return [child for child in process.children(recursive=True) if child.name() == "raylet"]

    def folders() -> set[str]:
        return {path.name for path in Path(os.environ["RAY_TMPDIR"]).glob("ddpm-ray-*")}

    before = folders()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_RAY], env=user_environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        parent = psutil.Process(process.pid)
        first = wait_for(lambda: raylets(parent), pause_s=0.005)
        first[0].suspend()
        assert process.stdout.readline().split() == ["up", "127.0.0.1"]
        assert not first[0].is_running()
        assert len(raylets(parent)) == 1
        assert len(folders() - before) == 1
        process.communicate()
    assert process.returncode == 0
    assert folders() == before
