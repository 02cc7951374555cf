"""The safe environment that every test stands on: that of `make test` (tests/hermetic.py), and what eases tests in this process."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Set
from pathlib import Path

from tests.guard import network_guard
from tests.hermetic import MARKER, hermetic_environment, make_root

IN_PROCESS_ONLY = {
    # One thread in the test process: bit-exactness is promised per thread count, and the machine is shared with the test's own workers.
    "OMP_NUM_THREADS": "1",
    # Ray reads this when first imported; on Linux it alone makes Ray listen on loopback only, whatever `_node_ip_address` says.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # MLflow reads these when first imported, which here a test may do before our own code, and would talk on stderr and to its makers.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def make_safe() -> None:
    """Give this process the environment of the tests; to be called before anything reads the one that the shell gave."""
    if MARKER not in os.environ:  # a plain `pytest`
        root = make_root()
        environment = hermetic_environment(root, os.environ)
        os.environ.clear()
        os.environ.update(environment)
        owner = os.getpid()

        def remove_root() -> None:
            if os.getpid() == owner:  # not a forked child's to remove
                shutil.rmtree(root, ignore_errors=True)

        atexit.register(remove_root)
    network_guard.install()
    # A shell's background jobs ignore Ctrl-C, and so would every process that a test starts to interrupt it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(IN_PROCESS_ONLY)
    from hypothesis import settings

    settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
    settings.register_profile("soak", max_examples=1000, deadline=None, database=None, print_blob=True)
    settings.load_profile("seeded")


def users_own() -> dict[str, str]:
    """Return the environment for a process that stands for a user's own: isolated, but without what eases tests in this process."""
    return {name: value for name, value in os.environ.items() if name not in IN_PROCESS_ONLY}


def forget_modules(folder: Path, known: Set[str]) -> None:
    """Forget the modules of a folder that were imported since `known` were: another test's network may be called the same."""
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def restore_environment(before: Mapping[str, str]) -> None:
    """Make the environment what it was, variable by variable: threads of Ray and MLflow may be reading it."""
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
