"""What is done once for many tests: a sweep in full, and trainings that nobody disturbed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.conftest import type_here
from tests.ray.small import SLOW_NETWORK, TWO_WORKERS, digests, only_run, slow
from tests.ray.swept import Shell, prepare


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> Shell:
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


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> Callable[[int], dict[str, str]]:
    """The digests that the slow training of tests.ray.small ends with on one worker or two if nobody disturbs it."""

    @cache
    def train(workers: int) -> dict[str, str]:
        home = tmp_path_factory.mktemp("calm")
        (home / "slow_network.py").write_text(SLOW_NETWORK)
        (home / "two.yaml").write_text(TWO_WORKERS)
        slow(home, pause=0.0)
        chosen = ["--cluster", "two.yaml"] if workers == 2 else []
        code, _, stderr = type_here(home, "train", "slow.yaml", *chosen, env={"DDPM_PIPE_HOME": str(home)})
        assert code == 0, stderr
        return digests(only_run(home))

    return train
