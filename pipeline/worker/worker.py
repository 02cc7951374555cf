"""The body of one training worker: what happens around the loop of loop.py. It knows no Ray, and runs in a test as on a cluster."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, experiment_from
from pipeline.config.yaml_files import validate
from pipeline.data.labels import NO_CLASSES, class_names_of
from pipeline.data.order import Order, streams_of_worker
from pipeline.data.shards import Dataset
from pipeline.errors import CheckpointError, StorageError
from pipeline.import_path import allow_modules_in
from pipeline.metrics.scoring import Scorer, early_score, early_scorer
from pipeline.pictures.pictures import save_grid
from pipeline.signals import StoppedAtOnce
from pipeline.storage import checkpoint as checkpoints
from pipeline.storage.durable import fault_of_storage, storage_errors
from pipeline.storage.judgements import is_scored, note
from pipeline.storage.remote_run import folder_here
from pipeline.storage.run_checkpoints import RunCheckpoints, Saver, checkpoint_at
from pipeline.storage.runs import Run
from pipeline.tracking.monitor import sample_system
from pipeline.tracking.tracker import Tracker
from pipeline.training.averages import save_snapshot
from pipeline.training.batches import Batch, Prefetch, training_batches
from pipeline.training.device import Compute, kept_arithmetic, training_compute
from pipeline.training.loop import StepResult, TrainState, fit
from pipeline.training.models import (
    build_model,
    build_objective,
    check_own_network,
    is_own_network,
    load_weights,
    misfit_of,
)
from pipeline.training.team import Team
from pipeline.training.validation import Validation, plan_validation
from pipeline.worker.job import Job
from pipeline.worker.meters import LossMeter, OwnTime, Pace
from pipeline.worker.preview import Preview
from pipeline.worker.transfer import load_everywhere

MISSED_SAVES = 3  # failed saves in a row that end the run: storage may recover before


class DriverLink(Protocol):
    """The worker's link to the driver. Its methods must not wait."""

    def publish(self, progress: dict[str, Any]) -> None:
        """Send progress, a warning or an early score."""

    def stop_requested(self) -> bool:
        """Return whether the driver asks to save and stop."""


