"""The other nodes of a Slurm job join the Ray that this process has started on the job's first node."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.cluster import nodes as cluster_nodes
from pipeline.config.cluster_profile import Profile
from pipeline.errors import ClusterError
from pipeline.planning.capacity import whole_gpus

LEAVE_S = 20.0
# $1 is Ray's folder, which each node removes at the end: `ray start --block` itself ends by SIGTERM
NODE = """\
mkdir -p "$1"
trap : TERM
"${@:2}" --temp-dir="$1/$SLURM_NODEID" &
while kill -0 $! 2> /dev/null; do wait $!; done
rm -rf "$1/$SLURM_NODEID"
rmdir "$1" 2> /dev/null
"""


@contextlib.contextmanager
def joined_by_nodes(profile: Profile, folder: Path) -> Iterator[None]:
    """Have the job's other nodes as nodes of this process's Ray for the time of the context. ClusterError if one does not join."""
    import ray

    others = profile.slurm.nodes - 1
    workers = profile.most_workers // profile.slurm.nodes
    cpus, gpus = (
        math.ceil(workers * profile.cpus_per_worker(workers)),
        whole_gpus(workers, profile.gpus_per_worker),
    )
    step = ["srun", f"--nodes={others}", f"--ntasks={others}", "--relative=1", f"--cpus-per-task={cpus}"]
    start = [
        sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={ray.get_runtime_context().gcs_address}", "--block",
        f"--num-cpus={cpus}", f"--num-gpus={gpus}", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats",
    ]  # fmt: skip
    log = folder / "nodes.log"
    with log.open("wb") as output:
        joining = subprocess.Popen(
            [*step, "bash", "-c", NODE, "bash", str(folder), *start],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
    try:
        deadline = time.monotonic() + profile.timeouts.start_s
        while (num_nodes := len(cluster_nodes.nodes())) <= others:
            if joining.poll() is not None or time.monotonic() > deadline:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                raise ClusterError(
                    f"profile {profile.name!r}: got {num_nodes} nodes in Ray, expected the {others + 1} of this job: "
                    f"{lines[-1] if lines else 'no reason given'}. See that nodes reach each other, or raise timeouts.start_s."
                )
            time.sleep(0.5)
        yield
    finally:
        joining.terminate()
        try:
            joining.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            joining.kill()
            joining.wait()
