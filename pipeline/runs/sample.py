"""Samples of a run for people and programs: a grid, PNG files, or a Parquet set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.cluster.pool import runner_of
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, SamplingConfig
from pipeline.config.yaml_files import validate
from pipeline.console import Console
from pipeline.data.labels import ClassNames, labels_of
from pipeline.errors import StorageError, UsageError
from pipeline.metrics.metric_identity import Generation
from pipeline.pictures.pictures import picture_of, save_grid, write_picture
from pipeline.runs.interruption import kept_when_stopped
from pipeline.sampling.generated import SampleCache, digest
from pipeline.sampling.generation import Denoiser, ImageGenerator, make_sampler, settled
from pipeline.storage.retention import Which
from pipeline.storage.runs import Run
from pipeline.training import averages
from pipeline.training.combinations import check_labels, check_sampling
from pipeline.training.device import Compute, arithmetic_of, sampling_compute
from pipeline.training.models import Shape
from pipeline.training.trained import Trained

Format = Literal["grid", "png", "parquet"]
Written = tuple[dict[str, Any], list[Path]]  # identity of the images, and the files
MOST_IN_A_GRID = 400


@dataclass(frozen=True)
class SampleRequest:
    """How to generate; None is as the run's experiment says."""

    num_images: int = 64
    sampler: str | None = None
    steps: int | None = None
    spacing: str | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    labels: str | None = None
    batch_size: int | None = None
    precision: str | None = None
    compile: bool | None = None
    seed: int | None = None
    weights: str = "ema"
    checkpoint: Which = None

    def settings(self, experiment: Experiment) -> tuple[SamplingConfig, int]:
        """Return the sampling settings and the seed, checked; UsageError where they do not fit the process."""
        total = experiment.diffusion.num_timesteps
        if self.steps is not None and self.steps > total:
            raise UsageError(f"--steps: got {self.steps}, but this model has T = {total}; give at most {total}")
        given = {
            key: value
            for key, value in asdict(self).items()
            if key in SamplingConfig.model_fields and value is not None
        }
        asked = {**experiment.sampling.model_dump(), **given}
        if asked["sampler"] != experiment.sampling.sampler and self.steps is None:
            del asked["steps"]  # the experiment's are meant for its own sampler
        sampling = validate(SamplingConfig, asked, "sampling")
        if self.eta and sampling.sampler != "ddim":
            raise UsageError(f"--eta: got {self.eta:g}, which is ddim's; the sampler is {sampling.sampler!r}")
        check_sampling(experiment, sampling)
        averages.choose(self.weights, experiment.training)
        return sampling, experiment.seed if self.seed is None else self.seed

    def warnings(self, experiment: Experiment) -> tuple[str, ...]:
        """Return what may disappoint of images that are generated so."""
        sampling, _ = self.settings(experiment)
        return check_sampling(experiment, sampling)


@dataclass(frozen=True)
class RequestPlan:
    """What `--dry-run` of `sample` and `evaluate` prints: what would be done with a run, by name."""

    run: str
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"run": self.run, **self.settings}


