"""Bits per dimension of a run's model over a split of its data: chunks over the profile's workers, kept as they come."""

from __future__ import annotations

from pipeline.cluster.pool import runner_of
from pipeline.config.cluster_profile import Profile
from pipeline.console import Bar, Console
from pipeline.data.labels import model_labels
from pipeline.metrics.bound import Bound, BoundTask, Likelihood, VaeLikelihood, join, rows_to_measure
from pipeline.metrics.bound_report import Measured
from pipeline.metrics.metric_identity import BoundIdentity
from pipeline.runs.choose_scorer import open_images, open_split, own_split, progress_on
from pipeline.sampling.generated import digest
from pipeline.storage.runs import Run
from pipeline.training.chunks import ChunkStore, compute
from pipeline.training.device import Compute, arithmetic_of
from pipeline.training.trained import Trained
from pipeline.training.vae import Vae

METRIC = "bits_per_dim"

_FORMAT = 1


def measure_bound(
    run: Run,
    trained: Trained,
    here: Compute,
    profile: Profile,
    console: Console,
    *,
    seed: int,
    split: str | None = None,
    num_images: int | None = None,
) -> Measured:
    """Return the bound over a split of the run's source (its own images by default), or over `num_images` of them.

    Raises:
        UsageError, DataError: the source has no such split, or is not there any more; images without the labels that the
            model wants to be told.
    """
    dataset = open_images(run, "to measure") if split is None else open_split(run, split, console)
    rows = rows_to_measure(dataset, num_images, progress_on(console))
    if trained.class_names:
        model_labels(dataset, rows, trained.class_names)  # refused before anything is computed
    chunk = trained.experiment.sampling.batch_size
    identity = BoundIdentity(
        metric=METRIC,
        dataset=dataset.manifest.fingerprint,
        split=own_split(trained.experiment, split),
        num_images=len(rows),
        of_images=dataset.manifest.num_rows,
        weights=trained.weights,
        process=_process(trained),
        seed=seed,
        chunk=chunk,
        labels="of the images" if trained.class_names else "",
    )
    likelihood: Likelihood | VaeLikelihood
    if isinstance(trained.model, Vae):
        likelihood = VaeLikelihood(trained.model, here)
    else:
        likelihood = Likelihood(trained.diffusion, trained.model, trained.class_names, here)
    task = BoundTask(likelihood, dataset, rows, seed)
    kept = {
        "format": _FORMAT,
        "model": digest(trained.model, trained.experiment.hash(run.record.dataset["fingerprint"])),
        "bound": identity.to_json(),
        **arithmetic_of(profile),
    }
    store = ChunkStore(run.folder / "bound", kept)
    rate = Bar(console, "bits/dim", len(rows))
    return Measured(
        join(map(Bound.from_arrays, compute(task, len(rows), chunk, store, runner_of(profile), rate))), identity
    )


def _process(trained: Trained) -> str:
    if isinstance(trained.model, Vae):
        return "vae: prior is the rate of the code, decoder the pixels given the code"
    process = trained.diffusion
    return f"T = {process.num_timesteps}, x0 {'clipped' if process.clip_x0 else 'not clipped'}"
