#!/bin/bash
# ddpm-pipe train --preset ddpm-cifar10 --cluster 'my slurm.yaml'
#SBATCH --job-name=ddpm-k7m2abcd
#SBATCH --output=/home/me/ddpm/runs/k7m2abcd/ddpm-k7m2abcd.out
#SBATCH --error=/home/me/ddpm/runs/k7m2abcd/ddpm-k7m2abcd.log
#SBATCH --open-mode=append
#SBATCH --chdir=/home/me/ddpm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

export PATH=/home/me/.venv/bin:$PATH
export DDPM_PIPE_HOME=/home/me/ddpm
export DDPM_PIPE_RUN=k7m2abcd

ddpm-pipe train --preset ddpm-cifar10 --cluster 'my slurm.yaml' &
command=$!
stopped=
trap 'kill -USR1 $command' USR1 TERM
trap 'stopped=yes; kill -USR1 $command' USR2 # by `ddpm-pipe jobs stop`
while kill -0 $command 2> /dev/null; do wait $command; done
wait $command
code=$?

# 75: it was stopped, and its state is saved
requeues=$((${SLURM_RESTART_COUNT:-0} + ${DDPM_PIPE_REQUEUES:-0}))
case $(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T) in COMPLETING | CANCELLED) stopped=yes ;; esac
if [ $code = 75 ] && [ -z "$stopped" ] && [ $requeues -ge 20 ]; then
  echo "ddpm-pipe: not requeued: got $requeues requeues, expected at most 20. Raise slurm.max_requeues, and resume." >&2
elif [ $code = 75 ] && [ -z "$stopped" ]; then
  export DDPM_PIPE_REQUEUES=$((requeues + 1))
  for pause in 1 2 5 10 20 40; do
    scontrol requeue $SLURM_JOB_ID && exit
    # where requeueing is not allowed
    env --unset=SLURM_RESTART_COUNT sbatch --dependency=afterany:$SLURM_JOB_ID "$0" && exit $code
    sleep $pause # while the controller is away
  done
fi
echo $code > /home/me/ddpm/runs/k7m2abcd/ddpm-k7m2abcd.exit
exit $code
