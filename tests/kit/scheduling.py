"""In which order tests run, and on which process under xdist."""

from __future__ import annotations

from typing import Any

import pytest

RAYS = "tests/ray/"
SWEPT = ("tests/ray/test_sweep_command.py", "tests/ray/test_pages.py")  # they look at one sweep, which takes minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put Ray's tests first, those that look at one sweep before all: they take longest."""
    items.sort(key=lambda item: (item.nodeid.partition("::")[0] not in SWEPT, not item.nodeid.startswith(RAYS)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under xdist one process begins with Ray's tests and the others at the other end: in the end each does what is left of either."""
    from xdist.scheduler import LoadScopeScheduling

    class FromBothEnds(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return SWEPT[0] if file in SWEPT else file

        def _assign_work_unit(self, node: Any) -> None:
            if node is not self.nodes[0]:
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    return FromBothEnds(config, log)
