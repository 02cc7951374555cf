"""The maths of denoising diffusion probabilistic models, on torch alone."""

from ddpm.betas import SCHEDULES
from ddpm.diffusion import Denoised, Gaussian, GaussianDiffusion, Model, Prediction, ReverseStep, Variance
from ddpm.ema import ExponentialMovingAverage, WeightAverage
from ddpm.guidance import ConditionalModel, conditioned, drop_labels, guided
from ddpm.likelihood import BitsPerDim, bits_per_dim
from ddpm.noise import Generators, normal_noise
from ddpm.objective import Objective, ObjectiveKind, l_simple
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
    "ConditionalModel",
    "Denoised",
    "Draw",
    "EMAProfile",
    "ExponentialMovingAverage",
    "Gaussian",
    "GaussianDiffusion",
    "Generators",
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
    "few_steps_warning",
    "guided",
    "l_simple",
    "late_start_warning",
    "normal_noise",
    "posthoc_error",
    "posthoc_weights",
    "reconstruct",
    "slerp",
    "timestep_subset",
]
