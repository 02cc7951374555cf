"""Ray as `ddpm-pipe` starts it on this machine can't be reached from another one."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from tests.test_hermetic import listening_addresses

HOLD_RAY = """
import sys
from pipeline.cluster.session import local_ray
from pipeline.settings.cluster_profile import load_profile
with local_ray(load_profile("local"), num_workers=1):
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    print("up", *(node["NodeManagerAddress"] for node in ray.nodes()), flush=True)
    sys.stdin.read()
"""


@pytest.mark.ray
def test_ray_of_the_local_profile_listens_on_loopback_alone(user_environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", HOLD_RAY]
    with subprocess.Popen(
        command, env=user_environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        state = process.stdout.readline().split()
        addresses = listening_addresses(psutil.Process(process.pid))
        process.communicate()
    assert state == ["up", "127.0.0.1"]
    assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
    assert addresses
    assert process.returncode == 0
