"""The promises of tests/hermetic.py and tests/guard, tried on real sockets and real processes."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.hermetic import REPOSITORY, hermetic_environment
from tests.kit.waiting import wait_for

PUBLIC = ("192.0.2.77", 80)  # an address reserved for documentation (RFC 5737)

ASK_OUTSIDE = f"""
import errno, socket
def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.settimeout(5)
        try:
            s.connect({PUBLIC!r})
        except OSError as error:
            return errno.errorcode.get(error.errno, repr(error)), "loopback only" in str(error)
    return "connected", False
"""


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_connecting_to_another_machine_is_unreachable(kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as sock, pytest.raises(OSError, match="loopback only") as caught:
        sock.connect(PUBLIC)
    assert caught.value.errno == errno.ENETUNREACH


@pytest.mark.parametrize(
    "act",
    [
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", PUBLIC),
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(("2001:db8::1", 80)),
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(("::ffff:192.0.2.77", 80)),
        lambda: socket.create_connection(("example.invalid", 80), timeout=5),
        lambda: socket.gethostbyname("example.invalid"),
        lambda: socket.gethostbyaddr("192.0.2.77"),
    ],
    ids=["datagram", "ipv6", "ipv4-in-ipv6", "by name", "lookup", "reverse lookup"],
)
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_every_other_way_out_is_closed(act: Callable[[], Any]) -> None:
    with pytest.raises(OSError, match=r"loopback only|no name lookups"):
        act()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "localhost"])
def test_loopback_is_open(host: str) -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as server,
        socket.create_connection((host, server.getsockname()[1]), timeout=5) as client,
    ):
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"ping")
            assert accepted.recv(4) == b"ping"


def test_the_machines_own_name_may_be_looked_up() -> None:
    refused = ""
    try:
        socket.gethostbyname(socket.gethostname())
    except socket.gaierror as error:  # some machines have no address for their name
        refused = str(error)
    assert "no name lookups" not in refused  # the guard's words


def test_sockets_in_the_file_system_are_open(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))


def test_a_child_process_is_guarded_and_the_machines_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.the_machines_own = True")
    environment = os.environ | {"PYTHONPATH": f"{os.environ['PYTHONPATH']}:{tmp_path}"}
    code = ASK_OUTSIDE + "import sys; print(attempt(), sys.the_machines_own)"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "('ENETUNREACH', True) True"


def test_the_environment_is_scrubbed_and_every_place_lies_below_the_root(tmp_path: Path) -> None:
    base = {
        "RAY_ADDRESS": "ray://elsewhere:10001",
        "MLFLOW_TRACKING_URI": "https://elsewhere",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "DDPM_PIPE_HOME": "/home/me",
        "DDPM_PIPE_TEST_DATA": "/data",
        "https_proxy": "http://elsewhere",
        "HOME": "/home/me",
        "PATH": "/usr/bin",
        "PIP_CONFIG_FILE": "/etc/pip.conf",
    }
    environment = hermetic_environment(tmp_path, base)
    assert not {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY", "https_proxy"} & set(environment)
    assert [environment[name] for name in ("PATH", "PIP_CONFIG_FILE", "DDPM_PIPE_TEST_DATA")] == [
        "/usr/bin",
        "/etc/pip.conf",
        "/data",
    ]
    for name in ("HOME", "DDPM_PIPE_HOME", "TMPDIR", "RAY_TMPDIR", "XDG_CACHE_HOME"):
        assert Path(environment[name]).is_relative_to(tmp_path)
        assert Path(environment[name]).is_dir()


def hermetic_command(test_file: Path) -> list[str]:
    runner = [sys.executable, str(REPOSITORY / "tests" / "hermetic.py")]
    return [
        *runner,
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(test_file.parent),
        str(test_file),
    ]


def run_hermetic(test_file: Path, body: str) -> subprocess.CompletedProcess[str]:
    test_file.write_text(textwrap.dedent(body))
    return subprocess.run(hermetic_command(test_file), capture_output=True, text=True, check=False)


def test_a_process_left_behind_fails_the_run_and_is_ended(tmp_path: Path) -> None:
    out = run_hermetic(
        tmp_path / "test_leaves_a_daemon.py",
        """
        import os, subprocess, sys
        def test_passes():
            daemon = "import os; os.setsid(); os.fork() and os._exit(0); os.execvp('sleep', ['sleep', '987'])"
            subprocess.run([sys.executable, "-c", daemon], check=True, env={})  # no marker: found by descent alone
        """,
    )
    assert "1 passed" in out.stdout
    assert out.returncode == 1
    assert "left processes running" in out.stderr
    pid = int(out.stderr.split("(ended now):")[1].split(":")[0])
    assert not psutil.pid_exists(pid)
    assert f"{pid}: sleep 987" in out.stderr


def test_a_refused_connection_fails_the_run_unless_it_is_on_the_list(tmp_path: Path) -> None:
    out = run_hermetic(
        tmp_path / "test_asks_outside.py",
        """
        import contextlib, socket, subprocess, sys
        def test_passes():
            for code in ("connect(('203.0.113.5', 80))", "connect(('192.0.2.77', 80))"):
                with contextlib.suppress(OSError), socket.socket() as asking:
                    eval("asking." + code)
            dashboard = "import socket; socket.socket().connect(('169.254.169.254', 80))"  # not Ray's
            assert subprocess.run([sys.executable, "-c", dashboard, "a", "b"], capture_output=True).returncode == 1
        """,
    )
    assert "1 passed" in out.stdout
    assert out.returncode == 1
    assert "asked for other machines (refused):\n  socket.connect ('169.254.169.254', 80) by pid " in out.stderr
    assert "\n  socket.connect ('203.0.113.5', 80) by pid " in out.stderr
    assert "192.0.2.77" not in out.stderr


def test_stopping_the_runner_stops_pytest_and_removes_the_root(tmp_path: Path) -> None:
    test_file = tmp_path / "test_sleeps.py"
    started = tmp_path / "started"
    test_file.write_text(
        f"import os, pathlib, time\n"
        f"def test_sleeps():\n"
        f"    pathlib.Path({str(started)!r}).write_text(os.environ['HOME'])\n"
        f"    time.sleep(600)\n"
    )
    with subprocess.Popen(
        hermetic_command(test_file), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as runner:
        wait_for(lambda: started.exists() and started.read_text())
        runner.send_signal(signal.SIGTERM)
        stdout, _ = runner.communicate(timeout=60)
    assert "KeyboardInterrupt" in stdout
    assert runner.returncode == pytest.ExitCode.INTERRUPTED
    assert not Path(started.read_text()).parent.exists()


def test_an_orphan_that_ends_is_gone_for_a_test_that_waits_for_it(tmp_path: Path) -> None:
    out = run_hermetic(
        tmp_path / "test_waits_for_an_orphan.py",
        """
        import subprocess, time, psutil
        def test_passes():
            orphan = int(subprocess.run(["sh", "-c", "sleep 0.2 >/dev/null & echo $!"], capture_output=True, check=True).stdout)
            for _ in range(300):
                if not psutil.pid_exists(orphan):
                    return
                time.sleep(0.1)
            raise AssertionError(psutil.Process(orphan).status())
        """,
    )
    assert out.returncode == 0, out.stdout


def test_a_run_that_leaves_nothing_passes_and_removes_its_root(tmp_path: Path) -> None:
    out = run_hermetic(
        tmp_path / "test_leaves_nothing.py",
        f"""
        import os, pathlib
        def test_passes():
            root = pathlib.Path(os.environ["HOME"]).parent
            pathlib.Path({str(tmp_path / "root")!r}).write_text(str(root))
            assert root.is_dir()
        """,
    )
    assert (out.returncode, "1 passed" in out.stdout) == (0, True), out.stdout + out.stderr
    assert not Path((tmp_path / "root").read_text()).exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")
def test_code_that_is_not_python_reaches_nothing_but_loopback(tmp_path: Path) -> None:
    out = run_hermetic(
        tmp_path / "test_sees_interfaces.py",
        """
        import socket, pytest
        def test_only_loopback_exists():
            assert [name for _, name in socket.if_nameindex()] == ["lo"]
        """,
    )
    if "no network namespace here" in out.stderr:
        pytest.skip("this machine allows no network namespace")
    assert out.returncode == 0, out.stdout
