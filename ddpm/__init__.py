"""The maths of denoising diffusion probabilistic models, on torch alone."""

from ddpm.betas import SCHEDULES
from ddpm.diffusion import GaussianDiffusion, Model, Prediction, ReverseStep, Variance
from ddpm.ema import ExponentialMovingAverage, WeightAverage
from ddpm.guidance import conditioned, drop_labels, guided
from ddpm.likelihood import (
    BitsPerDim,
    BoundEstimate,
    bits_per_dim,
    estimate_bound,
    range_midpoints,
    simple_losses,
    term_probabilities,
)
from ddpm.noise import normal_noise
from ddpm.objective import Objective, ObjectiveKind
from ddpm.posthoc_ema import EMAProfile, PowerFunctionEMA, posthoc_error, posthoc_weights, reconstruct
from ddpm.respacing import TIMESTEP_SPACINGS, late_start_warning, timestep_subset
from ddpm.sampler import Step, ancestral, ddim, ddim_invert, dpm_solver, few_steps_warning, slerp
from ddpm.schedule import BetaSchedule
from ddpm.timesteps import Draw, LossAwareTimesteps, TimestepSampler, UniformTimesteps
from ddpm.unet import UNet

__all__ = [
    "SCHEDULES",
    "TIMESTEP_SPACINGS",
    "BetaSchedule",
    "BitsPerDim",
    "BoundEstimate",
    "Draw",
    "EMAProfile",
    "ExponentialMovingAverage",
    "GaussianDiffusion",
    "LossAwareTimesteps",
    "Model",
    "Objective",
    "ObjectiveKind",
    "PowerFunctionEMA",
    "Prediction",
    "ReverseStep",
    "Step",
    "TimestepSampler",
    "UNet",
    "UniformTimesteps",
    "Variance",
    "WeightAverage",
    "ancestral",
    "bits_per_dim",
    "conditioned",
    "ddim",
    "ddim_invert",
    "dpm_solver",
    "drop_labels",
    "estimate_bound",
    "few_steps_warning",
    "guided",
    "late_start_warning",
    "normal_noise",
    "posthoc_error",
    "posthoc_weights",
    "range_midpoints",
    "reconstruct",
    "simple_losses",
    "slerp",
    "term_probabilities",
    "timestep_subset",
]
