"""In which order tests run, and on which process under xdist: the most expensive first, so that no long one is left for the end.

`costs.json` holds the CPU seconds of each file that takes more than a few, as `pytest --costs` measured them; a file that is not in it
comes last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

COSTS: dict[str, float] = json.loads(Path(__file__).with_name("costs.json").read_text())
RAYS = (
    "tests/ray/",
    "tests/pipeline/sweeps/test_driving.py",
)  # they share what is done once: Ray, a sweep, undisturbed trainings
SWEPT = ("tests/ray/test_sweep_command.py", "tests/ray/test_pages.py")  # they look at one sweep, which takes minutes


def scope_of(nodeid: str) -> str:
    """Return what runs in one process, one test after another: a file, or the files that look at one sweep."""
    file = nodeid.partition("::")[0]
    return SWEPT[0] if file in SWEPT else file


def cost_of(scope: str) -> float:
    return sum(COSTS.get(file, 0.0) for file in (SWEPT if scope == SWEPT[0] else (scope,)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the most expensive files first."""
    items.sort(key=lambda item: -cost_of(scope_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under xdist the first process takes Ray's files and the others the rest; one that has none of its own left helps the other."""
    from xdist.scheduler import LoadScopeScheduling

    class RayApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            own = (scope for scope in self.workqueue if scope.startswith(RAYS) == (node is self.nodes[0]))
            self.workqueue.move_to_end(next(own, next(iter(self.workqueue))), last=False)
            super()._assign_work_unit(node)

    return RayApart(config, log)
