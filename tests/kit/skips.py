"""The skips that continuous integration accepts. Where the variable CI is set, a skip for any other reason fails the test.

A plugin of pytest's, registered by tests/conftest.py. Skips for want of a tool are not here: `.ci/run` installs the tools.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from typing import TypeVar

import pytest

# What the reason of a skip begins with, and why a run may lack it.
ACCEPTED = {
    "no CUDA device here": "most machines have no GPU",
    "no definitions of KubeRay's here": "they are KubeRay's files, beside some checkouts only",
    "no real image sets here": "they are large, and beside some checkouts only",
    "no Slurm here": "its daemons want to be root; `make test-all` runs their tests where Debian's slurm-wlm and munge are installed",
    "this machine allows no network namespace": "a container may forbid namespaces",
    "no mount namespaces here": "a container may forbid namespaces",
    "no control group with a memory limit can be made here": "a container may forbid control groups",
}

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Judge the skip of a test."""
    return _judged((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Judge the skip of a whole file."""
    return _judged((yield))


def _judged(report: Report) -> Report:
    """Return the report; under CI a failure in place of a skip whose reason is not accepted."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        assert isinstance(report.longrepr, tuple)  # file, line, "Skipped: REASON"
        file, line, reason = report.longrepr
        reason = re.sub(r"^Skipped: ", "", reason)
        if not reason.startswith(tuple(ACCEPTED)):
            report.outcome = "failed"
            report.longrepr = (
                f"{file}:{line}: skipped under CI: got the reason {reason!r}, expected one of ACCEPTED in tests/kit/skips.py. "
                "Provide what the test needs, or accept the reason there."
            )
    return report
