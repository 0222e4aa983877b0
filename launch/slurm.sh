#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one task per GPU. Submit from the repository, which all nodes must see at the same path;
# what sbatch is told on the command line wins over the lines below.
#   sbatch --nodes=4 --exclusive launch/slurm.sh --config configs/imagenet256_deco_xl.py --workdir runs/xl \
#     --config.mesh.preset=hybrid
# CPUs are not among them: --exclusive takes whole nodes with all they have; on part of a node, --cpus-per-task=12, say.
# Environment: PROFILE_AT, COMPILATION_CACHE, DECO (see common.sh), and
#   RESTARTS=3   how often a crashed run is started again within one allocation
# Ends of a run:
#   time limit, preemption   saved, and the same job goes back into the queue; so does `scancel --batch --signal=TERM JOB`
#   lost node                SLURM requeues the job by itself; it resumes from the last checkpoint
#   scancel JOB              saved, if that takes less than SLURM's KillWait (30 s); does not come back
#   finished, or bad input   does not come back
#SBATCH --job-name=deco
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@600
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# GPUs are given to nodes, not to tasks: a task that sees only its own cannot reach the others over NVLink.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" # sbatch runs a copy of this file that lies elsewhere
if [[ ! -f launch/common.sh ]]; then
  echo "slurm.sh: $PWD is not the repository; submit from there." >&2
  exit 2
fi

source launch/common.sh
gpu_flags
train_command "$@"
# srun has not taken this over from sbatch since SLURM 22.05. Without it, each task gets its share of the job's CPUs.
tasks=${SLURM_NTASKS_PER_NODE:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-$tasks} / tasks))}
if ((SRUN_CPUS_PER_TASK < 4)); then
  echo "slurm.sh: $SRUN_CPUS_PER_TASK CPU(s) for each task starve its data workers; see --exclusive and --cpus-per-task." >&2
fi

pass_on() { scancel --signal=TERM --quiet "$SLURM_JOB_ID"; } # to all tasks; SIGTERM to srun would kill them

# Not after `scancel JOB`: the job's state is another one then.
requeue() {
  if [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
    echo "slurm.sh: told to stop before the end; back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

for ((left = ${RESTARTS:-3}; ; left--)); do
  code=0
  # When one task has ended the others get time to notice and to end by themselves: killed, they would hide a 2.
  run srun --kill-on-bad-exit=0 --wait=150 "${command[@]}" || code=$?
  if [[ -n $stopped ]] && { [[ $code == 0 ]] || ! is_final "$code"; }; then
    requeue
    exit "$code"
  fi
  if is_final "$code" || ((left == 0)); then exit "$code"; fi
  echo "slurm.sh: exit code $code; starts again from the last checkpoint." >&2
done
