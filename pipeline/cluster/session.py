"""Ray as this package uses it: started here for one command and closed to the outside, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.cluster.allocation import joined_by_nodes
from pipeline.cluster.join import LOOPBACK_SOCKETS, SETTINGS, joined_ray, require_room, shut_down, start_ray
from pipeline.config.cluster_profile import Profile
from pipeline.console import plural
from pipeline.cpus import usable_cpus
from pipeline.errors import ClusterError, UsageError
from pipeline.gpus import usable_gpus
from pipeline.import_path import environment_for_ray
from pipeline.planning.capacity import whole_gpus
from pipeline.signals import in_slurm_job
from pipeline.watchdog import Watchdog, end_all

LOOPBACK = "127.0.0.1"
STARTS, TOO_SLOW = 3, "timed out during startup"  # in Ray's message about processes that started too slowly
OBJECT_STORE_BYTES = 150_000_000  # nothing large passes through it: each worker reads images from the shards
LOCAL_SETTINGS = SETTINGS | {
    "RAY_USAGE_STATS_REPORT_URL": "disabled",  # otherwise a dashboard reports that statistics are off
    "RAY_worker_niceness": "0",  # Ray's default of 15 gives every other process of the machine priority
    # if it is on, Ray rejects a loopback address and listens on every interface instead
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
SEVERAL_NODES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}

# Ray reads mode and token when it is first imported, and keeps them: one token for the life of this process
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def require_resources(profile: Profile, num_workers: int) -> None:
    """Raise ClusterError if the workers do not fit this machine or the profile's cluster: Ray itself would wait for ever.

    A cluster that may grow (`wait_for_resources_s`) is checked when the work begins.
    """
    if profile.kind == "slurm" and not in_slurm_job():
        raise UsageError(
            f"profile {profile.name!r} is of kind slurm, and this command runs outside of a job; name it with --cluster to submit one, or "
            "name another"
        )
    if profile.kind == "slurm" and profile.is_remote:
        return  # the job's nodes were asked for by the profile
    if profile.is_remote:
        with joined_ray(profile):
            if not profile.wait_for_resources_s:
                require_room(profile, profile.least_workers)
        return
    if profile.use_gpu:
        each, gpus = profile.gpus_per_worker, usable_gpus()
        need = whole_gpus(num_workers, each)
        if need > gpus:
            raise ClusterError(
                f"profile {profile.name!r}: got {plural(gpus, 'usable GPU')} on this machine, expected {need} for "
                f"{plural(num_workers, 'worker')} with {plural(each, 'GPU')}; use --cluster local to train on its CPUs"
            )
    each, have = profile.cpus_per_worker(num_workers), usable_cpus()
    if each * num_workers > have + 1e-9:
        fit = int(have / each)
        remedy = f"set workers to {fit}" if fit else f"set resources_per_worker.CPU to {have} or less"
        raise ClusterError(
            f"profile {profile.name!r}: got {plural(have, 'CPU')} on this machine, expected {each * num_workers:g} for "
            f"{plural(num_workers, 'worker')} with {plural(each, 'CPU')}; {remedy}, or leave resources_per_worker.CPU out to share them"
        )


@contextlib.contextmanager
def local_ray(profile: Profile, num_workers: int) -> Iterator[None]:
    """Run Ray for the time of the context, protected by a token of its own: on this machine, bound to loopback, or on a Slurm job's nodes.

    The token is in the environment of Ray's processes alone, in no file and in no argument list. Settings of the user's for other clusters
    (an address file, RAY_ADDRESS) are ignored.
    """
    bound = SEVERAL_NODES if profile.is_remote else LOOPBACK_SOCKETS
    settings = LOCAL_SETTINGS | bound | profile.env | environment_for_ray()
    if "ray" not in sys.modules:
        os.environ.update(TOKEN | {k: v for k, v in os.environ.items() if k == "RAY_AUTH_TOKEN" and v})
    folder = _folder_for_ray()
    watchdog = Watchdog(folder)
    with _environment(settings | {"RAY_ADDRESS": None}):
        try:
            _start(profile, num_workers, folder, watchdog)
            with joined_by_nodes(profile, folder) if profile.is_remote else contextlib.nullcontext():
                yield
        finally:
            processes = watchdog.started()
            shut_down()
            end_all(processes)  # Ray does not wait for a worker that hangs as it ends
            shutil.rmtree(folder, ignore_errors=True)
            watchdog.dismiss()


def _folder_for_ray() -> Path:
    """Make the folder for the sockets of Ray's processes. Raises ClusterError if that fails."""
    # the name of a socket has at most about a hundred characters
    parent = Path(os.environ.get("RAY_TMPDIR") or "/tmp").absolute()
    try:
        parent.mkdir(parents=True, exist_ok=True)  # as Ray itself makes it
        return Path(tempfile.mkdtemp(prefix="ddpm-ray-", dir=parent))
    except OSError as error:
        raise ClusterError(
            f"Ray's temporary folder cannot be made in {parent} ({error.strerror}); set RAY_TMPDIR to a folder that can be written"
        ) from None


