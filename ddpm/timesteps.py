"""How training draws its steps: uniformly, or more often where the loss is large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HISTORY = 10  # losses remembered per step (Nichol & Dhariwal 2021, section 3.3)
UNIFORM_SHARE = 0.001  # so that no step is ever forgotten


class Draw(NamedTuple):
    """Code indices t [B] int64, and the weight [B] float32 that makes the mean loss unbiased."""

    t: Tensor
    weight: Tensor


class TimestepSampler(Protocol):
    """What the training loop needs: draw timesteps, take in their losses, save and load."""

    def draw(self, u: Tensor) -> Draw:
        """A step for each of `u` [B], uniform numbers in [0, 1): a function of them and of this sampler's state alone."""

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the unweighted losses [N] at steps t [N], from all workers, in one order that all of them use."""

    def state_dict(self) -> dict[str, Tensor]:
        """What must be in a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict`."""


class UniformTimesteps:
    """Every step alike, weight 1; it has no state."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def draw(self, u: Tensor) -> Draw:
        """The steps floor(u T), on the device of u; float64 there, since float32 may round up to T."""
        return Draw((u * self.num_timesteps).long(), torch.ones(len(u), device=u.device))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Nothing is learned from losses."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """ValueError for the state of another kind of sampler."""
        if state:
            raise ValueError(
                f"state {sorted(state)} is not that of uniform timesteps; resume with the sampling it was made by"
            )


class LossAwareTimesteps:
    """Importance sampling of Nichol & Dhariwal 2021, eq. 18, made for the `vlb` objective.

    p_t = 0.999 w_t / sum(w) + 0.001 / T, with w_t the root mean square of the last ten losses at t; uniform until every
    step has ten. The history is kept on the CPU in float64. It is the same on all workers as long as each `update` gets
    the losses of all of them, in one order.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self.losses = torch.zeros(num_timesteps, HISTORY, dtype=torch.float64)  # a ring for each step
        self.seen = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p_t [T] float64, which sum to 1."""
        weights = self.losses.square().mean(1).sqrt()
        if bool((self.seen < HISTORY).any()) or float(weights.sum()) == 0:
            return torch.full_like(weights, 1 / self.num_timesteps)
        return (1 - UNIFORM_SHARE) * weights / weights.sum() + UNIFORM_SHARE / self.num_timesteps

    def draw(self, u: Tensor) -> Draw:
        """The steps at the quantiles u of p, on the device of u, with weights 1 / (T p_t)."""
        p = self.probabilities()
        cumulative = p.cumsum(0).to(u.device)
        t = torch.searchsorted(cumulative, u.to(cumulative.dtype), right=True).clamp(max=self.num_timesteps - 1)
        return Draw(t, (1 / (self.num_timesteps * p)).float().to(u.device)[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the unweighted losses [N] at steps t [N], the last ten of each step."""
        order = t.cpu().argsort(stable=True)
        steps, values = t.cpu()[order], losses.detach().cpu().double()[order]
        unique, group, sizes = torch.unique_consecutive(steps, return_inverse=True, return_counts=True)
        rank = (
            torch.arange(len(steps)) - (sizes.cumsum(0) - sizes)[group]
        )  # earlier losses of this update, at this step
        last = rank >= sizes[group] - HISTORY
        slot = (self.seen[steps] + rank) % HISTORY
        self.losses[steps[last], slot[last]] = values[last]
        self.seen[unique] += sizes

    def state_dict(self) -> dict[str, Tensor]:
        """{"losses": [T,10] float64, "seen": [T] int64}, copies."""
        return {"losses": self.losses.clone(), "seen": self.seen.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """ValueError where the state is of another kind or another number of steps."""
        if sorted(state) != ["losses", "seen"] or state["losses"].shape != self.losses.shape:
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            raise ValueError(
                f"state {shapes} does not fit {self.num_timesteps} loss-aware steps; use the same sampling and T"
            )
        self.losses.copy_(state["losses"])
        self.seen.copy_(state["seen"])
