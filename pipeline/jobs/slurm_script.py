"""The batch script of a job of Slurm: what it asks for, the command, and what follows when Slurm ends it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.cluster_profile import Profile
from pipeline.planning.capacity import whole_gpus

# The command runs in the background, because bash runs a trap only while it waits. Slurm may send SIGTERM to the command, too: the trap
# sends SIGUSR1, so that it does not count as a second signal.
END = """\
command=$!
stopped=
trap 'kill -USR1 $command' USR1 TERM
trap 'stopped=yes; kill -USR1 $command' USR2 # by `ddpm-pipe jobs stop`
while kill -0 $command 2> /dev/null; do wait $command; done
wait $command
code=$?

# 75: it was stopped, and its state is saved
requeues=$((${{SLURM_RESTART_COUNT:-0}} + ${{DDPM_PIPE_REQUEUES:-0}}))
case $(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T) in COMPLETING | CANCELLED) stopped=yes ;; esac
if [ $code = 75 ] && [ -z "$stopped" ] && [ $requeues -ge {max_requeues} ]; then
  echo "ddpm-pipe: not requeued: got $requeues requeues, expected at most {max_requeues}. Raise slurm.max_requeues, and resume." >&2
elif [ $code = 75 ] && [ -z "$stopped" ]; then
  export DDPM_PIPE_REQUEUES=$((requeues + 1))
  for pause in 1 2 5 10 20 40; do
    scontrol requeue $SLURM_JOB_ID && exit
    # where requeueing is not allowed
    env --unset=SLURM_RESTART_COUNT sbatch --dependency=afterany:$SLURM_JOB_ID "$0" && exit $code
    sleep $pause # while the controller is away
  done
fi
echo $code > {exit_file}
exit $code
"""


def script_of(
    profile: Profile,
    job: str,
    words: Sequence[str],
    folder: Path,
    home: Path,
    here: Path,
    programs: Path,
    run: str = "",
) -> str:
    """Return the script of a command.

    `words` are those of the command, `folder` takes the job's files, `here` is the current folder and `programs` that of the command.
    `run` is the id of the run or sweep that the command makes.
    """
    asked, each = profile.slurm, profile.resources_per_worker
    per_node = profile.most_workers // asked.nodes
    gpus = whole_gpus(per_node, profile.gpus_per_worker)
    options = {
        "job-name": job,
        "output": folder / f"{job}.out",
        "error": folder / f"{job}.log",
        "open-mode": "append",
        "chdir": here,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "time": asked.time,
        "nodes": asked.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": math.ceil(per_node * (each.CPU or 1)),
        "gpus-per-node": gpus or None,
        "signal": f"B:USR1@{asked.signal_before_s}",
    }
    variables = {"DDPM_PIPE_HOME": str(home)} | ({"DDPM_PIPE_RUN": run} if run else {})
    lines = [
        "#!/bin/bash",
        f"# {shlex.join(['ddpm-pipe', *words])}",
        *(f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None),
        "#SBATCH --requeue",
        *(f"#SBATCH {option}" for option in asked.options),
        "",
        f"export PATH={shlex.quote(str(programs))}:$PATH",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *asked.setup,
        "",
        f"{shlex.join(['ddpm-pipe', *words])} &",
    ]
    end = END.format(max_requeues=asked.max_requeues, exit_file=shlex.quote(str(folder / f"{job}.exit")))
    return "\n".join([*lines, end])
