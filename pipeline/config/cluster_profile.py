"""The cluster profile: where an experiment runs. It never changes a result, only its place, speed and price.

The message of an error names the value and says why it cannot work.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipeline.config import presets
from pipeline.config.experiment import Precision
from pipeline.config.yaml_files import Place, Section, read_yaml_mapping, validate
from pipeline.cpus import usable_cpus
from pipeline.errors import UsageError
from pipeline.gpus import usable_gpus
from pipeline.redaction import DECLARED_SECRETS, announces_secret, refuse_secrets
from pipeline.storage.home import datasets_dir, home
from pipeline.storage.provenance import JOB_VARIABLE
from pipeline.storage.remote import RemoteFolder, is_remote
from pipeline.storage.runs import normalise_name

DEFAULT_PROFILE = "local"
# the upper bounds are far above what a machine or a cluster has, and below what a library fails on
PositiveInt = Annotated[int, Field(ge=1, le=100_000)]
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SlurmWord = Annotated[str, Field(pattern=r"^[^\s'\"]+$")]
Line = Annotated[str, Field(pattern=r"^[^\n]+$")]
Arithmetic = Literal[Precision.FP32, Precision.BF16, Precision.FP16]  # `mixed` chooses among these

HOST_PORT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}")
S3_PREFIX = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/[^\s?#]*)?(?:\?[^\s#]*)?")


class Workers(Section):
    """Elastic training: each attempt takes as many workers as the cluster holds."""

    min: PositiveInt
    """Smallest number; with fewer workers nothing starts."""
    max: PositiveInt
    """Largest number."""
    grow_after_s: Seconds = 60.0
    """Seconds that room for more workers must last before the workers save and restart."""

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


def _form_of_workers(value: object) -> str:
    return "(range)" if isinstance(value, dict | Workers) else "(all)" if isinstance(value, str) else "(number)"


# by form, so that an error is about the form that was written (tags in brackets are not shown)
NumWorkers = Annotated[
    Annotated[PositiveInt, Tag("(number)")]
    | Annotated[Workers, Tag("(range)")]
    | Annotated[Literal["all"], Tag("(all)")],
    Discriminator(_form_of_workers),
]


class Resources(Section):
    """What one worker gets. Null is for kind `local` alone."""

    CPU: Annotated[float, Field(gt=0, le=100_000)] | None = None
    """CPUs of a worker, or a share of one; null shares this machine's CPUs equally."""
    GPU: NonNegative | None = None
    """GPUs of a worker, or a share of one; null is a whole one where the profile's `gpu` lets it have one."""

    @field_validator("GPU")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"got {value:g}; Ray shares one GPU by fractions, but gives out several only whole")
        return value


class MLflowConfig(Section):
    """Where runs are recorded."""

    tracking_uri: str | None = None
    """Address of the tracking store; null is MLFLOW_TRACKING_URI, else the SQLite store of the home folder."""
    experiment: Annotated[str | None, Field(min_length=1)] = None
    """MLflow's experiment; null is MLFLOW_EXPERIMENT_NAME, else "ddpm"."""
    strict: bool = False
    """Refuse to train while the store is away, instead of delivering later."""


class Notify(Section):
    """Who gets a JSON message when a run or a sweep ends, fails, is interrupted or restarts."""

    command: Annotated[str | None, Field(min_length=1)] = None
    """Command line that gets the message on its stdin; null is DDPM_PIPE_NOTIFY_COMMAND."""
    webhook: str | None = None
    """Address that gets the message by POST; null is DDPM_PIPE_NOTIFY_WEBHOOK, the place for an address that is secret."""


class Retries(Section):
    """How often a run is started again after a failure that is not the experiment's fault."""

    max_attempts: PositiveInt = 3
    """Largest number of starts of a training, including the first."""


class Preemption(Section):
    """What happens when Ray announces that a node will be taken away."""

    watch: bool = True
    """Whether workers save and continue elsewhere."""
    poll_s: Seconds = 2.0
    """Seconds between two checks of the nodes."""


class Timeouts(Section):
    """How long to wait, in seconds."""

    collective_s: Seconds = 600.0
    """How long a worker may hang in an all-reduce before the attempt fails."""
    stop_s: Seconds = 30.0
    """How long a requested stop waits for the checkpoint to be saved."""
    start_s: Seconds = 60.0
    """How long workers may take to start on nodes that are ready."""


class Cache(Section):
    """Copies of remote shards on each node."""

    folder: Place | None = None
    """Absolute folder on each node; null is one in the system's temporary folder."""
    max_gb: Annotated[float, Field(gt=0, le=1e9)] = 50.0
    """Gigabytes of copies on a node; the least recently used are removed first."""


