"""What `train --dry-run` prints: the resolved experiment, the plan, and the forecast."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.commands.output import named_lines
from pipeline.config.yaml_files import to_yaml
from pipeline.console import duration, plural, rate, size
from pipeline.planning.forecast import Forecast, early_scores
from pipeline.planning.plan import Plan
from pipeline.planning.probe import Probe
from pipeline.runs.dry_run import DryRun, Memory


def dry_run_lines(found: DryRun) -> Iterator[str]:
    """Yield the resolved experiment, the plan, and what was measured or why nothing was, a line each."""
    yield to_yaml(found.plan.experiment.to_dict())
    measured = {"measured": f"no: {found.unmeasured}"}
    if found.probe is not None and found.forecast is not None:
        measured = describe_forecast(found.plan, found.probe, found.forecast)
    memory = {} if found.memory is None else {"memory": _describe_memory(found.memory)}
    yield from named_lines(_describe_plan(found.plan) | memory | measured)
    for warning in found.warnings:
        yield f"warning: {warning}"


def _describe_plan(plan: Plan) -> dict[str, str]:
    unknown = "unknown until the data is here"
    epoch, checkpoint, parameters = plan.steps_per_epoch, plan.checkpoint_bytes, plan.num_parameters
    training = plan.experiment.training
    shape = "x".join(map(str, plan.shape)) if plan.shape else unknown
    kept = plan.experiment.checkpoint.retention.most
    return {
        "data": plan.data,
        "images": f"{plan.num_rows:,} of {shape}" if plan.num_rows else shape,
        "parameters": f"{parameters:,}" if parameters is not None else unknown,
        "steps per epoch": f"{epoch:.1f}" if epoch is not None else unknown,
        "epochs": f"{training.steps / epoch:.1f}" if epoch is not None else unknown,
        "checkpoint": f"{size(checkpoint)}, {kept} kept" if checkpoint is not None else unknown,
        "workers": f"{plan.num_workers} ({plan.profile.name}), {plan.num_streams} streams, "
        f"{training.batch_size // plan.num_workers} images each",
        "validation": _describe_validation(plan),
        "scores": _describe_scores(plan),
        "runs": plan.place,
        **({"missing": "; ".join(plan.missing)} if plan.missing else {}),
    }


def _describe_validation(plan: Plan) -> str:
    asked, settings = plan.validation, plan.experiment.validation
    if asked is None:
        return (
            f"none: {plan.no_validation}" if plan.no_validation else "none; validation.split or .holdout names images"
        )
    if asked.why_never:
        return f"none: {asked.why_never}"
    which = f"of split {settings.split!r}" if settings.split else f"held out ({settings.holdout:.3g} of all)"
    return (
        f"every {asked.every_steps:,} steps, {asked.times:,} in all, with {asked.num_images:,} images {which} and as many trained on: "
        f"{asked.times * asked.calls:,} network calls, {asked.share:.2%} of the training's"
    )


def _describe_scores(plan: Plan) -> str:
    asked, early = plan.experiment.evaluation, early_scores(plan)
    if early is None:
        return "at the end" if asked.enabled else "none"
    against = "those trained on" if plan.validation is None else "those that validate, if there are enough"
    return (
        f"every {asked.every_steps:,} steps, {early.times:,} in all, by {asked.early_images:,} images each, against {against}: "
        f"{early.times * early.calls:,} network calls, {early.share:.2%} of the training's{'; and at the end' * asked.enabled}"
    )


def _describe_memory(memory: Memory) -> str:
    known = "unknown" if memory.estimated_bytes is None else f"about {size(memory.estimated_bytes)} (estimated)"
    text = f"{known} of a worker for {plural(memory.images, 'image')} at once"
    if memory.measured_bytes is not None:
        text += f", {size(memory.measured_bytes)} measured with {memory.measured_images}"
    return text if memory.free_bytes is None else f"{text}; {size(memory.free_bytes)} are free"


def describe_forecast(plan: Plan, probe: Probe, seen: Forecast) -> dict[str, str]:
    part = f", timed with {probe.measured_batch} at once" if probe.measured_batch < probe.batch else ""
    images = f"{probe.batch} images a step and worker{part}" if plan.num_workers > 1 else f"{probe.batch} a step{part}"
    price = plan.profile.price
    lines = {
        "measured": f"{rate(seen.images_per_s)} images/s, {_short(seen.step_s)} a step ({images}; {probe.device})",
        "time": f"{duration(seen.total_s)}"
        + (f", {duration(seen.scoring_s)} of it for the scores" if seen.scoring_s >= 1 else ""),
        "cost": f"{seen.cost:,.2f} {seen.currency} ({plan.num_workers} x {price.per_worker_hour:g} {seen.currency} an hour)"
        if price.per_worker_hour
        else "unknown: the profile's price.per_worker_hour is 0",
    }
    if (saving := seen.checkpoints) is not None:
        lines["checkpoints"] = (
            f"{saving.count:,} in all, one every {duration(saving.interval_s)}: {size(saving.written_bytes)} written, "
            f"{size(saving.kept_bytes)} kept; each stops training for {_short(saving.stops_for_s)}"
        )
    if not seen.more_nodes_help:
        lines["more nodes"] = (
            f"will not help a batch of {plan.experiment.training.batch_size}: exchanging gradients would take longer than it "
            "saves; use more nodes for sweeps and sampling"
        )
    return lines


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
