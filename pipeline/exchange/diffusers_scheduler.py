"""Convert our diffusion process to and from diffusers' scheduler_config.json: betas, prediction, variance, clipping.

Diffusers stores betas in float32, this package in float64. Settings without an equivalent raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm import SCHEDULES, BetaSchedule, GaussianDiffusion
from ddpm.betas import BETA_FIRST, BETA_LAST, named_betas

CLASS = "DDPMScheduler"
MAX_TIMESTEPS = 100_000
_READABLE = (CLASS, "DDIMScheduler")  # with betas and prediction under the same keys

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCES = {  # theirs -> ours; fixed_small_log is another form of fixed_small
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
# their names of our schedules; the ends of these are scaled for T
_BY_ENDS = {"linear": "linear", "quadratic": "scaled_linear"}
_COSINE = "squaredcos_cap_v2"

_THEIR_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}


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


def from_their_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our `diffusion` settings; ValueError if there is no equivalent."""
    kind = config.get("_class_name", CLASS)
    if kind not in _READABLE:
        raise ValueError(f"the scheduler is a {kind!r}; this package reads {' and '.join(_READABLE)}")
    theirs = _THEIR_DEFAULTS | {key: value for key, value in config.items() if key in _THEIR_DEFAULTS}
    if theirs["thresholding"]:
        raise ValueError("thresholding is on; this package clips x0 to [-1, 1] or not at all")
    if theirs["clip_sample"] and theirs["clip_sample_range"] != 1:
        raise ValueError(f"clip_sample_range is {theirs['clip_sample_range']!r}; this package clips to [-1, 1]")
    variance, prediction = theirs["variance_type"], theirs["prediction_type"]
    if "prediction_type" not in config and config.get("predict_epsilon") is False:  # diffusers before 0.8
        prediction = "sample"
    if not isinstance(variance, str) or variance not in _VARIANCES:
        raise ValueError(f"variance_type is {variance!r}; this package has only {', '.join(_VARIANCES)}")
    ours = {name: our for our, name in _PREDICTIONS.items()}
    if not isinstance(prediction, str) or prediction not in ours:
        raise ValueError(f"prediction_type is {prediction!r}; this package has only {', '.join(ours)}")
    return {
        **_our_schedule(theirs),
        "zero_terminal_snr": bool(theirs["rescale_betas_zero_snr"]),
        "prediction": ours[prediction],
        "variance": _VARIANCES[variance],
        "clip_x0": bool(theirs["clip_sample"]),
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


def _our_schedule(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return schedule and T: the name of our schedule with these betas, else a table."""
    T, table = theirs["num_train_timesteps"], theirs["trained_betas"]
    if type(T) is not int or not 2 <= T <= MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {T!r}; expected an integer from 2 to {MAX_TIMESTEPS}")
    if table is not None:
        numbers = [_number(beta) for beta in table] if isinstance(table, list) else []
        if len(numbers) != T or None in numbers:
            raise ValueError(f"trained_betas: expected a list of {T} numbers")
        return _named(torch.tensor(numbers, dtype=torch.float64))
    name, first, last = theirs["beta_schedule"], _number(theirs["beta_start"]), _number(theirs["beta_end"])
    if first is None or last is None:
        raise ValueError(f"beta_start {theirs['beta_start']!r} and beta_end {theirs['beta_end']!r} are not numbers")
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


def _number(value: object) -> float | None:
    """Return a finite number as float, None for anything else, such as integers that overflow a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
