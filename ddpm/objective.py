"""Training objectives: what is minimised at a drawn step, one number per example.

The caller weighs, averages and bins by t: every objective returns [B].
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion, Model, Prediction, Variance, choice
from ddpm.likelihood import vlb_term

VLB_SHARE = 0.001  # lambda of Nichol & Dhariwal 2021, section 3.1


class ObjectiveKind(StrEnum):
    """What is minimised."""

    SIMPLE = "simple"  # squared error on the target, every t alike (Ho et al. 2020, eq. 14)
    VLB = "vlb"  # the variational bound, in bits/dim (eqs. 5, 8, 12)
    HYBRID = "hybrid"  # simple for the mean, plus a little vlb for the variance alone (Nichol & Dhariwal 2021, eq. 16)
    MIN_SNR = "min_snr"  # squared error weighed by min(snr, gamma) on the scale of x0 (Hang et al. 2023)


class Objective:
    """A loss for networks read by `diffusion`: objective(model, x0, t, eps) -> [B], with gradients.

    x0 in [-1, 1] and eps ~ N(0, I) are [B,C,H,W], t is [B]. `vlb` and `hybrid` estimate the bound by one term, so
    multiply it by T; L_T, which no network changes, is left out. x0 is not clipped in either: a clipped pixel would
    have no gradient. ValueError for a combination that cannot work.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, kind: ObjectiveKind | str = "simple", *, gamma: float = 5.0
    ) -> None:
        self.diffusion, self.kind, self.gamma = diffusion, choice(ObjectiveKind, kind, "objective"), gamma
        _check(diffusion, self.kind, gamma)
        self._unclipped = replace(diffusion, clip_x0=False)

    @property
    def num_timesteps(self) -> int:
        """T: t is drawn from 0 .. T - 1."""
        return self.diffusion.num_timesteps

    def __call__(self, model: Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of each example [B]."""
        x_t = self.diffusion.q_sample(x0, t, eps)
        output = model(x_t, t)
        if self.kind is ObjectiveKind.VLB:
            return self._vlb(output, x0, x_t, t)
        prediction, _ = self.diffusion.split(output, x_t)
        loss = ((prediction - self.diffusion.target(x0, x_t, t, eps)) ** 2).flatten(1).mean(1)
        if self.kind is ObjectiveKind.MIN_SNR:
            return loss * self.weight(t, loss)
        if self.kind is ObjectiveKind.HYBRID:
            mean, variance = output.chunk(2, dim=1)
            return loss + VLB_SHARE * self._vlb(torch.cat([mean.detach(), variance], 1), x0, x_t, t)
        return loss

    def weight(self, t: Tensor, like: Tensor) -> Tensor:
        """min(snr, gamma) on the squared error of x0, as a weight on that of the target: [B], like `like` [B]."""
        snr = self.diffusion.schedule.lookup("snr", t, like)
        if self.diffusion.prediction is Prediction.EPS:
            return (self.gamma / snr).clamp(max=1)  # min(snr, gamma)/snr, which is 1 where a tiny snr is 0 in float32
        weight = snr.clamp(max=self.gamma)
        return weight / (snr + 1) if self.diffusion.prediction is Prediction.V else weight

    def _vlb(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        p = self._unclipped.reverse_step(self._unclipped.interpret_output(output, x_t, t), x_t, t)
        return self.diffusion.num_timesteps * vlb_term(self._unclipped, x0, x_t, t, p).to(x_t.dtype)


def _check(diffusion: GaussianDiffusion, kind: ObjectiveKind, gamma: float) -> None:
    learned = diffusion.variance is Variance.LEARNED_RANGE
    if kind is ObjectiveKind.HYBRID and not learned:
        raise ValueError(
            f"objective='hybrid' with variance={diffusion.variance.value!r}: its bound trains the variance alone, and "
            "none is learned; "
            "use variance 'learned_range', or objective 'simple'"
        )
    if kind in (ObjectiveKind.SIMPLE, ObjectiveKind.MIN_SNR) and learned:
        raise ValueError(
            f"objective={kind.value!r} with variance='learned_range': nothing would train the variance; use objective "
            "'hybrid' or 'vlb'"
        )
    if kind is not ObjectiveKind.MIN_SNR:
        return
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}, expected a positive number (5 in the paper)")
    if diffusion.prediction is Prediction.X_PREV:
        raise ValueError(
            "objective='min_snr' is not defined for prediction='x_prev'; use prediction 'eps', 'x0' or 'v'"
        )
    if diffusion.schedule.has_zero_terminal_snr:
        raise ValueError(
            f"objective='min_snr' with schedule {diffusion.schedule.name!r}: the last step has SNR 0 and would get "
            "weight 0, yet sampling "
            "starts there; use objective 'simple', or a schedule without zero terminal SNR"
        )
