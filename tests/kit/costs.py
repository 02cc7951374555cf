"""What each test costs: `pytest --costs FILE` appends one JSON line per test with its CPU and wall seconds, set-up and teardown included.

CPU seconds count every process that the test starts, and hardly depend on what else the machine does, so they decide a test's tier and
place in the order (scheduling.py). They come from a control group where one can be made (Linux, root); elsewhere only children that were
waited for are counted. The set-up of a fixture that several tests share is part of the first test that uses it.

    python -m tests.kit.costs FILE          prints the sum, the 25 most expensive tests, and the sum of each file
    python -m tests.kit.costs FILE --json   prints what `costs.json` holds: the CPU seconds of each file, where they are more than two
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

OPTION = "--costs"


@contextlib.contextmanager
def cpu_clock() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the CPU seconds of this process and of all that it starts meanwhile."""
    for root, name in (("/sys/fs/cgroup/cpuacct", "cpuacct.usage"), ("/sys/fs/cgroup", "cpu.stat")):
        group = Path(root, f"ddpm-pipe-{os.getpid()}")
        if _entered(group, name):
            try:
                yield partial(_seconds, group / name)
            finally:
                (group.parent / "cgroup.procs").write_text(str(os.getpid()))
                with contextlib.suppress(OSError):  # a process that a test left is still in it
                    group.rmdir()
            return
    yield lambda: sum(os.times()[:4])


def _entered(group: Path, name: str) -> bool:
    """Make a control group and enter it; False where that is not allowed, or it does not count CPU time."""
    try:
        group.mkdir()
        _seconds(group / name)
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        return False
    return True


def _seconds(file: Path) -> float:
    """Read a group's CPU time: version 1 gives nanoseconds, version 2 lines of names and microseconds."""
    text = file.read_text()
    return int(text) / 1e9 if file.name == "cpuacct.usage" else int(text.split()[1]) / 1e6


class Costs:
    """The plugin that measures; each process of a run appends to the same file."""

    def __init__(self, file: Path, clock: Callable[[], float]) -> None:
        self.file, self.clock = file, clock

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        cpu_s, wall_s = self.clock(), time.monotonic()
        found = yield
        cost = {"test": item.nodeid, "cpu_s": self.clock() - cpu_s, "wall_s": time.monotonic() - wall_s}
        with self.file.open("a") as stream:
            stream.write(json.dumps(cost | {"marks": sorted({mark.name for mark in item.iter_markers()})}) + "\n")
        return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, metavar="FILE", type=Path, help="append the CPU and wall seconds of each test to FILE")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption(OPTION)
    if file is None or (config.getoption("numprocesses", None) and not hasattr(config, "workerinput")):
        return  # under xdist the workers measure
    stack = contextlib.ExitStack()
    config.add_cleanup(stack.close)
    config.pluginmanager.register(Costs(file.absolute(), stack.enter_context(cpu_clock())), "costs")


def by_file(costs: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the CPU seconds of each file, the most expensive first."""
    files: dict[str, float] = defaultdict(float)
    for cost in costs:
        files[cost["test"].partition("::")[0]] += cost["cpu_s"]
    return dict(sorted(files.items(), key=lambda item: -item[1]))


def report(costs: list[dict[str, Any]]) -> str:
    files = by_file(costs)
    slowest = sorted(costs, key=lambda cost: -cost["cpu_s"])[:25]
    return "\n".join(
        [
            f"{len(costs)} tests, {sum(files.values()):.0f} CPU s",
            *(f"{cost['cpu_s']:7.1f} CPU s {cost['wall_s']:7.1f} s  {cost['test']}" for cost in slowest),
            "",
            *(f"{cpu_s:7.1f} CPU s  {file}" for file, cpu_s in files.items()),
        ]
    )


if __name__ == "__main__":
    found = map(json.loads, Path(sys.argv[1]).read_text().splitlines())
    last = list({cost["test"]: cost for cost in found}.values())  # of a test that was run twice, the last time
    if "--json" in sys.argv:
        print(json.dumps({file: round(cpu_s) for file, cpu_s in by_file(last).items() if cpu_s > 2}, indent=1))
    else:
        print(report(last))
