"""Samples of a run for people and programs: a grid, PNG files, or a Parquet set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.cluster.pool import runner_of
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, SamplingConfig
from pipeline.config.yaml_files import validate
from pipeline.console import Console
from pipeline.data.labels import labels_of
from pipeline.errors import StorageError, UsageError
from pipeline.pictures.pictures import picture_of, save_grid
from pipeline.sampling.generated import SampleCache, digest
from pipeline.sampling.generation import Denoiser, VaeSampler, make_sampler, settled
from pipeline.storage.runs import Run
from pipeline.training import averages
from pipeline.training.chunks import ChunkStore
from pipeline.training.combinations import check_labels, check_sampling
from pipeline.training.device import Compute, arithmetic_of, sampling_compute
from pipeline.training.models import Shape
from pipeline.training.trained import Trained

Format = Literal["grid", "png", "parquet"]
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
    checkpoint: int | None = None

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
class Samples:
    """Generated images and how they came about."""

    images: Tensor  # uint8 [n, C, H, W]
    trained: Trained
    generator: Denoiser | VaeSampler
    store: ChunkStore
    profile: Profile

    def identity(self) -> dict[str, Any]:
        """Return what makes these images these: equal identities give equal bytes on equal machines."""
        return identity_of(self.trained, self.generator, len(self.images), self.profile)


def identity_of(
    trained: Trained, generator: Denoiser | VaeSampler, num_images: int, profile: Profile
) -> dict[str, Any]:
    """Return what makes so many images of a model, generated as a profile says, these, as plain data."""
    return {
        "checkpoint_step": trained.step,
        **asdict(generator.identity(trained.weights)),
        "num_images": num_images,
        "arithmetic": arithmetic_of(profile),
    }


def load(run: Run, request: SampleRequest, profile: Profile) -> tuple[Trained, Denoiser | VaeSampler]:
    """Load a run's model into this process, ready to generate as asked."""
    trained, compute = load_trained(run, request, profile)
    return trained, run_sampler(trained, request, compute, profile)


def load_denoiser(run: Run, request: SampleRequest, profile: Profile) -> tuple[Trained, Denoiser]:
    """Load a run's diffusion model; UsageError for a model that draws an image in one call, which leaves no way to look at."""
    trained, generator = load(run, request, profile)
    if not isinstance(generator, Denoiser):
        raise UsageError(
            f"run {run.id} is a {trained.experiment.model.type}: it draws an image in one call, with no way from noise to image"
        )
    return trained, generator


def load_trained(run: Run, request: SampleRequest, profile: Profile) -> tuple[Trained, Compute]:
    """Load the checkpoint and the weights that are asked for into this process, whose part is to prepare and to sum up."""
    compute = sampling_compute(profile, profile.most_workers, here=False)
    compute.start()
    trained = Trained.from_run(run, request.checkpoint, request.weights)
    compute.place(trained.model)
    return trained, compute


def run_sampler(
    trained: Trained, request: SampleRequest, compute: Compute, where: Compute | Profile
) -> Denoiser | VaeSampler:
    """Return what generates images as asked from a model that is loaded, where it is to be generated."""
    sampling, seed = request.settings(trained.experiment)
    sampling = settled(sampling, where)
    check_labels(trained.experiment, sampling, trained.class_names)
    return make_sampler(trained.experiment, trained.model, trained.shape, sampling, seed, compute, trained.class_names)


def generate_from(run: Run, request: SampleRequest, profile: Profile, console: Console) -> Samples:
    """Generate images from a run's checkpoint over the profile's workers, with progress."""
    trained, generator = load(run, request, profile)
    images, store = sample_cache_of(run, trained, profile, console).images(generator, request.num_images)
    return Samples(torch.from_numpy(images), trained, generator, store, profile)


def sample_cache_of(run: Run, trained: Trained, profile: Profile, console: Console) -> SampleCache:
    """Return what generates a run's images as a profile says."""
    model = digest(trained.model, trained.experiment.hash(run.record.dataset["fingerprint"]))
    return SampleCache(run.folder, model, trained.weights, profile, runner_of(profile), console)


def write_samples(samples: Samples, out: Path, form: Format) -> list[Path]:
    """Write images into a folder that does not hold others yet, with a JSON file of their identity; return the paths."""
    with new_folder(out):
        paths = _WRITERS[form](samples, out)
        paths.append(write_about(samples.identity(), out))
        samples.store.clear()
    return paths


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


def _write_grid(samples: Samples, out: Path) -> list[Path]:
    path = out / "grid.png"
    save_grid(samples.images[:MOST_IN_A_GRID], path)
    return [path]


def _write_png(samples: Samples, out: Path) -> list[Path]:
    paths = []
    for index, image in enumerate(samples.images):
        path = out / f"{index:06d}.png"
        picture_of(image).save(path)
        paths.append(path)
    return paths


def _write_parquet(samples: Samples, out: Path) -> list[Path]:
    """Write one Parquet file of raw rows, with page checksums, in the shards' own layout, and of each image the class it was asked for.

    The schema's metadata has the images' shape and, as Hugging Face's, the names of the classes: `ddpm-pipe ingest` reads both.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, names = samples.images, samples.trained.class_names
    shape: Shape = tuple(images.shape[1:])  # type: ignore[assignment]
    width = shape[0] * shape[1] * shape[2]
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(images), [None, pa.py_buffer(images.contiguous().numpy().tobytes())]
    )
    columns, metadata = {"image": column}, {"shape": "x".join(map(str, shape))}
    if names:
        labels = labels_of(range(len(images)), samples.generator.sampling.labels, names).numpy()
        if labels.max() < len(names):  # the null class is no label
            columns["label"] = pa.array(labels)
            features = {
                "image": {"_type": "Value", "dtype": "binary"},
                "label": {"_type": "ClassLabel", "names": list(names)},
            }
            metadata["huggingface"] = json.dumps({"info": {"features": features}})
    table = pa.table(columns).replace_schema_metadata(metadata)
    path = out / "samples.parquet"
    pq.write_table(table, path, write_page_checksum=True, compression="zstd")
    return [path]


_WRITERS = {"grid": _write_grid, "png": _write_png, "parquet": _write_parquet}