@dataclass(frozen=True)
class LoadedRun:
    """A run's model in this process, which prepares and sums up; the workers of `profile` generate with it."""

    run: Run
    trained: Trained
    compute: Compute
    profile: Profile
    console: Console

    @classmethod
    def load(cls, run: Run, request: SampleRequest, profile: Profile, console: Console) -> LoadedRun:
        """Load the checkpoint and the weights that are asked for."""
        compute = sampling_compute(profile, profile.most_workers, here=False)
        compute.start()
        trained = Trained.from_run(run, request.checkpoint, request.weights)
        compute.place(trained.model)
        return cls(run, trained, compute, profile, console)

    def sampler(self, request: SampleRequest) -> ImageGenerator:
        """Return what generates images as asked."""
        return run_sampler(self.trained, request, self.compute, self.profile)

    def denoiser(self, request: SampleRequest) -> Denoiser:
        """Return the same of a diffusion model; UsageError for a model that draws an image in one call."""
        sampler = self.sampler(request)
        if not isinstance(sampler, Denoiser):
            kind = self.trained.experiment.model.type
            raise UsageError(
                f"run {self.run.id} is a {kind}: it draws an image in one call, with no way from noise to image"
            )
        return sampler

    @property
    def digest(self) -> str:
        """Hash of the weights and of what trained them."""
        fingerprint = self.run.record.dataset["fingerprint"]
        return digest(self.trained.model, self.trained.experiment.hash(fingerprint))

    def cache(self) -> SampleCache:
        """Return what generates the run's images over the profile's workers, and keeps the chunks."""
        runner = runner_of(self.profile)
        return SampleCache(self.run.folder, self.digest, self.trained.weights, self.profile, runner, self.console)

    def generation(self, sampler: ImageGenerator) -> Generation:
        """Return how images are generated, and how the checkpoint was chosen."""
        return replace(sampler.identity(self.trained.weights), selection=self.trained.selection)

    def identity(self, sampler: ImageGenerator, num_images: int) -> dict[str, Any]:
        """Return what decides the images, as plain data: equal identities give equal bytes on equal machines."""
        return {
            "checkpoint_step": self.trained.step,
            **asdict(self.generation(sampler)),
            "num_images": num_images,
            "arithmetic": arithmetic_of(self.profile),
        }


def run_sampler(trained: Trained, request: SampleRequest, compute: Compute, where: Compute | Profile) -> ImageGenerator:
    """Return what generates images as asked from a loaded model; `where` says which machine generates."""
    sampling, seed = request.settings(trained.experiment)
    sampling = settled(sampling, where)
    check_labels(trained.experiment, sampling, trained.class_names)
    return make_sampler(trained.experiment, trained.model, trained.shape, sampling, seed, compute, trained.class_names)


def write_samples(
    run: Run, request: SampleRequest, profile: Profile, console: Console, form: Format, out: Path
) -> Written:
    """Generate images and write them into a new folder, with a JSON file of their identity; return identity and paths."""
    with kept_when_stopped():
        loaded = LoadedRun.load(run, request, profile, console)
        sampler = loaded.sampler(request)
        found, store = loaded.cache().images(sampler, request.num_images)
    images, identity = torch.from_numpy(found), loaded.identity(sampler, request.num_images)
    with new_folder(out):
        if form == "grid":
            paths = [out / "grid.png"]
            save_grid(images[:MOST_IN_A_GRID], paths[0])
        elif form == "png":
            paths = [out / f"{index:06d}.png" for index in range(len(images))]
            for path, image in zip(paths, images, strict=True):
                write_picture(picture_of(image), path)
        else:
            paths = [out / "samples.parquet"]
            _write_parquet(images, sampler.sampling.labels, loaded.trained.class_names, paths[0])
        paths.append(write_about(identity, out))
    store.clear()
    return identity, paths


@contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Make a folder to write into; UsageError where it holds something already, StorageError where it cannot be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not an empty folder; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def write_about(identity: dict[str, Any], out: Path) -> Path:
    """Write what makes images these beside them."""
    about = out / "samples.json"
    about.write_text(json.dumps(identity, indent=1))
    return about


def _write_parquet(images: Tensor, asked: str | int, names: ClassNames, path: Path) -> None:
    """Write one Parquet file of raw rows, with page checksums, in the shards' own layout, and of each image the class it was asked for.

    The schema's metadata has the images' shape and, as Hugging Face's, the names of the classes: `ddpm-pipe ingest` reads both.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    shape: Shape = tuple(images.shape[1:])  # type: ignore[assignment]
    width = shape[0] * shape[1] * shape[2]
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(images), [None, pa.py_buffer(images.contiguous().numpy().tobytes())]
    )
    columns, metadata = {"image": column}, {"shape": "x".join(map(str, shape))}
    if names:
        labels = labels_of(range(len(images)), asked, names).numpy()
        if labels.max() < len(names):  # the null class is no label
            columns["label"] = pa.array(labels)
            features = {
                "image": {"_type": "Value", "dtype": "binary"},
                "label": {"_type": "ClassLabel", "names": list(names)},
            }
            metadata["huggingface"] = json.dumps({"info": {"features": features}})
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, path, write_page_checksum=True, compression="zstd")
