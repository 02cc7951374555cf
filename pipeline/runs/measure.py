"""Bits per dimension of a run's model over a split of its data: chunks over the profile's workers, kept as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ddpm import BitsPerDim, bits_per_dim
from pipeline.cluster.pool import runner_of
from pipeline.console import Bar
from pipeline.data.labels import model_labels
from pipeline.metrics.bound import Bound, BoundTask, Likelihood, join, rows_to_measure
from pipeline.metrics.bound_report import Measured
from pipeline.metrics.metric_identity import BoundIdentity
from pipeline.runs.choose_scorer import open_images, open_split, own_split, progress_on
from pipeline.runs.sample import LoadedRun
from pipeline.sampling.generation import usual_generation
from pipeline.storage.retention import LAST
from pipeline.training import vae
from pipeline.training.chunks import ChunkStore, compute
from pipeline.training.device import arithmetic_of
from pipeline.training.trained import Trained

METRIC = "bits_per_dim"

_FORMAT = 1


def measure_bound(loaded: LoadedRun, *, seed: int, split: str | None, num_images: int | None) -> Measured:
    """Return the bound over a split of the run's source (its own images by default), or over `num_images` of them.

    Raises:
        UsageError, DataError: the source has no such split, or is not there any more; images without the labels that the
            model needs.
    """
    run, trained, profile, console = loaded.run, loaded.trained, loaded.profile, loaded.console
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
        selection=trained.selection,
    )
    measure: Callable[..., BitsPerDim] = vae.bits_per_dim
    if not isinstance(trained.model, vae.Vae):
        measure = partial(bits_per_dim, trained.diffusion)
    task = BoundTask(Likelihood(measure, trained.model, trained.class_names, loaded.compute), dataset, rows, seed)
    kept = {
        "format": _FORMAT,
        "model": loaded.digest,
        "bound": replace(identity, selection=LAST).to_json(),
        **arithmetic_of(profile),
    }
    store = ChunkStore(run.folder / "bound", kept)
    rate = Bar(console, "bits/dim", len(rows))
    chunks = compute(task, len(rows), chunk, store, runner_of(profile), rate)
    return Measured.of(join(map(Bound.from_arrays, chunks)), identity, _label(identity, trained))


def _label(identity: BoundIdentity, trained: Trained) -> str:
    """Return how the figure's name in MLflow ends where it is not by the run's own weights and seed; the name has split and count."""
    usual = usual_generation(trained.experiment, trained.class_names)
    best = "" if identity.selection == usual.selection else "_best"
    if (identity.weights, identity.seed, best) == (usual.weights, usual.seed, ""):
        return ""
    return f"{identity.weights}_seed{identity.seed}{best}"


def _process(trained: Trained) -> str:
    if isinstance(trained.model, vae.Vae):
        return "vae: prior is the rate of the code, decoder the pixels given the code"
    process = trained.diffusion
    return f"T = {process.num_timesteps}, x0 {'clipped' if process.clip_x0 else 'not clipped'}"