class Worker:
    """One worker of one attempt, from the newest checkpoint to the last step, or to a request to stop."""

    def __init__(self, job: Job, team: Team, link: DriverLink, gpu: int = 0) -> None:
        self.job, self.team, self.link = job, team, link
        self.experiment: Experiment = experiment_from(job.experiment)
        self.run = self._run_here()
        profile = validate(Profile, job.profile, "profile")
        self.dataset = Dataset.open(job.dataset_folder, profile.cache)
        shape = self.dataset.manifest.shape
        compute = training_compute(self.experiment, profile, job.num_workers, shape, gpu)
        decided = team.broadcast(compute.arithmetic)
        self.compute: Compute = kept_arithmetic(compute, decided, self.experiment, whose="the machine of worker 0")
        self.named_threads = profile.threads_per_worker
        self.compute.start()
        allow_modules_in(job.code_folder)
        self.objective = build_objective(self.experiment)
        conditional = self.experiment.model.class_conditional
        self.class_names = class_names_of(self.dataset) if conditional else NO_CLASSES
        model = build_model(self.experiment, shape, num_classes=len(self.class_names))
        model = self.compute.place(model)
        if is_own_network(self.experiment):
            check_own_network(model, self.experiment, shape, self.compute.device)
        self.train_state = self._new_train_state(model)
        self.meter = LossMeter(self.objective.num_timesteps)
        self.elapsed_before_s = 0.0
        self.missed_saves = 0
        self.saved_step, self.saved_attempt = -1, 0
        self.saved_at = time.monotonic()
        self.saver = Saver(self.run, job.attempt, self.experiment.checkpoint.retention) if team.is_main else None
        self.tracker = Tracker(self.run.folder, job.tracking, later=True) if team.is_main else None
        place = job.validation_folder
        self.held_out = None if place is None else Dataset.open(place, profile.cache)
        self.validation = self._validation()
        self.validation_plan = plan_validation(self.experiment)
        self.validated_step = -1
        self.validation_loss: float | None = None
        self.preview = self._preview()
        self.aside_s = 0.0
        self.paused_s = self.useful_s = self.useful_before_s = 0.0
        self.rungs = list(job.allowance.rungs) if team.is_main else []
        self.scorer: Scorer | None = None
        self.unscored: dict[str, Any] | None = (
            None  # the point of the curve at which training resumes, if it was saved and not scored
        )

    def _new_train_state(self, model: nn.Module) -> TrainState:
        return TrainState.create(model, self.experiment.training, self.objective.num_timesteps, self.compute)

    def work(self) -> str:
        """Train. Return "finished", or "stopped" if a stop was requested and the state is saved."""
        try:
            source = self._restore()
            if self.team.is_main:
                self.run.log(f"attempt {self.job.attempt} starts at step {self.train_state.step} from {source}")
                self._record_arithmetic()
            outcome = self._train()
        except StoppedAtOnce:  # without waiting for uploads and tracking
            raise
        except BaseException as error:
            self._close()
            if isinstance(error, OSError) and (fault := fault_of_storage(error)) is not None:
                raise fault from None
            raise
        self._close()
        if self.saver is not None:
            self.run.send_files()
            self.saver.remove_others()
            if self.run.folder != Path(self.job.run_folder):  # a temporary folder: all of it is in the store
                shutil.rmtree(self.run.folder, ignore_errors=True)
        return outcome

    def _record_arithmetic(self) -> None:
        """Record what was resolved for this machine: bf16, never "mixed"."""
        assert self.tracker is not None
        arithmetic = self.compute.arithmetic
        self.run.log(f"arithmetic: {', '.join(f'{name} {value}' for name, value in arithmetic.items())}")
        self.tracker.tags({f"arithmetic.{name}": str(value) for name, value in arithmetic.items()})

    def _close(self) -> None:
        if self.saver is not None:
            self.saver.close()
        if self.tracker is not None:
            self.tracker.close(timeout=10.0)

    def _run_here(self) -> Run:
        """Return this machine's copy of the run; only rank 0 writes to it."""
        if self.job.run_address is None or not self.team.is_main:
            return Run(Path(self.job.run_folder))
        run = Run(folder_here(Path(self.job.run_folder), self.job.run_address))
        run.fetch_files()
        return run

    # -- the loop's body ------------------------------------------------------------------------------------------------------

    def _train(self) -> str:
        settings, total = self.experiment.training, self.experiment.training.steps
        network = self.compute.compiled(self.team.share_gradients(self.train_state.model, self.compute))
        self.train_state.model.train()
        done = self.train_state.step
        if done == 0:
            self._copy_weights()  # for the grid of step 0, which is drawn after the first step
        spent = self.job.allowance.share(self.train_state.step, total, self.elapsed_before_s)
        self.rungs = [rung for rung in self.rungs if rung > spent]
        self._begin_scores()
        if spent >= 1:
            return "finished"
        self._validate(last=False, stop=False)  # if a stop came before it was done
        begin, self.aside_s = time.monotonic(), 0.0
        with Prefetch(self._batches()) as batches:
            pace = Pace(self.train_state.step, batches)
            own = OwnTime(network, batches, self.team, self.train_state.step, self.compute)
            steps = fit(
                self.train_state,
                network,
                self.objective,
                batches,
                settings,
                self.compute,
                seed=self.experiment.seed,
                rank=self.team.rank,
                horizontal_flip=self.experiment.data.horizontal_flip,
                null_class=len(self.class_names) or None,
                all_gather=partial(self.team.all_gather, num_streams=self.job.num_streams),
            )
            for result in steps:
                if result.step == done + 1:
                    self._publish(result, pace)
                    self._begin_records(done)
                self.meter.add(result)
                elapsed_s = self.elapsed_before_s + time.monotonic() - begin - self.aside_s
                trained_s = elapsed_s - self.elapsed_before_s - self.paused_s - batches.waited_s
                self.useful_s = self.useful_before_s + trained_s
                spent = self.job.allowance.share(result.step, total, elapsed_s)
                rung = self._reached(spent)
                due = self._score_is_due(result.step, rung, spent >= 1)
                stop, save, last, due = self.team.decide(
                    self.link.stop_requested(), self._save_is_due(result.step, due), spent >= 1, due
                )
                logged = result.step % self.experiment.logging.every_steps == 0 or last
                if save or stop or logged:
                    result.require_finite()
                    self.meter.gather(self.team)
                    own.gather(result.step)
                if logged:
                    self._log(result, pace)
                    self._name_straggler(own)
                with self._pause():
                    if self._grid_is_due(result.step, last):
                        self._copy_weights()
                        self._draw_grid(result.step)
                stop = self._validate(last, stop)
                self._store_averages(last)
                if save or stop or last:
                    with self._pause():
                        self._save(elapsed_s, {"rung": rung} if due else None, must=stop or last)
                if due and (last or not stop):  # a run that is to stop is scored when it resumes
                    self._score(rung)
                self._publish(result, pace)
                if last:
                    return "finished"
                if stop:
                    return "stopped"
        raise AssertionError("the batches never end")

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Count the time of the context as one without steps."""
        begin = time.monotonic()
        yield
        self.paused_s += time.monotonic() - begin

    def _name_straggler(self, own: OwnTime) -> None:
        """Report the slowest worker once if all others wait for it."""
        if (rank := own.straggler()) is not None and self.team.is_main:
            line = (
                f"worker {rank} is slow: its own part of a step (data and forward pass) takes {own.seconds[rank]:.3f} s, the median is "
                f"{median_low(own.seconds):.3f} s; the others wait for it at every step"
            )
            self.run.log(f"warning: {line}")
            self.link.publish({"warning": line})

    def _batches(self) -> Any:
        job, data = self.job, self.experiment.data
        order = Order(
            row_groups=self.dataset.manifest.row_groups,
            seed=self.experiment.seed,
            num_streams=job.num_streams,
            batch_size=self.experiment.training.batch_size,
            window=data.shuffle_window,
        )
        streams = streams_of_worker(self.team.rank, self.team.size, job.num_streams)
        batches = training_batches(self.dataset, order, streams, self.train_state.step, self.experiment.seed)
        return map(Batch.pin, batches) if self.compute.pin_memory else batches

    def _log(self, result: StepResult, pace: Pace) -> None:
        """Record the means since the last report, on rank 0."""
        if self.tracker is None:
            return
        metrics = self.meter.report()
        metrics |= {"grad_norm": float(result.grad_norm), "learning_rate": result.learning_rate}
        if result.scaler.is_enabled():
            metrics["loss_scale"] = result.scaler.get_scale()
        speed = pace.report(result.step, self.experiment.training.batch_size)
        self.tracker.metrics(result.step, metrics)
        self.tracker.metrics(result.step, speed | sample_system(), "system")
        self.run.log(
            f"step {result.step}/{self.experiment.training.steps}  loss {metrics['loss']:.5f}  "
            f"grad norm {metrics['grad_norm']:.3f}  {speed['images_per_s']:.0f} images/s"
        )

    def _publish(self, result: StepResult, pace: Pace) -> None:
        """Send progress to the driver if it is due."""
        total = self.experiment.training.steps
        if self.team.is_main and (pace.is_due() or result.step == total):
            self.link.publish(
                {
                    "step": result.step,
                    "steps": total,
                    "loss": float((result.losses * result.weights).mean()),
                    "images_per_s": pace.images_per_s(result.step, self.experiment.training.batch_size),
                    "validation_loss": self.validation_loss,
                }
            )

    # -- validation -----------------------------------------------------------------------------------------------------------

    def _validation(self) -> Validation | None:
        """Return the images that validate, with training images beside them; None if there are none."""
        if self.held_out is None:
            return None
        return Validation(self.experiment, self.held_out, self.dataset, self.class_names)

    def _validation_is_due(self, last: bool) -> bool:
        plan, step = self.validation_plan, self.train_state.step
        if self.validation is None or plan is None or step in (0, self.validated_step):
            return False
        return plan.is_due(step, last)

    def _validate(self, last: bool, stop: bool) -> bool:
        """Measure the averaged weights if that is due, and record the figures. Return whether to stop.

        A stop does not wait for it: the training that resumes here measures first.
        """
        if stop or not self._validation_is_due(last):
            return stop
        begin, step = time.monotonic(), self.train_state.step
        self._copy_weights()
        assert self.validation is not None
        assert self.preview is not None
        assert self.preview.model is not None
        figures = self.validation.measure(self.preview.model, self.compute, self.team, self.link.stop_requested)
        self.aside_s += time.monotonic() - begin
        if figures is None:
            return True
        self.validated_step, self.validation_loss = step, figures["loss"]
        if self.tracker is not None:
            self.tracker.metrics(step, {name: x for name, x in figures.items() if math.isfinite(x)}, "val")
            shown = ("loss", "train_loss", "bound_estimate", "train_bound_estimate")
            self.run.log(f"validation at step {step}: {', '.join(f'{name} {figures[name]:.5f}' for name in shown)}")
        return False

    # -- pictures -------------------------------------------------------------------------------------------------------------

    def _grid_is_due(self, step: int, last: bool) -> bool:
        every = self.experiment.logging.grid_every_steps
        return every is not None and (step % every == 0 or last)

    def _begin_records(self, done: int) -> None:
        """Do what can wait until this process has made its first step: start delivery to the tracking store, draw the grid of step 0."""
        begin = time.monotonic()
        if self.tracker is not None:
            self.tracker.deliver()
        if done == 0:
            self._draw_grid(0)
        self.aside_s += time.monotonic() - begin

    def _draw_grid(self, step: int) -> None:
        """Draw images from the copied weights on rank 0, with the same noise every time; the others wait at the next step."""
        if self.tracker is None or self.preview is None or self.experiment.logging.grid_every_steps is None:
            return
        images = self.preview.images(self.experiment.logging.grid_images, self.compute)
        path = self.run.folder / "pictures" / f"samples-step-{step:010d}.png"
        with self._may_be_missing("the picture"), storage_errors(path.parent):
            path.parent.mkdir(exist_ok=True)
            save_grid(images, path)
            self.tracker.image("samples", step, path)

    # -- scores while training ------------------------------------------------------------------------------------------------

    def _score_is_due(self, step: int, rung: float | None, last: bool) -> bool:
        every = self.experiment.evaluation.every_steps
        return rung is not None or (every is not None and (step % every == 0 or last))

    def _reached(self, spent: float) -> float | None:
        """Return the highest rung that is newly reached, at which a sweep may stop a hopeless trial."""
        reached = [rung for rung in self.rungs if rung <= spent]
        self.rungs = self.rungs[len(reached) :]
        return reached[-1] if reached else None

    @property
    def scores(self) -> bool:
        """Whether the model is scored while it trains."""
        return bool(self.job.allowance.rungs) or self.experiment.evaluation.every_steps is not None

    @property
    def early_images(self) -> int:
        """Images of each of these scores."""
        allowance = self.job.allowance
        return allowance.rung_images if allowance.rungs else self.experiment.evaluation.early_images

    def _begin_scores(self) -> None:
        """Load on rank 0 what scores, so that what is missing is reported before the first step; score the step that waits for it."""
        if self.scores and self.team.is_main:
            self.scorer = early_scorer(
                self.experiment, self.dataset, self.run.home, self.early_images, self.compute, self.held_out
            )
            reference = self.scorer.reference
            self.run.log(f"scores while training compare with split {reference.split!r}: {reference.rule}")
        if self.scores and self.unscored is not None:
            self._score(self.unscored["rung"])

    def _score(self, rung: float | None) -> None:
        """Score a few images of the averaged weights, each worker a share of them, and write the figures into the run's curve."""
        assert self.preview is not None
        begin = time.monotonic()
        self._copy_weights()
        images, generation = self.preview.scored_images(self.early_images, self.compute, self.team)
        if self.scorer is not None and self.tracker is not None:
            step, found = self.train_state.step, early_score(self.scorer, images.numpy(), generation)
            saved = checkpoints.name_of(step, self.saved_attempt) if self.saved_step == step else ""
            judgement = {"rung": rung, "step": step, "checkpoint": saved, **found.to_json()}
            with self._may_be_missing("the score"), storage_errors(self.run.folder):
                self.tracker.artifact(note(self.run.folder, judgement), "evaluations")
                self.tracker.metrics(step, found.flat(), "score")
            if rung is not None:
                self.link.publish({"judgement": {"rung": rung, "value": next(iter(found.values.values()))}})
        self.aside_s += time.monotonic() - begin

    def _preview(self) -> Preview | None:
        """Return the network that is drawn, scored or validated during training; None on workers where nothing of that is done."""
        drawn = self.experiment.logging.grid_every_steps is not None and self.team.is_main
        if not (drawn or self.scores or self.validation):
            return None
        return Preview(self.experiment, self.dataset.manifest.shape, self.class_names)

    def _copy_weights(self) -> None:
        if self.preview is not None:
            self.preview.copy(self.train_state)

    # -- checkpoints ----------------------------------------------------------------------------------------------------------

    def _restore(self) -> str:
        """Start from the newest checkpoint that verifies: rank 0 finds it, all workers load it. Return the source of the weights."""
        found = RunCheckpoints(self.run).newest_verified() if self.team.is_main else checkpoints.Found(None)
        for warning in found.warnings:
            self.run.log(f"warning: {warning}")
            self.link.publish({"warning": warning})
        checkpoint: checkpoints.Checkpoint | None = self.team.broadcast(found.checkpoint)
        if checkpoint is None:
            if self.job.initial_weights is None:
                return "new weights"
            self._take_weights(self.job.initial_weights)
            return f"the weights of {self.job.initial_weights}"
        state, tensors = load_everywhere(checkpoint, self.team, shared=self.job.run_address is None)
        if state["config_hash"] != self.experiment.hash(self.dataset.manifest.fingerprint):
            raise CheckpointError(
                f"{checkpoint.folder}: was written with other settings than this run's; remove it or start a new run"
            )
        self._keep_arithmetic(state, checkpoint.step)
        self.train_state.restore(tensors, checkpoint.step)
        if state.get("loss_scale"):  # empty if the run was trained in bf16 or fp32 so far
            self.train_state.scaler.load_state_dict(state["loss_scale"])
        self.elapsed_before_s = state["elapsed_s"]
        self.useful_before_s = state.get("useful_s", 0.0)
        self.saved_step, self.saved_attempt = checkpoint.step, checkpoint.attempt
        scored = self.team.is_main and is_scored(self.run.folder, checkpoint.folder.name)
        (scored,) = self.team.decide(scored)
        self.unscored = None if scored else state.get("unscored")  # without it if imported
        self.validated_step = state.get("validated_step", -1)  # only where there is validation
        if self.team.is_main:
            self.meter.sums = torch.tensor(state["meter"], dtype=torch.float64)
            assert self.tracker is not None
            self.tracker.restore(state["undelivered"])
        return f"checkpoint {checkpoint.folder.name}"

    def _keep_arithmetic(self, state: dict[str, Any], step: int) -> None:
        """Resume with the run's arithmetic, whatever this machine would choose, unless the user names another.

        With another number of workers the bytes differ anyway, and the number of threads is chosen again.
        """
        before = state["arithmetic"]
        named = {"threads"} if self.named_threads or state["num_workers"] != self.team.size else set()
        kept = kept_arithmetic(self.compute, before, self.experiment, named=named, whose="this run's machine so far")
        if kept != self.compute:
            self.compute = kept
            kept.start()
            self.train_state = self._new_train_state(kept.place(self.train_state.model))
        for name, value in kept.arithmetic.items():
            if self.team.is_main and value != before[name]:
                self.run.log(f"{name}: {before[name]} until step {step}, {value} from there on")

    def _take_weights(self, place: str) -> None:
        """Begin a new run from another run's weights, with a new average and optimizer."""
        found = self.team.broadcast(checkpoint_at(place).tensors("model", "ema") if self.team.is_main else None)
        weights = found["model"] | found["ema"]  # buffers, of a network that has them, are not averaged
        if misfit := misfit_of(weights, self.train_state.model):
            raise CheckpointError(
                f"{place}: these weights do not fit the network of this run ({misfit}); "
                "keep the settings of the model, the prediction and the variance"
            )
        load_weights(self.train_state.model, weights)
        self.train_state = self._new_train_state(self.train_state.model)

    def _store_averages(self, last: bool) -> None:
        """Store the power-function averages if that is due."""
        every, step = self.experiment.training.ema_snapshot_every_steps, self.train_state.step
        if self.saver is None or every is None or not (step % every == 0 or last):
            return
        with self._may_be_missing("the snapshot of the averages"):
            save_snapshot(self.run.folder, step, self.job.attempt, self.train_state.averages, self.saver.may_commit)

    @contextmanager
    def _may_be_missing(self, what: str) -> Iterator[None]:
        """Continue training, with a warning, if storage has no room for something."""
        try:
            yield
        except StorageError as error:
            self.run.log(f"warning: {error}")
            self.link.publish({"warning": f"{error}; {what} of step {self.train_state.step} is not stored"})

    def _save_is_due(self, step: int, scored: bool) -> bool:
        due = self.experiment.checkpoint
        if due.every_steps is not None and step % due.every_steps == 0:
            return True
        if step in due.milestones or (scored and due.keep_best is not None):
            return True
        return due.every_minutes is not None and time.monotonic() - self.saved_at >= due.every_minutes * 60

    def _save(self, elapsed_s: float, unscored: dict[str, Any] | None, *, must: bool) -> None:
        """Save once per step. If storage is full, try again at the next interval, up to `MISSED_SAVES` times.

        `unscored` is the point of the curve that this step is and that is scored next: a kill in between leaves it to the resumed run.
        """
        self.saved_at = time.monotonic()
        if self.tracker is None or self.saver is None or self.saved_step == self.train_state.step:
            return
        state = {
            "step": self.train_state.step,
            "attempt": self.job.attempt,
            "config_hash": self.experiment.hash(self.dataset.manifest.fingerprint),
            "dataset_fingerprint": self.dataset.manifest.fingerprint,
            "shape": list(self.dataset.manifest.shape),
            **self.class_names.to_state(),
            "elapsed_s": elapsed_s,
            "useful_s": self.useful_s,
            "unscored": unscored,
            "loss_scale": self.train_state.scaler.state_dict(),
            "meter": self.meter.sums.cpu().tolist(),
            "undelivered": self.tracker.undelivered(),
            "num_workers": self.team.size,
            "arithmetic": self.compute.arithmetic,
            "torch": torch.__version__,
            **({} if self.validation is None else {"validated_step": self.validated_step}),
        }
        try:
            self.saver.save(self.train_state.step, self.train_state.tensors(), state, wait=must)
        except StorageError as error:
            self.missed_saves += 1
            if must or self.missed_saves >= MISSED_SAVES:
                raise
            self.run.log(f"warning: {error}")
            self.link.publish({"warning": f"{error}; trying again at the next interval"})
            return
        self.missed_saves = 0
        self.saved_step, self.saved_attempt = self.train_state.step, self.job.attempt
