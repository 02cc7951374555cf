"""Random experiments: each trains, samples and is scored, twice alike, or is refused beforehand, with the reason that it should have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm import SCHEDULES, TIMESTEP_SPACINGS, bits_per_dim, normal_noise, timestep_subset
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.data.images import to_float
from pipeline.errors import UsageError
from pipeline.sampling.generation import Denoiser
from pipeline.training.batches import Batch
from pipeline.training.combinations import check_training
from pipeline.training.loop import TrainState, fit
from pipeline.training.models import build_diffusion, build_model, build_objective
from pipeline.training.randomness import training_draws
from tests.pipeline.worker.steps import CPU

SHAPE, NAMES = (1, 4, 4), ("zero", "one", "two")
STEPS, BATCH = 3, 4


@dataclass(frozen=True)
class Choice:
    schedule: str
    T: int
    zero_terminal_snr: bool
    prediction: str
    variance: str
    clip_x0: bool
    objective: str
    gamma: float
    timestep_sampling: str
    averages: bool
    micro_batch_size: int | None
    class_conditional: bool
    label_dropout: float
    sampler: str
    steps: int
    spacing: str
    eta: float
    guidance_scale: float
    labels: str
    seed: int

    @property
    def experiment(self) -> Experiment:
        model: dict[str, Any] = {"channels": 8, "channel_multipliers": [1, 1], "num_res_blocks": 1, "norm_groups": 4}
        model |= {"attention_resolutions": [2], "num_heads": 2, "class_conditional": self.class_conditional}
        training: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "warmup_steps": 0, "learning_rate": 1e-3}
        training |= {"objective": self.objective, "min_snr_gamma": self.gamma, "label_dropout": self.label_dropout}
        training |= {"timestep_sampling": self.timestep_sampling, "micro_batch_size": self.micro_batch_size}
        if self.averages:
            training |= {"ema_decay": [0.9, 0.5], "ema_widths": [0.1], "ema_snapshot_every_steps": 1}
        diffusion = {
            "schedule": self.schedule,
            "num_timesteps": self.T,
            "zero_terminal_snr": self.zero_terminal_snr,
            "prediction": self.prediction,
            "variance": self.variance,
            "clip_x0": self.clip_x0,
        }
        sampling = {
            "sampler": self.sampler,
            "steps": self.steps,
            "spacing": self.spacing,
            "eta": self.eta,
            "guidance_scale": self.guidance_scale,
            "labels": self.labels,
            "batch_size": 2,
        }
        sections = {"model": model, "diffusion": diffusion, "training": training, "sampling": sampling}
        return experiment_from({"seed": self.seed, **sections})

    @property
    def refused_with(self) -> set[str]:
        """Words of every reason to refuse, by MATHS, written independently of the code; none for what must work."""
        blind = self.zero_terminal_snr or self.schedule == "jsd"
        learned, guided = self.variance == "learned_range", self.guidance_scale != 1
        reasons = {
            "its last step holds no signal": blind and self.prediction in ("eps", "x_prev"),
            "none is learned": self.objective == "hybrid" and not learned,
            "nothing would train the variance": self.objective in ("simple", "min_snr") and learned,
            "not defined for prediction='x_prev'": self.objective == "min_snr" and self.prediction == "x_prev",
            "the last step has SNR 0": self.objective == "min_snr" and blind,
            "belongs to objective 'min_snr'": self.gamma != 5 and self.objective != "min_snr",
            "this model knows no classes": not self.class_conditional
            and (guided or self.labels != "#balanced" or self.label_dropout != 0.1),
            "drops every label": self.class_conditional and self.label_dropout == 1,
            "there is no class to guide to": self.class_conditional and guided and self.labels == "#none",
            "trained without labels too": self.class_conditional
            and self.label_dropout == 0
            and (guided or self.labels == "#none"),
            "1 step is t = 0 alone": self.steps == 1 and self.spacing in ("leading", "quad"),
            "only that one is pure noise": blind
            and timestep_subset(self.T, self.steps, self.spacing)[-1] != self.T - 1,
        }
        return {words for words, holds in reasons.items() if holds}


def mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    """The usual value two times in three, so that most combinations hold few surprises and many are valid."""
    return st.sampled_from([usual] * 2 * len(others) + list(others))


CHOICES = st.builds(
    Choice,
    schedule=st.sampled_from(SCHEDULES),
    T=st.integers(21, 30),
    zero_terminal_snr=mostly(False, True),
    prediction=st.sampled_from(["eps", "x0", "v", "x_prev"]),
    variance=st.sampled_from(["fixed_small", "fixed_large", "learned_range"]),
    clip_x0=st.booleans(),
    objective=st.sampled_from(["simple", "vlb", "hybrid", "min_snr"]),
    gamma=mostly(5.0, 1.0),
    timestep_sampling=st.sampled_from(["uniform", "loss_aware"]),
    averages=st.booleans(),
    micro_batch_size=st.sampled_from([None, 3]),
    class_conditional=st.booleans(),
    label_dropout=mostly(0.1, 0.0, 0.5, 1.0),
    sampler=st.sampled_from(["ancestral", "ddim", "dpm_solver"]),
    steps=st.integers(1, 21),
    spacing=mostly("trailing", *TIMESTEP_SPACINGS[1:]),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    guidance_scale=mostly(1.0, 0.0, 3.0),
    labels=mostly("#balanced", "#none", "two", "#0"),
    seed=st.integers(0, 99),
)


def batches(seed: int) -> Iterator[Batch]:
    """Batches of random images, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for step in count():
        images = torch.randint(0, 256, (BATCH, *SHAPE), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, len(NAMES), (BATCH,), generator=generator)
        yield Batch(step, images, labels, torch.arange(BATCH), training_draws(seed, step, 0, BATCH, SHAPE))


