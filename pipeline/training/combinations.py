"""Which settings make sense together. Others are refused with the reason before anything is computed; poor choices give warnings."""

from __future__ import annotations

from ddpm import GaussianDiffusion, few_steps_warning, late_start_warning, timestep_subset
from pipeline.config.experiment import OF_PROCESS, Experiment, ModelConfig, SamplingConfig, TrainingConfig
from pipeline.config.yaml_files import Section
from pipeline.console import plural
from pipeline.data.labels import BALANCED, NONE, ClassNames, class_name, own_word
from pipeline.errors import UsageError
from pipeline.training.learning_rate import learning_rate_at
from pipeline.training.models import build_diffusion, build_objective, has_process


def check_training(experiment: Experiment) -> tuple[str, ...]:
    """Refuse what cannot be trained or sampled as asked (UsageError); return warnings."""
    build_objective(experiment)
    idle = _steps_without_learning(experiment.training)
    if not has_process(experiment):
        _check_no_process(experiment)
        return idle
    diffusion = build_diffusion(experiment)
    _check_unread_settings(experiment.training, experiment.model)
    return (*idle, *diffusion.schedule.warnings, *check_sampling(experiment, experiment.sampling))


def check_sampling(experiment: Experiment, sampling: SamplingConfig) -> tuple[str, ...]:
    """Refuse settings that a model of this experiment cannot be sampled with (UsageError); return warnings."""
    if not has_process(experiment):
        _refuse_changed("sampling", sampling, {"batch_size"}, "a vae draws an image in one call")
        return ()
    diffusion = build_diffusion(experiment)
    steps = sampling.num_steps(diffusion.num_timesteps)
    _check_guidance(experiment, sampling, sampling.labels)
    if steps == 1 and sampling.spacing in ("leading", "quad"):
        raise UsageError(
            f"spacing: {sampling.spacing!r} with 1 step is t = 0 alone, where nearly all of an image is there already; use "
            "'trailing' or 'linspace', or more steps"
        )
    timesteps = timestep_subset(diffusion.num_timesteps, steps, sampling.spacing)
    _check_last_step(diffusion, sampling, timesteps)
    few = few_steps_warning(diffusion, len(timesteps)) if sampling.sampler == "ancestral" else None
    return tuple(warning for warning in (few, late_start_warning(diffusion.schedule, timesteps)) if warning)


def _steps_without_learning(training: TrainingConfig) -> tuple[str, ...]:
    """Return a warning if the learning rate reaches 0 before the last step."""
    idle = training.steps - (training.decay_steps or training.steps)
    if idle <= 0 or learning_rate_at(training.steps, training) > 0:
        return ()
    return (
        f"the learning rate is 0 from step {training.decay_steps} on, so the last {plural(idle, 'step')} will not change the weights; "
        "set training.decay_steps to the number of steps, or training.final_learning_rate above 0",
    )


def _check_no_process(experiment: Experiment) -> None:
    """Refuse settings of diffusion, which a vae would ignore."""
    _refuse_changed("diffusion", experiment.diffusion, set(), "a vae has no diffusion process")
    _refuse_changed("validation", experiment.validation, set(), "a vae has no t to be validated at")
    read = set(TrainingConfig.model_fields) - OF_PROCESS
    _refuse_changed("training", experiment.training, read, "a vae is trained by its own bound")
    check_sampling(experiment, experiment.sampling)


def _refuse_changed(name: str, section: Section, read: set[str], why: str) -> None:
    default = type(section)()
    for key in type(section).model_fields:
        if key not in read and getattr(section, key) != getattr(default, key):
            raise UsageError(f"{name}.{key}: got {getattr(section, key)!r}, but {why}; leave it out")


def _check_unread_settings(training: TrainingConfig, model: ModelConfig) -> None:
    """Refuse settings that nothing would read (UsageError)."""
    default = TrainingConfig()
    if training.min_snr_gamma != default.min_snr_gamma and training.objective != "min_snr":
        raise UsageError(
            f"training.min_snr_gamma: belongs to objective 'min_snr', and the objective is {training.objective!r}; "
            "set training.objective=min_snr, or leave it out"
        )
    levels = len(model.channel_multipliers) if model.type == "unet" else 0
    if training.activation_checkpointing > levels:
        raise UsageError(
            f"training.activation_checkpointing: got {training.activation_checkpointing}, expected at most {levels}, "
            + ("the levels of this U-Net" if levels else "since only the U-Net has levels to compute again")
            + f"; use -s training.activation_checkpointing={levels}"
        )
    if model.class_conditional:
        if training.label_dropout == 1:
            raise UsageError(
                "training.label_dropout: got 1, which drops every label, so that no class is learned; 0.1 to 0.2 is usual"
            )
    elif training.label_dropout != default.label_dropout:
        raise UsageError(
            "training.label_dropout: this model knows no classes; set model.class_conditional=true, or leave it out"
        )


def check_labels(experiment: Experiment, sampling: SamplingConfig, names: ClassNames) -> None:
    """Refuse labels that name no class of a model that knows `names`, and what does not go with them (UsageError)."""
    if names:
        _check_guidance(experiment, sampling, class_name(sampling.labels, names))


def _check_guidance(experiment: Experiment, sampling: SamplingConfig, labels: str) -> None:
    guided, scale = sampling.guidance_scale != 1, sampling.guidance_scale
    if not experiment.model.class_conditional:
        if guided:
            raise UsageError(
                f"guidance_scale: got {scale:g}, but this model knows no classes; train one with model.class_conditional=true"
            )
        if own_word(labels, ()) != BALANCED:
            raise UsageError(
                f"labels: got {sampling.labels!r}, but this model knows no classes; train one with "
                "model.class_conditional=true"
            )
        return
    if labels == NONE and guided:
        raise UsageError(
            f"guidance_scale: got {scale:g} with labels {NONE!r}: there is no class to guide to; give a class or {BALANCED!r}, "
            "or a scale of 1"
        )
    if experiment.training.label_dropout == 0 and (guided or labels == NONE):
        what = f"guidance_scale {scale:g}" if guided else f"labels {NONE!r}"
        raise UsageError(
            f"{what} needs a model that was trained without labels too, and this one had training.label_dropout 0; train "
            "with 0.1, or sample its classes with a scale of 1"
        )


def _check_last_step(diffusion: GaussianDiffusion, sampling: SamplingConfig, timesteps: tuple[int, ...]) -> None:
    """With zero terminal SNR only the last step is pure noise, so that sampling must begin there."""
    last = diffusion.num_timesteps - 1
    if diffusion.schedule.has_zero_terminal_snr and timesteps[-1] != last:
        raise UsageError(
            f"spacing: {sampling.spacing!r} with {len(timesteps)} steps leaves out the last of {last + 1}, and with schedule "
            f"{diffusion.schedule.name!r} only that one is pure noise; use 'trailing' or 'linspace'"
        )
