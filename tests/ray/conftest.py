"""One sweep, run once in full, for all tests that only look at what it left."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.ray.swept import Shell, prepare


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    home = tmp_path_factory.mktemp("swept")
    prepare(home)
    return Shell(home)


@pytest.fixture(scope="session")
def swept(shell: Shell) -> dict[str, Any]:
    """The grid sweep, run once in full: its result, as `--json` prints it."""
    code, stdout, stderr = shell.run("sweep", "grid.yaml", "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


@pytest.fixture(scope="session")
def winner(shell: Shell, swept: dict[str, Any]) -> dict[str, Any]:
    """The grid sweep's best point, trained as `train --from` does, with grids of samples on the way."""
    code, stdout, stderr = shell.run("train", "--from", swept["sweep"], "-s", "logging.grid_every_steps=20", "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found
