"""The learning rate as a pure function of the step, so that a resumed training has the same."""

from __future__ import annotations

import math

from pipeline.config.experiment import TrainingConfig


def learning_rate_at(step: int, settings: TrainingConfig) -> float:
    """Return the rate of the step after `step` finished ones.

    It grows linearly from 0 over w = `warmup_steps` to r = `learning_rate`, then follows `learning_rate_schedule` until d = `decay_steps`,
    and keeps the value it has there. With x = (step - w) / (d - w) and the last value e = `final_learning_rate`:

        constant      r                                   (Ho et al. 2020, appendix B)
        linear        r + x (e - r)
        cosine        e + (r - e) (1 + cos(pi x)) / 2     (Loshchilov & Hutter 2017, equation 5)
        inverse_sqrt  r sqrt(w / step), w at least 1      (Vaswani et al. 2017, section 5.3)
    """
    rate, warmup, last = settings.learning_rate, settings.warmup_steps, settings.decay_steps
    if step < warmup:
        return rate * step / warmup
    if last is not None:
        step = min(step, last)
    if settings.learning_rate_schedule == "inverse_sqrt":
        return rate * math.sqrt(max(warmup, 1) / max(step, 1))
    if settings.learning_rate_schedule == "constant" or last is None:
        return rate
    done, end = (step - warmup) / (last - warmup), settings.final_learning_rate
    if settings.learning_rate_schedule == "linear":
        return rate + done * (end - rate)
    return end + (rate - end) * (1 + math.cos(math.pi * done)) / 2