class Price(Section):
    """The cost model."""

    per_worker_hour: NonNegative = 0.0
    """Cost of one worker for an hour, with its share of the machine."""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    """Three capital letters."""


class RuntimeEnv(Section):
    """What is sent with a job."""

    working_dir: bool = True
    """Whether to send the current folder, without data, caches and secrets."""
    py_modules: tuple[str, ...] = ()
    """Further folders of your own modules to send."""
    excludes: tuple[str, ...] = ()
    """Patterns of files that are not sent."""
    max_mb: Annotated[float, Field(gt=0, le=500)] = 100.0
    """Megabytes above which sending is refused."""


class Slurm(Section):
    """What a job asks Slurm for; its CPUs and GPUs come from `workers` and `resources_per_worker`."""

    partition: SlurmWord | None = None
    """Partition; null is the cluster's default."""
    account: SlurmWord | None = None
    """Account that is charged; null is yours by default."""
    qos: SlurmWord | None = None
    """Quality of service; null is the account's default."""
    time: Annotated[str, Field(pattern=r"^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$")] | None = None
    """Time limit in quotes, such as `"4:00:00"` or `"2-0"`; null is the partition's default."""
    nodes: PositiveInt = 1
    """Number of nodes, among which the workers are divided equally."""
    setup: tuple[Line, ...] = ()
    """Lines of shell before the command, such as `module load cuda`."""
    options: tuple[Annotated[str, Field(pattern=r"^-[^\n]+$")], ...] = ()
    """Further options of `sbatch`, such as `--constraint=a100`."""
    signal_before_s: Annotated[int, Field(ge=1, le=65535)] = 120
    """Seconds before the time limit at which the command saves and stops; Slurm may be up to a minute early."""
    max_requeues: Annotated[int, Field(ge=0, le=100_000)] = 20
    """How often a job that was stopped with its state saved is put back into the queue."""

    @field_validator("time", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(f'got {value}, which YAML reads as a number, expected text. Put it in quotes: "4:00:00".')
        return value


class Profile(Section):
    """Where a run takes place."""

    name: Name = DEFAULT_PROFILE
    """Name of the profile. Default: the file's name."""
    kind: Literal["local", "connect", "job", "slurm"] = "local"
    """`local`: this machine. `connect`: a Ray cluster, from one of its nodes. `job`: a Ray cluster, as a job. `slurm`: a job of Slurm."""
    address: str | None = None
    """Of the cluster: `auto` or HOST:PORT for `connect`, the dashboard's http(s) address for `job`."""
    workers: NumWorkers = 1
    """Number of workers, a range (`min` and `max`), or `all`: one for each GPU of this machine."""
    gpu: Literal["auto", "never", "required"] = "auto"
    """For kind local: take a usable GPU where there is one, never, or refuse to start without one."""
    isolated: bool = False
    """For kind local: run even a single worker in a process of Ray, which is restarted if it dies."""
    resources_per_worker: Resources = Resources()
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    """Whether workers share nodes (Ray's PACK, SPREAD and STRICT_SPREAD)."""
    threads_per_worker: PositiveInt | None = None
    """Torch's threads of a worker; null is its CPUs. Results are bit-exact for an equal number only."""
    precisions: tuple[Arithmetic, ...] = Field(default=(Precision.FP32, Precision.BF16, Precision.FP16), min_length=1)
    """Arithmetic that these machines may use; `mixed` chooses among these."""
    compile: bool = True
    """Whether `training.compile` is allowed on these machines."""
    cuda_graphs: bool = False
    """With `training.compile`: replay recorded kernels; not with micro-batches."""
    storage: Place | None = None
    """Absolute folder that every node sees, or s3://BUCKET/PREFIX; null is the home folder."""
    cache: Cache = Cache()
    mlflow: MLflowConfig = MLflowConfig()
    notify: Notify = Notify()
    retries: Retries = Retries()
    preemption: Preemption = Preemption()
    price: Price = Price()
    runtime_env: RuntimeEnv = RuntimeEnv()
    slurm: Slurm = Slurm()
    env: dict[VariableName, str] = Field(default_factory=dict)
    """Environment variables of the workers; no secrets."""
    forward_env: tuple[VariableName, ...] = ()
    """Names of variables whose values are secret: they are taken from your environment and recorded nowhere."""
    timeouts: Timeouts = Timeouts()
    wait_for_resources_s: NonNegative = 0.0
    """How long to wait for a cluster without enough free resources."""
    insecure: bool = False
    """Accept a cluster without a token; anyone who reaches it can run code on it."""

    @property
    def use_gpu(self) -> bool:
        """Whether each worker holds a GPU."""
        return self.gpus_per_worker > 0

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of each worker, or the share of one."""
        return self.resources_per_worker.GPU or 0

    @property
    def least_workers(self) -> int:
        """Smallest number of workers with which work starts."""
        return self.workers.min if isinstance(self.workers, Workers) else 1 if self.workers == "all" else self.workers

    @property
    def most_workers(self) -> int:
        """Workers for work whose result does not depend on their number, such as sampling."""
        return self.workers.max if isinstance(self.workers, Workers) else self.least_workers

    @property
    def is_remote(self) -> bool:
        """Whether the work runs on several machines, rather than on the one that the command runs on."""
        return self.kind in {"connect", "job"} or self.slurm.nodes > 1

    def trains_here(self, num_workers: int) -> bool:
        """Whether training runs in the command's own process: with one worker on this machine that is not isolated."""
        return not self.is_remote and num_workers == 1 and not self.isolated

    def isolating(self) -> Profile:
        """Return the profile with workers in processes of their own, which those of a cluster are anyway."""
        return self if self.is_remote else self.model_copy(update={"isolated": True})

    def home(self) -> Path:
        """Return the absolute folder that holds all state: the profile's storage if that is a folder, else as `home.home`."""
        return home(self.storage)

    def datasets(self) -> Path | str:
        """Return where ingested datasets live: a folder, or an address in the object store."""
        if is_remote(self.storage):
            return RemoteFolder(str(self.storage)).child("datasets").uri
        return datasets_dir(self.home())

    def cpus_per_worker(self, num_workers: int) -> float:
        """CPUs that Ray reserves for each of `num_workers` workers."""
        if self.resources_per_worker.CPU is not None:
            return self.resources_per_worker.CPU
        return usable_cpus() / num_workers

    def threads(self, num_workers: int) -> int:
        """Torch threads of each worker. Results are bit-exact for an equal number of them only."""
        return self.threads_per_worker or max(1, int(self.cpus_per_worker(num_workers)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested data that `validate(Profile, ...)` reads back."""
        return self.model_dump(mode="json")

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Profile:
        for fault in chain(_address_faults(self), _place_faults(self), _kind_faults(self), _env_faults(self)):
            raise ValueError(fault)
        return self


def _address_faults(profile: Profile) -> Iterator[str]:
    kind, address = profile.kind, profile.address
    if address is not None and address.startswith("ray://"):
        yield (
            f"address: got {address!r}: Ray Client (ray://) cannot run Ray Train; use kind: job with http://HEAD:8265, or kind: connect "
            "on a node"
        )
    if kind in {"local", "slurm"} and address is not None:
        yield f"address: got {address!r}: kind {kind} starts its own Ray; leave address out, or use kind: connect or job"
    if kind == "connect" and not _is_cluster(address):
        yield f"address: got {address!r}: kind connect needs auto (this node's cluster) or the head's HOST:PORT, such as 10.0.0.4:6379"
    if kind == "job" and not _is_http(address):
        yield f"address: got {address!r}: kind job needs the dashboard's http(s) address, such as http://127.0.0.1:8265"


def _place_faults(profile: Profile) -> Iterator[str]:
    kind, storage, uri = profile.kind, profile.storage, profile.mlflow.tracking_uri
    if storage is None and kind in {"connect", "job"}:
        yield f"storage is missing: with kind {kind} every node must see the runs; give a shared folder or s3://BUCKET/PREFIX"
    if storage is not None and "://" in storage:
        try:
            RemoteFolder(storage)
        except UsageError as error:  # without credentials that the address may hold
            yield f"storage: {error}"
        if not S3_PREFIX.fullmatch(storage):
            yield f"storage: got {storage!r}; expected an absolute folder or s3://BUCKET/PREFIX"
    for name, place in (("storage", storage), ("cache.folder", profile.cache.folder)):
        if place is not None and "://" not in place and not Path(place).is_absolute():
            yield f"{name}: got {place!r}: workers run in other folders, so it must be absolute, such as /mnt/ddpm"
    if profile.notify.webhook is not None and not _is_http(profile.notify.webhook):  # which may be a secret
        yield "notify.webhook: got another address, expected http(s)://HOST/..."
    if kind in {"connect", "job"} and uri is not None and not _is_http(uri):
        yield f"mlflow.tracking_uri: got {uri!r}: with kind {kind} other machines write to it; give a server's http(s) address"


def _kind_faults(profile: Profile) -> Iterator[str]:
    kind, each = profile.kind, profile.resources_per_worker.GPU
    if kind != "local" and profile.resources_per_worker.CPU is None:
        yield f"resources_per_worker.CPU is missing: with kind {kind} there is no machine to share equally; give a number"
    if kind != "local" and (profile.workers == "all" or profile.gpu != "auto"):
        yield "workers: all and gpu are for kind local alone: give a number of workers, and what each takes in resources_per_worker.GPU"
    if (profile.gpu == "never" and each) or (profile.gpu == "required" and each == 0):
        yield f"gpu: got {profile.gpu}, but resources_per_worker.GPU is {each:g}; leave one of them out"
    if profile.is_remote and profile.isolated:
        yield f"isolated is for kind local alone: with kind {kind} every worker is a process of its own; leave it out"
    if kind == "local" and profile.placement == "strict_spread" and profile.workers != 1:
        yield "placement: strict_spread puts each worker on another node, and kind local has one; use pack"
    if kind != "job" and profile.runtime_env != RuntimeEnv():
        yield f"runtime_env is for kind job alone: with kind {kind} the code is run where it lies"
    if kind != "slurm" and profile.slurm != Slurm():
        yield f"slurm is for kind slurm alone: got kind {kind}; leave it out"
    if profile.most_workers % profile.slurm.nodes:
        yield f"slurm.nodes: got {profile.slurm.nodes}, expected a number that divides the {profile.most_workers} workers"


def _env_faults(profile: Profile) -> Iterator[str]:
    for name, value in profile.env.items():
        if announces_secret(name, value):
            yield f"env.{name} looks like a secret: profiles are recorded and shared; name it in forward_env instead"
        if name in profile.forward_env:
            yield f"env.{name}: also in forward_env; keep one"


def load_profile(reference: str | None) -> Profile:
    """Read a profile by path or shipped name and set its variables in this process; None is the default (`local`)."""
    path: Path = presets.find("cluster", reference or DEFAULT_PROFILE)
    content = read_yaml_mapping(path)
    content.setdefault("name", normalise_name(path.stem))
    profile = validate(Profile, content, str(path.name))
    require_tracking(profile)
    use_variables(profile)
    if profile.forward_env:
        os.environ[DECLARED_SECRETS] = ",".join(profile.forward_env)
        refuse_secrets(sys.argv[1:], "the command line")  # again, now that these are known as secrets
        refuse_secrets(profile.to_dict(), f"profile {profile.name!r}")
    return settled(profile)


def settled(profile: Profile, count_gpus: Callable[[], int] = usable_gpus) -> Profile:
    """Return the profile with `gpu`, `workers: all` and a missing `resources_per_worker.GPU` resolved for this machine.

    A profile of a cluster stays as it is. Fewer GPUs than workers are shared equally.
    """
    each = profile.resources_per_worker.GPU
    if profile.kind != "local":
        return profile
    gpus = 0 if profile.gpu == "never" or each == 0 else count_gpus()
    workers, most = profile.workers, profile.most_workers
    if workers == "all":
        most = max(1, int(gpus / (each or 1)))
        workers = Workers(min=1, max=most) if most > 1 else 1
    if gpus == 0:
        each = (each or 1) if profile.gpu == "required" else 0
    elif each is None:
        each = 1 / math.ceil(most / gpus)
    resources = profile.resources_per_worker.model_copy(update={"GPU": each})
    return profile.model_copy(update={"workers": workers, "resources_per_worker": resources})


def use_variables(profile: Profile, *, over_others: bool = True) -> None:
    """Set a profile's `env` in this process too, which reaches storage and tracking as the workers do.

    Without `over_others` variables that are set already, such as by another profile, stay.
    """
    if profile.kind != "job" or JOB_VARIABLE in os.environ:
        os.environ.update(profile.env if over_others else profile.env | os.environ)


def forwarded(profile: Profile) -> dict[str, str]:
    """Return the secret variables of `forward_env` from this environment; UsageError if one is not set."""
    missing = [name for name in profile.forward_env if name not in os.environ]
    if missing:
        raise UsageError(
            f"profile {profile.name!r}: forward_env names {', '.join(missing)}, not set here; export it, or take it out of the profile"
        )
    values = {name: os.environ[name] for name in profile.forward_env}
    return values | ({DECLARED_SECRETS: ",".join(values)} if values else {})


def require_tracking(profile: Profile) -> None:
    """Raise UsageError for a cluster without a tracking server that its nodes can write to."""
    if profile.kind not in {"connect", "job"} or profile.mlflow.tracking_uri is not None:
        return
    uri = profile.env.get("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI"))
    if not _is_http(uri):
        got = f"MLFLOW_TRACKING_URI is {uri!r}" if uri else "neither it nor MLFLOW_TRACKING_URI is set"
        raise UsageError(
            f"profile {profile.name!r}: mlflow.tracking_uri: {got}, and with kind {profile.kind} other machines write to it; "
            "give a server's http(s) address (on one machine: mlflow server, then http://127.0.0.1:5000)"
        )


def _is_cluster(address: str | None) -> bool:
    return address is not None and (address == "auto" or HOST_PORT.fullmatch(address) is not None)


def _is_http(address: str | None) -> bool:
    if address is None:
        return False
    try:
        parts = urlsplit(address)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
