"""Ray as this package uses it: started here for one command, closed to the outside, and gone afterwards; or a cluster that is there."""

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

from pipeline.cluster.join import SETTINGS, joined_ray, require_room, shut_down
from pipeline.config.cluster_profile import Profile
from pipeline.console import plural
from pipeline.cpus import usable_cpus
from pipeline.errors import ClusterError
from pipeline.gpus import usable_gpus
from pipeline.import_path import environment_for_ray
from pipeline.planning.capacity import whole_gpus
from pipeline.signals import keeping_sigterm
from pipeline.watchdog import Watchdog, end_all

LOOPBACK = "127.0.0.1"
STARTS, TOO_SLOW = 3, "timed out during startup"  # Ray's word for processes that did not come up in time
OBJECT_STORE_BYTES = 150_000_000  # nothing large passes through it: images are read from the shards by each worker
LOCAL_SETTINGS = SETTINGS | {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one machine has no nodes that are taken away
    "RAY_USAGE_STATS_REPORT_URL": "disabled",  # a dashboard reports even that statistics are off
    "RAY_worker_niceness": "0",  # Ray's own 15 lets anything else on the machine go first
    # on, Ray takes a loopback address for a mistake and listens on every interface instead
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

# Ray reads mode and token when it is first imported and keeps them: one token for the life of this process
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def require_resources(profile: Profile, num_workers: int) -> None:
    """Refuse at once what this machine or the profile's cluster cannot hold: Ray itself would wait for it for ever (ClusterError).

    A cluster that may grow is asked when the work begins, and waited for as long as its profile says.
    """
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
    """Start Ray on this machine for the time of the context, bound to loopback and guarded by a token of its own.

    The token lives in the environment of Ray's processes alone: no file, no argument list. Nothing that the user has set for other
    clusters (an address file, RAY_ADDRESS) is looked at.
    """
    settings = LOCAL_SETTINGS | profile.env
    if "ray" not in sys.modules:
        os.environ.update(TOKEN | {k: v for k, v in os.environ.items() if k == "RAY_AUTH_TOKEN" and v})
    # gloo and NCCL would otherwise listen on the network card
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    settings = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback} | settings
    # the folder's path goes into names of sockets, of which an operating system takes about a hundred characters
    settings |= environment_for_ray()
    folder = _folder_for_ray()
    watchdog = Watchdog(folder)
    with _environment(settings, without=["RAY_ADDRESS"]):
        try:
            _start(profile, num_workers, folder, watchdog)
            yield
        finally:
            processes = watchdog.started()
            shut_down()
            end_all(processes)  # a worker that hangs as it ends is one that Ray has forgotten
            shutil.rmtree(folder, ignore_errors=True)
            watchdog.dismiss()


def _folder_for_ray() -> Path:
    """Make the folder that Ray's processes meet in; ClusterError where that cannot be done."""
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
    """Drive the Ray of a profile for the time of the context: one started here, or the cluster it names.

    Ray tells what befell its processes on stdout, where a program that reads our results would stumble over it.
    """
    with (
        contextlib.redirect_stdout(sys.stderr),
        joined_ray(profile) if profile.is_remote else local_ray(profile, num_workers),
    ):
        yield


class Session:
    """The Ray of a profile for several attempts: started or joined when it is first needed, and again should it have died."""

    def __init__(self, profile: Profile, num_workers: int) -> None:
        self._profile, self._num_workers = profile, num_workers
        self._started = contextlib.ExitStack()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self._started.close()

    def ensure(self) -> None:
        """Start or join Ray unless it is up."""
        if not is_up():
            self._started.close()
            self._started.enter_context(ray_of(self._profile, self._num_workers))


def is_up() -> bool:
    """Whether this process is part of a Ray that is alive."""
    if "ray" not in sys.modules:  # importing it here would fix its settings before they are set
        return False
    import ray

    try:
        return ray.is_initialized() and any(node["Alive"] for node in ray.nodes())
    except Exception:  # whatever a dead Ray answers
        return False


def _start(profile: Profile, num_workers: int, folder: Path, watchdog: Watchdog) -> None:
    """Start Ray; again where its processes needed longer than the half of a minute it grants them, as on a machine that is busy."""
    import ray

    for left in reversed(range(STARTS)):
        try:
            # in a folder without modules: Ray puts the current one first on its workers' path
            with keeping_sigterm(), contextlib.chdir(folder):
                ray.init(
                    address="local",
                    num_cpus=max(1, math.ceil(profile.cpus_per_worker(num_workers) * num_workers)),
                    num_gpus=whole_gpus(num_workers, profile.gpus_per_worker),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    configure_logging=True,
                    logging_level="ERROR",
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder),
                )
            return
        except Exception as error:  # Ray raises bare ones
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
def _environment(settings: dict[str, str], without: list[str]) -> Iterator[None]:
    """Set and unset variables for the time of the context."""
    names = [*settings, *without]
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(settings)
    for name in without:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
