"""Convert our diffusion process to and from diffusers' scheduler_config.json: betas, prediction, variance, clipping.

Diffusers stores betas in float32, this package in float64. Settings without an equivalent raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from ddpm import SCHEDULES, BetaSchedule, GaussianDiffusion
from ddpm.betas import BETA_FIRST, BETA_LAST, named_betas
from pipeline.config.yaml_files import Section, validate

CLASS = "DDPMScheduler"
MAX_TIMESTEPS = 100_000
_READABLE = (CLASS, "DDIMScheduler")  # with betas and prediction under the same keys

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# their names of our schedules; the ends of these are scaled for T
_BY_ENDS = {"linear": "linear", "quadratic": "scaled_linear"}
_COSINE = "squaredcos_cap_v2"


class SchedulerConfig(Section):
    """The scheduler_config.json of a DDPMScheduler, with its defaults; the types allow what this package has."""

    model_config = ConfigDict(extra="ignore")

    num_train_timesteps: Annotated[int, Field(ge=2, le=MAX_TIMESTEPS)] = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "learned_range"] = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: Literal[False] = False
    rescale_betas_zero_snr: bool = False


def to_their_config(diffusion: GaussianDiffusion) -> dict[str, Any]:
    """Return the scheduler_config.json of an equivalent DDPMScheduler; ValueError for a prediction it does not have."""
    if diffusion.prediction not in _PREDICTIONS:
        raise ValueError(
            f"prediction {diffusion.prediction.value!r} has no equivalent; a DDPMScheduler reads eps, x0 or v"
        )
    return {
        "_class_name": CLASS,
        **_their_betas(diffusion.schedule),
        "num_train_timesteps": diffusion.num_timesteps,
        "prediction_type": _PREDICTIONS[diffusion.prediction],
        "variance_type": diffusion.variance.value,
        "clip_sample": diffusion.clip_x0,
        "clip_sample_range": 1.0,
        "rescale_betas_zero_snr": False,  # already applied to the betas
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "steps_offset": 0,
        # for all T steps both are equal; for fewer, leading would omit the last one
        "timestep_spacing": "trailing" if diffusion.schedule.has_zero_terminal_snr else "leading",
    }


def from_their_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return our `diffusion` settings; ValueError, or UsageError for a value of another type, if there is no equivalent."""
    kind = content.get("_class_name", CLASS)
    if kind not in _READABLE:
        raise ValueError(f"the scheduler is a {kind!r}; this package reads {' and '.join(_READABLE)}")
    old = {"prediction_type": "sample"} if content.get("predict_epsilon") is False else {}  # diffusers before 0.8
    theirs = validate(SchedulerConfig, {**old, **content}, "scheduler_config.json")
    if theirs.clip_sample and theirs.clip_sample_range != 1:
        raise ValueError(f"clip_sample_range is {theirs.clip_sample_range!r}; this package clips to [-1, 1]")
    ours = {name: our for our, name in _PREDICTIONS.items()}
    return {
        **_our_schedule(theirs),
        "zero_terminal_snr": theirs.rescale_betas_zero_snr,
        "prediction": ours[theirs.prediction_type],
        "variance": theirs.variance_type.removesuffix("_log"),  # fixed_small_log is another form of fixed_small
        "clip_x0": theirs.clip_sample,
    }


def _their_betas(schedule: BetaSchedule) -> dict[str, Any]:
    """Return the keys for these betas: a schedule that both packages have, else the list of betas."""
    T = schedule.num_timesteps
    for ours, theirs in _BY_ENDS.items():
        for name, scale in ((ours, 1000 / T), (f"{ours}_raw", 1.0)):
            if schedule.name == name:
                first, last = BETA_FIRST * scale, BETA_LAST * scale
                return {"beta_schedule": theirs, "beta_start": first, "beta_end": last, "trained_betas": None}
    if schedule.name == "cosine":
        return {"beta_schedule": _COSINE, "beta_start": BETA_FIRST, "beta_end": BETA_LAST, "trained_betas": None}
    return {
        "beta_schedule": "linear",  # ignored if there are trained betas
        "beta_start": BETA_FIRST,
        "beta_end": BETA_LAST,
        "trained_betas": schedule.betas.tolist(),
    }


def _our_schedule(theirs: SchedulerConfig) -> dict[str, Any]:
    """Return schedule and T: the name of our schedule with these betas, else a table."""
    T, table = theirs.num_train_timesteps, theirs.trained_betas
    if table is not None:
        if len(table) != T:
            raise ValueError(f"trained_betas: got {len(table)} numbers, expected {T}")
        return _named(torch.tensor(table, dtype=torch.float64))
    name, first, last = theirs.beta_schedule, theirs.beta_start, theirs.beta_end
    if name == "linear":
        return _named(torch.linspace(first, last, T, dtype=torch.float64))
    if name == "scaled_linear":
        return _named(torch.linspace(math.sqrt(abs(first)), math.sqrt(abs(last)), T, dtype=torch.float64) ** 2)
    if name == _COSINE:
        return _named(named_betas("cosine", T))
    if name == "sigmoid":  # a sigmoid of beta, unlike the schedule of that name here
        return _named(torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (last - first) + first)
    raise ValueError(
        f"beta_schedule is {name!r}; this package reads linear, scaled_linear, squaredcos_cap_v2 and sigmoid"
    )


def _named(betas: Tensor) -> dict[str, Any]:
    """Return our schedule with these betas, to float32 precision, else a table of them."""
    T = len(betas)
    for name in sorted(SCHEDULES, key=lambda name: name.endswith("_raw")):
        try:
            ours = named_betas(name, T)
        except ValueError:
            continue
        if torch.allclose(ours, betas, rtol=1e-6, atol=0):
            return {"schedule": name, "num_timesteps": T}
    return {"schedule": "table", "num_timesteps": T, "betas": betas.tolist()}