@contextlib.contextmanager
def ray_of(profile: Profile, num_workers: int) -> Iterator[None]:
    """Be the driver of a profile's Ray for the time of the context: one started here, or the cluster that the profile names.

    Ray prints about its processes to stdout, where programs read our results: these lines go to stderr.
    """
    with (
        contextlib.redirect_stdout(sys.stderr),
        local_ray(profile, num_workers) if profile.kind in {"local", "slurm"} else joined_ray(profile),
    ):
        yield


class Session(contextlib.ExitStack):
    """The Ray of a profile for several attempts: started or joined when it is first needed, and again if it has died."""

    def __init__(self, profile: Profile, num_workers: int) -> None:
        super().__init__()
        self._profile, self._num_workers = profile, num_workers

    def ensure(self) -> None:
        """Start or join Ray unless it is up."""
        if not is_up():
            self.close()
            self.enter_context(ray_of(self._profile, self._num_workers))


def is_up() -> bool:
    """Whether this process is connected to a Ray that is alive."""
    if "ray" not in sys.modules:  # importing it here would fix its settings before they are set
        return False
    import ray

    try:
        return ray.is_initialized() and any(node["Alive"] for node in ray.nodes())
    except Exception:  # a dead Ray raises many kinds
        return False


def _start(profile: Profile, num_workers: int, folder: Path, watchdog: Watchdog) -> None:
    """Start Ray, again if its processes did not start within Ray's half minute, as on a busy machine."""
    here = profile.most_workers // profile.slurm.nodes if profile.is_remote else num_workers
    place = {} if profile.is_remote else {"_node_ip_address": LOOPBACK}
    for left in reversed(range(STARTS)):
        try:
            start_ray(
                folder,
                address="local",
                num_cpus=max(1, math.ceil(profile.cpus_per_worker(here) * here)),
                num_gpus=whole_gpus(here, profile.gpus_per_worker),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                **place,
            )
            return
        except Exception as error:  # Ray raises the base class
            reason = " ".join(str(error).split())[:300]
            shut_down()
            watchdog.sweep_out()
            if "AF_UNIX" in reason:
                raise ClusterError(
                    f"Ray did not start: the path of its temporary folder {folder} is too long for the names of sockets; set RAY_TMPDIR "
                    "to a shorter one, such as /tmp"
                ) from None
            if not left or TOO_SLOW not in reason:
                raise ClusterError(
                    f"Ray did not start on this machine: {reason}; is there memory and room in {folder.parent}?"
                ) from None


@contextlib.contextmanager
def _environment(settings: dict[str, str | None]) -> Iterator[None]:
    """Set variables for the time of the context; None unsets one."""
    before = {name: os.environ.get(name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
