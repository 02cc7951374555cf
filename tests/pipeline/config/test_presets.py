"""The presets are the papers': every number that decides a result, written by hand from the papers and their published code."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ddpm import BetaSchedule
from pipeline.config import presets
from pipeline.config.experiment import Experiment, load_experiment
from pipeline.training.combinations import check_training
from pipeline.training.models import build_diffusion, build_model, num_parameters


@dataclass(frozen=True)
class Paper:
    """What a preset is, in the order of REFERENCE: network, process, optimisation, data, sampling."""

    num_parameters: int
    shape: tuple[int, int, int]
    channels: tuple[int, tuple[int, ...]]
    blocks_attention_heads: tuple[int, tuple[int, ...], int]
    norm_eps_waves_padding: tuple[float, bool, int, int]
    scale_shift_norm: bool
    dropout: float
    T: int
    schedule: str
    first_and_last_beta: tuple[float, float]
    prediction: str
    variance: str
    objective: str
    timestep_sampling: str
    learning_rate: float
    warmup_steps: int
    grad_clip: float | None
    batch_size: int
    steps: int
    flips: bool


# Ho et al. 2020, appendix B, and their code: the warm-up, eps 1e-6, sine first, denominator half - 1, one-sided padding
HO_WAVES = (1e-6, False, 1, 0)
# Nichol & Dhariwal's code: eps 1e-5, cosine first, denominator half, symmetric padding
IDDPM_WAVES = (1e-5, True, 0, 1)
LINEAR = (1e-4, 0.02)
# 1 - abar(1/T) and the cap of 0.999: cos^2((u + 0.008) / 1.008 * pi/2) at T = 4000 falls by 1.0e-5 in its first step
COSINE = (pytest.approx(1.0e-5, rel=0.03), 0.999)

FACES = Paper(
    *(113_673_219, (3, 256, 256), (128, (1, 1, 2, 2, 4, 4)), (2, (16,), 1), HO_WAVES, False, 0.0),
    *(1000, "linear", LINEAR, "eps", "fixed_small", "simple", "uniform", 2e-5, 5000, 1.0, 64, 500_000, True),
)
PAPERS = {
    "ddpm-cifar10": Paper(
        *(35_746_307, (3, 32, 32), (128, (1, 2, 2, 2)), (2, (16,), 1), HO_WAVES, False, 0.1),
        *(1000, "linear", LINEAR, "eps", "fixed_large", "simple", "uniform", 2e-4, 5000, 1.0, 128, 800_000, True),
    ),
    "ddpm-celebahq-256": FACES,
    "ddpm-lsun-256": Paper(**{**vars(FACES), "steps": 1_200_000}),  # Church
    "iddpm-cifar10-hybrid": Paper(
        *(52_546_438, (3, 32, 32), (128, (1, 2, 2, 2)), (3, (16, 8), 4), IDDPM_WAVES, True, 0.3),
        *(4000, "cosine", COSINE, "eps", "learned_range", "hybrid", "uniform", 1e-4, 0, None, 128, 500_000, False),
    ),
    "iddpm-cifar10-vlb": Paper(
        *(52_546_438, (3, 32, 32), (128, (1, 2, 2, 2)), (3, (16, 8), 4), IDDPM_WAVES, True, 0.3),
        *(4000, "cosine", COSINE, "eps", "learned_range", "vlb", "loss_aware", 1e-4, 0, None, 128, 500_000, False),
    ),
}


def preset(name: str) -> Experiment:
    return load_experiment(presets.find("experiments", name))


def test_every_preset_of_the_papers_is_shipped_and_nothing_else_claims_to_be_one():
    assert set(presets.names("experiments")) == {*PAPERS, "digits", "digits-vae", "mnist"}


@pytest.mark.parametrize("name", PAPERS)
def test_each_preset_is_its_papers(name):
    paper, experiment = PAPERS[name], preset(name)
    model, training = experiment.model, experiment.training
    schedule: BetaSchedule = build_diffusion(experiment).schedule
    found = Paper(
        num_parameters=num_parameters(build_model(experiment, paper.shape, device="meta")),
        shape=paper.shape,
        channels=(model.channels, model.channel_multipliers),
        blocks_attention_heads=(model.num_res_blocks, model.attention_resolutions, model.num_heads),
        norm_eps_waves_padding=(model.norm_eps, model.flip_sin_to_cos, model.freq_shift, model.downsample_padding),
        scale_shift_norm=model.scale_shift_norm,
        dropout=model.dropout,
        T=schedule.num_timesteps,
        schedule=schedule.name,
        first_and_last_beta=(float(schedule.betas[0]), float(schedule.betas[-1])),
        prediction=experiment.diffusion.prediction,
        variance=experiment.diffusion.variance,
        objective=training.objective,
        timestep_sampling=training.timestep_sampling,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        grad_clip=training.grad_clip,
        batch_size=training.batch_size,
        steps=training.steps,
        flips=experiment.data.horizontal_flip,
    )
    assert found == paper


@pytest.mark.parametrize("name", PAPERS)
def test_what_all_papers_have_in_common(name):
    experiment = preset(name)
    training, sampling = experiment.training, experiment.sampling
    assert (training.ema_decay, training.ema_ramp_up) == (0.9999, False)
    assert (training.adam_betas, training.adam_eps, training.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert experiment.diffusion.clip_x0
    assert experiment.model.norm_groups == 32
    # Algorithm 2 over all steps
    assert (sampling.sampler, sampling.num_steps(experiment.diffusion.num_timesteps)) == (
        "ancestral",
        experiment.diffusion.num_timesteps,
    )
    assert experiment.evaluation.extractor == "inception"


def test_the_small_presets_are_these():
    """Written by hand: what their expected numbers and times were measured with."""
    digits, vae, mnist = (preset(name) for name in ("digits", "digits-vae", "mnist"))
    small, large = (1, 8, 8), (1, 28, 28)
    models = ((digits, small), (vae, small), (mnist, large))
    found = [num_parameters(build_model(experiment, shape, device="meta")) for experiment, shape in models]
    assert found == [651_041, 277_634, 1_112_801]

    def training(experiment):
        chosen = experiment.training
        return (
            chosen.learning_rate,
            chosen.steps,
            chosen.batch_size,
            chosen.warmup_steps,
            chosen.ema_decays,
            chosen.ema_ramp_up,
        )

    assert training(digits) == (2e-3, 2800, 64, 50, (0.998,), True)
    assert training(mnist) == (1e-3, 2500, 64, 100, (0.998,), True)
    assert training(vae) == training(digits)

    def sampling(experiment):
        chosen = experiment.sampling
        return chosen.sampler, chosen.steps, chosen.eta, chosen.spacing

    assert sampling(digits) == sampling(mnist) == ("ddim", 50, 1.0, "trailing")


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_the_small_presets_are_of_the_same_kind(name):
    """The cosine schedule with its 2.4e-9 at T = 1000, eps and L_simple."""
    experiment = preset(name)
    schedule = build_diffusion(experiment).schedule
    assert (schedule.name, schedule.num_timesteps) == ("cosine", 1000)
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(2.4e-9, rel=0.03)
    assert (experiment.diffusion.prediction, experiment.training.objective) == ("eps", "simple")
    assert (experiment.diffusion.variance, experiment.data.horizontal_flip) == ("fixed_large", False)


@pytest.mark.parametrize("name", presets.names("experiments"))
def test_no_preset_deserves_a_warning(name):
    assert check_training(preset(name)) == ()
