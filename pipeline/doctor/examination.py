"""What `ddpm-pipe doctor` looks at, and how it asks the nodes of the cluster that this process has joined."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.cluster.nodes import answers, nodes
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment
from pipeline.doctor import node_checks
from pipeline.doctor.verdicts import NodeFacts
from pipeline.errors import ClusterError
from pipeline.storage.remote import is_remote
from pipeline.training.models import Shape

if TYPE_CHECKING:
    from pipeline.planning.capacity import Node

T = TypeVar("T")
WHOLE_S = 57.0  # all checks together
ASK_S = 15.0


@dataclass
class Examination:
    """What is examined: a profile, with an experiment whose step is timed, and a dataset if there is one.

    `environment` are the variables that the profile forwards, which are secret; `test_folder` holds what the storage is tried with.
    """

    profile: Profile
    experiment: Experiment
    shape: Shape
    num_parameters: int
    dataset: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    test_folder: str = field(default_factory=lambda: f".doctor-{secrets.token_hex(4)}")
    storage_is_tried: bool = False
    begun: float = field(default_factory=time.monotonic)

    def left(self, limit_s: float) -> float:
        """Return the time that a check may take, so that all of them end in time."""
        return max(1.0, min(limit_s, self.begun + WHOLE_S - time.monotonic()))

    @property
    def place(self) -> str:
        """Where runs are kept: a folder, or an address in an object store."""
        return str(self.profile.storage if is_remote(self.profile.storage) else self.profile.home())

    @cached_property
    def nodes(self) -> list[Node]:
        """The cluster's nodes."""
        return nodes()

    @cached_property
    def names(self) -> dict[str, str]:
        """Names for people, by node; several nodes of one machine are told apart."""
        seen: dict[str, int] = {}
        for node in self.nodes:
            seen[node.name] = seen.get(node.name, 0) + 1
        return {n.id: n.name if seen[n.name] == 1 else f"{n.name} ({n.id[:6]})" for n in self.nodes}

    def ask(self, questions: Mapping[str, Callable[[], T]], limit_s: float = ASK_S) -> dict[str, T]:
        """Call a function on each node, all at once; answers by node. ClusterError names those that do not answer."""
        found: dict[str, T] = dict(answers(questions, self.left(limit_s), self.environment))
        self.require_all(found)
        return found

    def require_all(self, answered: Mapping[str, Any]) -> None:
        """Raise ClusterError, which names them, where nodes have not answered."""
        silent = [self.names[node.id] for node in self.nodes if node.id not in answered]
        if silent:
            raise ClusterError(
                f"no answer in time from {', '.join(silent)}; is that machine up, and does this package import there?"
            )

    @cached_property
    def facts(self) -> list[NodeFacts]:
        """What each node says about itself."""
        answered = self.ask(
            {node.id: partial(node_checks.facts, self.names[node.id]) for node in self.nodes}, limit_s=20.0
        )
        return [answered[node.id] for node in self.nodes]
