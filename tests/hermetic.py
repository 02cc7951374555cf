"""Run pytest shut off from the machine: own HOME, state and temporary folders, no network but loopback, nothing left behind.

    python tests/hermetic.py [--keep] [PYTEST ARGUMENTS]

`make test` runs the suite through this. Exit code: pytest's own; 1 if pytest passed but left a process running, asked for another machine
(ACCEPTED_REFUSALS lists the exceptions) or (under CI) changed the working tree. `--keep` leaves the temporary
folder for a look. A plain `pytest` gets the same environment from tests/conftest.py, without the network namespace and those checks.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
MARKER = "DDPM_PIPE_TEST_RUN"  # in the environment of every process that the tests start
NETWORK_LOG = "DDPM_PIPE_TEST_NETWORK_LOG"
_KEPT = {"DDPM_PIPE_TEST_DATA", "DDPM_PIPE_TEST_SCHEMAS"}
_SCRUBBED_PREFIXES = (
    "RAY_",
    "MLFLOW_",
    "AWS_",
    "DDPM_PIPE_",
    "XDG_",
    "HF_",
    "GOOGLE_",
    "OTEL_",
    "PYTEST_",
    "SLURM_",
    "SBATCH_",
)
_SCRUBBED = {
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "PYTHONWARNINGS",
    "TORCH_HOME",
    "MPLCONFIGDIR",
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
}
# Refused connections that do not fail the run: a pattern of tests/guard's line "EVENT TARGET by pid N: COMMAND", and the reason.
ACCEPTED_REFUSALS = {
    r"^\S+ \(?'(::ffff:192\.0\.2\.77|192\.0\.2\.77|2001:db8::1|example\.invalid)'": "tests of the guard ask for what nobody has",
    r"^\S+ \(?'(169\.254\.169\.254|metadata\.google\.internal)'.* by pid \d+: '\S*/ray/dashboard/dashboard\.py ": (
        "Ray's dashboard asks the machine's cloud for its name as it starts; no setting of Ray's prevents that"
    ),
}


def make_root() -> Path:
    """Create the run's temporary folder; its path is short because Ray's socket paths below it must stay under 104 bytes (macOS)."""
    return Path(tempfile.mkdtemp(prefix="dp-", dir="/tmp")).resolve()


def hermetic_environment(root: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` without what could reach into the tests, with every place that programs write to below `root`; makes the folders."""
    environment = {
        name: value
        for name, value in base.items()
        if name in _KEPT
        or not (name.startswith(_SCRUBBED_PREFIXES) or name in _SCRUBBED or name.lower().endswith("_proxy"))
    }
    places = {
        "HOME": "home",
        "DDPM_PIPE_HOME": "state",
        "TMPDIR": "tmp",
        "XDG_CACHE_HOME": "home/.cache",
        "XDG_CONFIG_HOME": "home/.config",
        "XDG_DATA_HOME": "home/.local/share",
        "XDG_STATE_HOME": "home/.local/state",
        "XDG_RUNTIME_DIR": "run",
        "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis",
    }
    for variable, place in places.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        environment[variable] = str(root / place)
    (root / "run").chmod(0o700)
    environment |= {
        "RAY_TMPDIR": str(root),
        # Two tests run side by side: threads that wait must not keep the cores from those that compute. No result depends on it.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(REPOSITORY / "tests" / "guard"),
        NETWORK_LOG: str(root / "network.log"),
        MARKER: secrets.token_hex(8),
    }
    return environment


def isolate_network() -> bool:
    """Move this process and its children to a network namespace that holds nothing but loopback; False where the system doesn't allow it.

    Reaches what the audit hook of tests/guard can't see: Ray's, Arrow's and gloo's native code.
    """
    if not sys.platform.startswith("linux"):
        return False
    new_user, new_net = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET of <sched.h>
    uid, gid = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(new_net if uid == 0 else new_user | new_net) != 0:
        return False
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(text)
    set_flags, up_and_running = 0x8914, 0x1 | 0x40  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING of <linux/if.h>
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, set_flags, struct.pack("16sh14x", b"lo", up_and_running))
    return True


def adopt_orphans() -> None:
    """Make this process the parent of daemons that its children leave behind (Linux), so that none gets out of sight."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _carries(process: psutil.Process, marker: str) -> bool:
    try:
        return process.environ().get(MARKER) == marker
    except (psutil.Error, OSError):
        return False


def leftovers(marker: str) -> list[psutil.Process]:
    """Return the live processes that descend from this one or carry `marker` in their environment."""
    own = psutil.Process()
    found = {process.pid: process for process in own.children(recursive=True)}
    found |= {process.pid: process for process in psutil.process_iter() if _carries(process, marker)}
    found.pop(own.pid, None)
    return [process for process in found.values() if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def end_leftovers(marker: str, grace_s: float = 10.0) -> list[str]:
    """Wait `grace_s` for processes that are just ending, then end the others; return a line for each of these."""
    _, remaining = psutil.wait_procs(leftovers(marker), timeout=grace_s)
    lines = []
    for process in remaining:
        try:
            lines.append(f"{process.pid}: {' '.join(process.cmdline())[:200] or process.name()}")
            process.terminate()
        except psutil.Error:
            continue
    psutil.wait_procs(remaining, timeout=5)
    for process in leftovers(marker):
        process.kill()
    return lines


def unexpected_refusals(network_log: Path) -> list[str]:
    """Return the refused connections that are not on the list, each once, with the first process that asked."""
    found: dict[str, str] = {}
    for line in network_log.read_text().splitlines() if network_log.exists() else []:
        if not any(re.search(pattern, line) for pattern in ACCEPTED_REFUSALS):
            found.setdefault(line.partition(" by pid")[0], line)
    return sorted(found.values())


def working_tree() -> str:
    """Return what git says of the checkout, or "" outside one."""
    command = ["git", "-C", str(REPOSITORY), "status", "--porcelain"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def run_pytest(arguments: list[str], environment: dict[str, str]) -> int:
    """Run pytest in a session of its own, hand Ctrl-C and SIGTERM on to it, and return its exit code."""
    command = [sys.executable, "-m", "pytest", *arguments]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    ) as pytest:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: pytest.send_signal(signal.SIGINT))
        while True:
            # Adopted orphans are ours to reap; as zombies they would look alive to a test that waits for their end.
            pid, status = os.waitpid(-1, 0)
            if pid == pytest.pid:
                pytest.returncode = os.waitstatus_to_exitcode(status)
                return pytest.returncode


def say(line: str) -> None:
    """Print beside pytest's output, whose last line stays the last of stdout."""
    print(f"hermetic: {line}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Run the suite and judge what it left."""
    keep = "--keep" in arguments
    before = working_tree()
    root = make_root()
    environment = hermetic_environment(root, os.environ)
    adopt_orphans()
    if not isolate_network():
        say("no network namespace here: only Python code is held to loopback")
    try:
        code = run_pytest([argument for argument in arguments if argument != "--keep"], environment)
        left = end_leftovers(environment[MARKER])
        if left:
            say("the tests left processes running (ended now):\n  " + "\n  ".join(left))
            code = code or 1
        refused = unexpected_refusals(Path(environment[NETWORK_LOG]))
        if refused:
            say("the tests asked for other machines (refused):\n  " + "\n  ".join(refused))
            code = code or 1
    finally:
        if keep:
            say(f"kept {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    if working_tree() != before:
        say("the working tree changed during the run: compare `git status`")
        if os.environ.get("CI"):  # at a desk, the change may be the developer's own typing
            code = code or 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
