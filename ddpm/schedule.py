"""The noise schedule: `betas` and the float64 tables that follow from them, and from nothing else.

Code index `t` runs over 0 .. T-1 and is step t+1 of Ho et al. 2020: t = 0 is an image diffused for one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ddpm.betas import named_betas

DEGENERATE_ABAR = 0.01
MIN_BETA = 1e-12  # below it 1 - abar has no correct digits in float64
MIN_ABAR = 1e-70  # below it x_t / sqrt(abar) is not a float32


def _check(betas: Tensor, exact_alphas: Tensor | None) -> None:
    """The betas of any chain, one step long or more: each in (0, 1), the last one in (0, 1]."""
    if not isinstance(betas, Tensor) or betas.dtype != torch.float64 or betas.dim() != 1:
        got = f"{betas.dtype} {tuple(betas.shape)}" if isinstance(betas, Tensor) else type(betas).__name__
        raise ValueError(f"betas: got {got}, expected a one-dimensional float64 tensor; use BetaSchedule.from_betas")
    alphas = 1 - betas if exact_alphas is None else exact_alphas
    inside = (betas > MIN_BETA) & (alphas > 0)
    inside[-1:] |= betas[-1:] == 1
    if not bool(inside.all()):
        t = int((~inside).nonzero()[0])
        raise ValueError(
            f"betas[{t}] = {float(betas[t]):.6g}, expected every beta inside (0, 1) and above {MIN_BETA:g}, 1 itself "
            "at the last step only; change the number of steps or the table"
        )
    lost = (alphas.cumprod(0) < MIN_ABAR) & (alphas > 0)
    if bool(lost.any()):
        raise ValueError(
            f"abar falls below {MIN_ABAR:g} at t={int(lost.nonzero()[0])} of {len(betas)}: the image is lost long "
            "before the end; use fewer steps or smaller betas"
        )


@dataclass(frozen=True, eq=False)
class BetaSchedule:
    """The variances of the forward process and every table derived from them: float64 tensors [T] on the CPU.

    Build one by `named`, `from_betas`, `respaced` or `with_zero_terminal_snr`. `kept` is None, or for a respaced
    schedule the code indices it kept of the schedule it came from; there `exact_alphas` stand in for 1 - betas, which
    loses its digits over long jumps. Raises ValueError where a beta lies outside (0, 1) or T is below 2.
    """

    betas: Tensor
    name: str = "custom"
    kept: tuple[int, ...] | None = None
    exact_alphas: Tensor | None = field(default=None, repr=False)
    _cast: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        _check(self.betas, self.exact_alphas)
        if self.kept is None and len(self.betas) < 2:
            raise ValueError(
                f"num_timesteps={len(self.betas)}, expected at least 2: a chain of one step is no diffusion"
            )

    def __reduce__(self) -> tuple[object, ...]:
        return BetaSchedule, (
            self.betas,
            self.name,
            self.kept,
            self.exact_alphas,
        )  # without the tables, which may lie on an accelerator

    @classmethod
    def named(cls, name: str, num_timesteps: int = 1000) -> BetaSchedule:
        """One of `SCHEDULES`.

        `linear`, `quadratic`, `constant`, `warmup10` and `warmup50` multiply their end values by 1000 / T, so that the
        chain reaches the prior whatever T is; their `_raw` forms keep them as in the code of Ho et al.
        """
        if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 2:
            raise ValueError(f"num_timesteps={num_timesteps!r}, expected an integer of at least 2")
        return cls(named_betas(name, num_timesteps), name)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], name: str = "custom") -> BetaSchedule:
        """A schedule from a table of T betas, copied to float64."""
        return cls(torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().clone(), name)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alphas(self) -> Tensor:
        """1 - betas."""
        return 1 - self.betas if self.exact_alphas is None else self.exact_alphas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar_t, the product of alphas up to and including t (Ho et al. 2020, eq. 4)."""
        return self.alphas.cumprod(0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """abar_{t-1}, with 1 in front: before the first step the image is clean."""
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def snr(self) -> Tensor:
        """Signal to noise, abar / (1 - abar)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """sqrt(abar), the weight of x0 in x_t."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """sqrt(1 - abar), the standard deviation of the noise in x_t."""
        return (1 - self.alphas_cumprod).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta tilde, the variance of q(x_{t-1} | x_t, x_0): eq. 7; 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """log of beta tilde; t = 0, whose variance is 0, takes the value of t = 1 (beta_0 in a chain of one step)."""
        variance = self.posterior_variance.clone()
        variance[0] = variance[1] if len(variance) > 1 else self.betas[0]
        return variance.log()

    @cached_property
    def fixed_large_log_variance(self) -> Tensor:
        """log beta, where t = 0 (the decoder) takes beta tilde of t = 1, as Ho et al. and OpenAI do."""
        return torch.cat([self.posterior_log_variance_clipped[:1], self.betas[1:].log()])

    @cached_property
    def log_betas(self) -> Tensor:
        """log beta, the upper end of a learned variance (Nichol & Dhariwal 2021, eq. 15)."""
        return self.betas.log()

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """The weight of x0 in the mean of q(x_{t-1} | x_t, x_0): eq. 7."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """The weight of x_t in the mean of q(x_{t-1} | x_t, x_0): eq. 7."""
        return (1 - self.alphas_cumprod_prev) * self.alphas.sqrt() / (1 - self.alphas_cumprod)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last step holds no signal at all (abar = 0)."""
        return float(self.alphas_cumprod[-1]) == 0.0

    @property
    def is_degenerate(self) -> bool:
        """Whether the chain stops short of the prior: abar at the last step above 0.01."""
        return float(self.alphas_cumprod[-1]) > DEGENERATE_ABAR

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of results made with this schedule must know; empty where all is well."""
        if not self.is_degenerate:
            return ()
        return (
            f"schedule {self.name!r} with T={self.num_timesteps} is degenerate: abar_T = "
            f"{float(self.alphas_cumprod[-1]):.3g} is "
            f"above {DEGENERATE_ABAR}, so that sampling starts from noise the training never saw; take more steps or "
            "larger betas",
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing and no fault: 1/sqrt(abar_T) beyond half precision, or no signal at T."""
        last = float(self.sqrt_alphas_cumprod[-1])
        if last == 0:
            return ("the last step holds no signal: only predictions v and x0 are defined there",)
        if 1 / last > 65504:
            return (f"1/sqrt(abar_T) = {1 / last:,.0f} exceeds half precision; x0 is formed in float32",)
        return ()

    def with_zero_terminal_snr(self) -> BetaSchedule:
        """sqrt(abar) shifted and scaled: the last becomes 0, the first stays (Lin et al. 2023, algorithm 1)."""
        if self.has_zero_terminal_snr:
            return self
        root = self.sqrt_alphas_cumprod
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas = abar / torch.cat([abar.new_ones(1), abar[:-1]])
        return BetaSchedule(1 - alphas, f"{self.name}+zero_terminal_snr", exact_alphas=alphas)

    def respaced(self, timesteps: Sequence[int]) -> BetaSchedule:
        """The chain over the kept steps alone, betas recomputed from their abar (Nichol & Dhariwal 2021, section 4).

        `timesteps` are code indices, strictly ascending. Index i of the result is step timesteps[i] of this schedule.
        """
        kept = tuple(int(t) for t in timesteps)
        ascending = all(a < b for a, b in pairwise(kept))
        if not kept or not ascending or kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise ValueError(
                f"timesteps {kept}, expected strictly ascending code indices inside 0 .. {self.num_timesteps - 1}"
            )
        if kept == tuple(range(self.num_timesteps)):
            return self
        abar = self.alphas_cumprod[list(kept)]
        alphas = abar / torch.cat([abar.new_ones(1), abar[:-1]])
        return BetaSchedule(1 - alphas, self.name, kept, alphas)

    def lookup(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """table[t] as [B,1,...] for an image batch `like`, on its device and in its dtype, float32 at least.

        The cast tables are kept per device, so that a training step copies nothing to the accelerator.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (table, like.device, dtype)
        if key not in self._cast:
            self._cast[key] = getattr(self, table).to(dtype).to(like.device)
        # index_select, unlike indexing, takes no negative index for one counted from the end.
        return self._cast[key].index_select(0, t).view(-1, *([1] * (like.dim() - 1)))
