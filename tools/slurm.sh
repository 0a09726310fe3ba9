#!/bin/bash
# A run of jaxllm over whole GPU nodes under Slurm: sbatch --nodes=N tools/slurm.sh RECIPE.yaml platform.distributed=true ...
# Five minutes before the end of the allotted time the run saves and ends, and this job queues itself again.
#SBATCH --job-name=jaxllm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxllm-%j.log
#SBATCH --signal=TERM@300
set -uo pipefail
# If one process is lost, the others see it, say which, and end (75): Slurm would end them before they could.
srun --kill-on-bad-exit=0 python -m jaxllm.train "$@"
status=$?
# srun has the highest status of all processes. 143 = 128 + SIGTERM: saved, not finished. A process that was killed or
# crashed (134, 137, 139), which the others say with 75: the run goes on at the last checkpoint, twenty times at most.
case "$status" in
  143) scontrol requeue "$SLURM_JOB_ID" ;;
  75 | 134 | 137 | 139) [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$status"
