"""Without Ray, no process of ours asks another machine for anything: a cloud's metadata service, statistics, a name server.

In a network namespace in which every address is this machine's own, each packet that a process sends is seen, whatever code sent it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hermetic import REPOSITORY
from tests.kit.commands import PROGRAM
from tests.kit.experiments import tiny_experiment, write_yaml

WATCH = """
import json, signal, socket, struct, subprocess, sys, threading, time, urllib.request

from tests.hermetic import isolate_network

METADATA = "169.254.169.254"


def watch(packets):
    while True:
        packet = packets.recv(65535)
        if packet[0] >> 4 == 4:
            target, header, protocol = socket.inet_ntoa(packet[16:20]), (packet[0] & 15) * 4, packet[9]
        else:
            target, header, protocol = socket.inet_ntop(socket.AF_INET6, packet[24:40]), 40, packet[6]
        if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            continue
        (port,) = struct.unpack("!H", packet[header + 2 : header + 4])
        if port == 53 or not (target.startswith("127.") or target in ("::1", "0.0.0.0")):
            asked.add(f"{target}:{port}")


if not isolate_network() or subprocess.run(["ip", "route", "add", "local", "default", "dev", "lo"]).returncode:
    sys.exit(77)
packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
packets.bind(("lo", 0))
asked, found = set(), {}
threading.Thread(target=watch, args=(packets,), daemon=True).start()


def note(name, code):
    time.sleep(0.2)
    found[name] = (code, sorted(asked))
    asked.clear()


program, *commands = json.loads(sys.argv[1])
for words in commands:
    note(words[0], subprocess.run([program, *words], stdout=sys.stderr).returncode)
pages = subprocess.Popen([program, "ui", "--port", "5055"], stdout=sys.stderr)
for _ in range(600):
    try:
        urllib.request.urlopen("http://127.0.0.1:5055/", timeout=5).read()
        break
    except OSError:
        time.sleep(0.1)
pages.send_signal(signal.SIGINT)
note("ui", pages.wait(60))
probe = socket.socket(type=socket.SOCK_DGRAM)
probe.sendto(b"", (METADATA, 80))
note("the probe", 0)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")
def test_no_command_without_ray_asks_another_machine(home: Path, user_environment: dict[str, str]) -> None:
    scored = {"enabled": True, "num_images": 32, "metrics": ["fid"]}
    experiment = tiny_experiment(training={"steps": 2}, evaluation=scored)
    name = write_yaml(home / "tiny.yaml", experiment)
    commands = [["train", name], ["sample", "latest", "-n", "1"], ["runs"]]
    environment = user_environment | {"PYTHONPATH": str(REPOSITORY)}  # without the guard, which would refuse in Python
    done = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps([PROGRAM, *commands])],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("this machine allows no network namespace")
    found = json.loads(done.stdout)
    assert found.pop("the probe") == [0, ["169.254.169.254:80"]]
    assert found == {name: [0, []] for name in ("train", "sample", "runs", "ui")}, done.stderr
