"""Load a checkpoint on every worker: from its files if all workers see them, else from rank 0, which has them."""

from __future__ import annotations

from typing import Any

from pipeline.storage.checkpoint import Checkpoint, Tensors
from pipeline.training.team import Team


def load_everywhere(checkpoint: Checkpoint, team: Team, *, shared: bool) -> tuple[dict[str, Any], Tensors]:
    """Return a checkpoint's state and tensors, the same on all workers. `shared`: all of them see its files."""
    if shared or team.size == 1:
        return checkpoint.state(), checkpoint.tensors()
    state: dict[str, Any] = team.broadcast(checkpoint.state() if team.is_main else None)
    tensors: Tensors = {}
    # one group at a time, because rank 0 needs twice its memory
    for group in team.broadcast(checkpoint.groups() if team.is_main else None):
        tensors |= team.broadcast(checkpoint.tensors(group) if team.is_main else None)
    return state, tensors
