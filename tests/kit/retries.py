"""What tests had to try again because of the machine, not of the product: counted, and named at the end of the run.

A retry that nobody sees hides a start that fails more and more often.
"""

from __future__ import annotations

from typing import Any

import pytest

RETRIES: list[str] = []  # of the test that runs


def note_retry(what: str) -> None:
    """Count something that is tried again."""
    RETRIES.append(what)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Send what was tried again along with the test's report, from the process that runs it to the one that sums up."""
    report = yield
    report.user_properties += [("retried", what) for what in RETRIES]
    RETRIES.clear()
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name every retry."""
    found = [
        f"{report.nodeid} ({report.when}): {what}"
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, what in getattr(report, "user_properties", ())
        if name == "retried"
    ]
    if found:
        terminalreporter.section(f"tried again: {len(found)}")
        for line in found:
            terminalreporter.line(line)
