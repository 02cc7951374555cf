"""Processes for trainings, forked from a server that has everything imported already: each takes a second, not seven."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.kit.preloaded"])


def run_team(function: Callable[..., None], arguments: tuple[Any, ...], size: int) -> None:
    """Call `function(rank, *arguments)` in `size` processes at once; an error in one of them is raised here."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=size, start_method="forkserver")  # type: ignore[no-untyped-call]