def train_sample_and_score(experiment: Experiment) -> list[Tensor]:
    """Everything that came out, in order; shapes are checked on the way."""
    torch.set_num_threads(1)
    diffusion, names = build_diffusion(experiment), NAMES if experiment.model.class_conditional else ()
    model = build_model(experiment, SHAPE, num_classes=len(names))
    train_state = TrainState.create(model, experiment.training, diffusion.num_timesteps, CPU)
    out = []
    null_class = len(names) or None
    steps = fit(
        train_state,
        model,
        build_objective(experiment),
        batches(experiment.seed),
        experiment.training,
        CPU,
        seed=experiment.seed,
        null_class=null_class,
    )
    for result, _ in zip(steps, range(STEPS), strict=False):
        result.require_finite()
        assert result.losses.shape == result.weights.shape == result.timesteps.shape == (BATCH,)
        out += [result.losses, result.grad_norm]
    out += [tensor for group in train_state.tensors().values() for tensor in group.values()]
    train_state.ema.copy_to(model)
    denoiser = Denoiser(diffusion, model, SHAPE, experiment.sampling, experiment.seed, CPU, names)
    images = list(denoiser.generate(3))
    assert [tuple(part.shape) for part in images] == [(2, *SHAPE), (1, *SHAPE)]
    visited = [t for t, _ in denoiser.denoise(range(2))]
    kept = timestep_subset(diffusion.num_timesteps, experiment.sampling.steps or 0, experiment.sampling.spacing)
    assert visited == list(reversed(kept))
    out += [x for _, x in denoiser.denoise(range(2))] + images
    x0 = to_float(next(batches(7)).images)
    bits = bits_per_dim(diffusion, denoiser.network(range(BATCH)), x0, generator=torch.Generator().manual_seed(0))
    assert bits.total.shape == (BATCH,)
    return [*out, bits.total]


def trains_or_is_refused_with_its_reason(choice: Choice) -> None:
    experiment = choice.experiment
    if choice.refused_with:
        with pytest.raises(UsageError) as error:
            check_training(experiment)
        message = str(error.value)
        assert any(words in message for words in choice.refused_with), message
        assert "\n" not in message
        return
    for warning in check_training(experiment):
        assert "degenerate" in warning or "leaves noise" in warning or "where abar =" in warning
    one, two = train_sample_and_score(experiment), train_sample_and_score(experiment)
    assert all(bool(torch.isfinite(x).all()) for x in one)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.slow
@settings(max_examples=30)
@given(CHOICES)
def test_every_experiment_trains_samples_and_is_scored_or_is_refused_with_its_reason(choice: Choice) -> None:
    trains_or_is_refused_with_its_reason(choice)


@pytest.mark.all
@settings(max_examples=200)
@given(CHOICES)
def test_every_experiment_of_many_trains_samples_and_is_scored_or_is_refused_with_its_reason(choice: Choice) -> None:
    trains_or_is_refused_with_its_reason(choice)


def test_a_degenerate_schedule_warns_and_runs() -> None:
    """linear_raw at T = 50 has abar_T = 0.60 (MATHS): the prior is not reached."""
    experiment = experiment_from({"diffusion": {"schedule": "linear_raw", "num_timesteps": 50}})
    (warning,) = check_training(experiment)
    assert "abar_T = 0.60" in warning


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            {"channel_multipliers": [1, 2, 2]},
            "got 4, expected at most 3, the levels of this U-Net; use -s training.act",
        ),
        ({"type": "a:B"}, "got 4, expected at most 0, since only the U-Net has levels to compute again"),
        ({"type": "vae"}, "got 4, but a vae is trained by its own bound; leave it out"),
    ],
)
def test_levels_that_a_network_does_not_have_are_not_computed_again(model: dict[str, Any], told: str) -> None:
    experiment = experiment_from({"model": model, "training": {"activation_checkpointing": 4}})
    with pytest.raises(UsageError, match=r"training\.activation_checkpointing: " + told):
        check_training(experiment)


def test_fixed_large_over_few_steps_warns() -> None:
    experiment = experiment_from({"sampling": {"sampler": "ancestral", "steps": 10}})
    (warning,) = check_training(experiment)
    assert "over 10 of 1000 steps" in warning


@pytest.mark.parametrize("step", [3, 900])
def test_guidance_follows_its_formula(step: int) -> None:
    """What the sampler is given is u + s (c - u) of the network with and without the label."""
    model: dict[str, Any] = {"channels": 8, "channel_multipliers": [1], "norm_groups": 4, "class_conditional": True}
    model |= {"attention_resolutions": [], "num_res_blocks": 1, "dropout": 0.0}
    experiment = experiment_from(
        {"model": model, "sampling": {"guidance_scale": 2.5, "labels": "one", "precision": "fp32"}}
    )
    network = build_model(experiment, SHAPE, num_classes=3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    denoiser = Denoiser(build_diffusion(experiment), network, SHAPE, experiment.sampling, 0, CPU, NAMES)
    x_t, t = normal_noise((2, *SHAPE), torch.Generator().manual_seed(0)), torch.full((2,), step)
    with torch.no_grad():
        c, u = (network(x_t, t, torch.full((2,), y)) for y in (1, 3))
        assert not torch.allclose(c, u, atol=1e-3)
        torch.testing.assert_close(denoiser.network(range(2))(x_t, t), u + 2.5 * (c - u), rtol=1e-4, atol=1e-5)
