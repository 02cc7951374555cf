"""A real Slurm on this machine, by Debian's packages: a controller, and nodes that all are this machine, in a private folder.

with slurm_cluster(tmp_path) as slurm:
    slurm.environment            what a client's process needs: Slurm's commands read their configuration by it
    slurm.say("squeue")          the output of one of Slurm's commands
    slurm.stop_controller(); slurm.start_controller()
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.kit.ports import free_ports
from tests.kit.waiting import wait_for

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_min_interval=0
SchedulerTimeSlice=5
ReturnToService=2
JobRequeue=1
MpiDefault=none
KillWait=20
InactiveLimit=0
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
# Slurm resolves no name where loopback has the only addresses (AI_ADDRCONFIG), as in the namespace of the tests
ADDRESS = ("10.254.254.254/32", "dev", "lo")
NODE = "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"


@dataclass
class SlurmCluster:
    """The processes of a Slurm, and their folder."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What the environment of a client's process holds."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def say(self, *command: str) -> str:
        """Return the output of one of Slurm's commands."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def job(self, name: str) -> str:
        """Return Slurm's number of the job of a name; "" if it is not in the queue."""
        return self.say("squeue", "--noheader", f"--name={name}", "--format=%i").strip()

    def start_controller(self) -> None:
        """Start the controller, and wait until it answers."""
        self._start("slurmctld", "-D")
        wait_for(lambda: "UP" in self._ping(), 30, explain=self.log)

    def stop_controller(self) -> None:
        """Kill the controller."""
        process = self.processes.pop("slurmctld")
        process.kill()
        process.wait()

    def log(self) -> str:
        """Return the last lines of the processes' logs."""
        logs = [path.read_text(errors="replace").splitlines()[-15:] for path in self.folder.glob("*.log")]
        return "\n".join(line for lines in logs for line in lines)

    def _ping(self) -> str:
        return subprocess.run(
            ["scontrol", "ping"], env=os.environ | self.environment, capture_output=True, text=True, check=False
        ).stdout

    def _start(self, program: str, *options: str, name: str = "") -> None:
        with (self.folder / f"{name or program}.stdout").open("ab") as output:
            self.processes[name or program] = subprocess.Popen(
                [program, *options],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def require_slurm() -> None:
    """Skip the test where there is no Slurm."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd", "munged", "ip"))):
        pytest.skip("no Slurm here: apt-get install slurm-wlm munge, and be root")


@contextlib.contextmanager
def slurm_cluster(*, num_nodes: int = 2, cpus: int = 1) -> Iterator[SlurmCluster]:
    """Start a Slurm, and end it with all that it runs."""
    require_slurm()
    isolated = not any(
        name != "lo" and address.family == socket.AF_INET
        for name, found in psutil.net_if_addrs().items()
        for address in found
    )
    if isolated:
        subprocess.run(["ip", "address", "replace", *ADDRESS], check=True)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets have short names
    cluster = SlurmCluster(folder)
    host = socket.gethostname().partition(".")[0]
    controller, *ports = free_ports(1 + num_nodes)
    nodes = [NODE.format(number=i + 1, host=host, port=port, cpus=cpus) for i, port in enumerate(ports)]
    munge = folder / "munge.socket"
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, controller=controller, munge=munge, folder=folder, nodes="\n".join(nodes))
    )
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    folder.chmod(0o755)
    try:
        cluster._start(
            "munged", "--foreground", "--force", f"--socket={munge}", f"--key-file={folder}/key", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        wait_for(munge.exists, 20)
        cluster.start_controller()
        for i in range(num_nodes):
            cluster._start("slurmd", "-D", "-N", f"n{i + 1}", name=f"slurmd.n{i + 1}")
        wait_for(lambda: cluster.say("sinfo", "--noheader", "--format=%T").split() == ["idle"], 30, explain=cluster.log)
        yield cluster
    finally:
        for process in [psutil.Process(each.pid) for each in cluster.processes.values() if each.poll() is None]:
            for one in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.Error):
                    one.kill()
        for each in cluster.processes.values():
            each.wait()
        for process in psutil.process_iter():  # a step's own process is no child of its node's
            with contextlib.suppress(psutil.Error, OSError):
                if (
                    process.environ().get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
                    and process.pid != os.getpid()
                ):
                    process.kill()
        time.sleep(0.2)
        shutil.rmtree(folder, ignore_errors=True)
        if isolated:
            subprocess.run(["ip", "address", "delete", *ADDRESS], check=True)
