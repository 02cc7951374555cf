"""The maths of denoising diffusion probabilistic models, on torch alone."""

from ddpm.betas import SCHEDULES
from ddpm.diffusion import Denoised, Gaussian, GaussianDiffusion, Model, Prediction, ReverseStep, Variance
from ddpm.ema import ExponentialMovingAverage
from ddpm.objective import l_simple
from ddpm.sampler import Step, ancestral, ddim, few_steps_warning, normal_noise, timestep_subset
from ddpm.schedule import BetaSchedule
from ddpm.unet import UNet

__all__ = [
    "SCHEDULES",
    "BetaSchedule",
    "Denoised",
    "ExponentialMovingAverage",
    "Gaussian",
    "GaussianDiffusion",
    "Model",
    "Prediction",
    "ReverseStep",
    "Step",
    "UNet",
    "Variance",
    "ancestral",
    "ddim",
    "few_steps_warning",
    "l_simple",
    "normal_noise",
    "timestep_subset",
]
