#!/usr/bin/env bash
# Trains on the GPUs of one machine, one process for all of them. After a crash it starts again and goes on from the last
# checkpoint; SIGTERM or Ctrl-C saves and ends it, and the same command resumes. Paths are as seen from the repository.
#   bash launch/gpu_node.sh --config configs/imagenet256_deco_xl.py --workdir runs/xl --config.mesh.preset=fsdp
# Environment: PROFILE_AT, COMPILATION_CACHE, DECO (see common.sh), and
#   RESTARTS=10   crashes in a row before it gives up; a run of an hour begins a new row
#   PAUSE=10      seconds before it starts again
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/common.sh
gpu_flags
train_command "$@"

crashes=0
while :; do
  started=$SECONDS code=0
  run "${command[@]}" || code=$?
  if is_final "$code" || [[ -n $stopped ]]; then exit "$code"; fi
  if ((SECONDS - started > 3600)); then crashes=0; fi
  crashes=$((crashes + 1))
  if ((crashes > ${RESTARTS:-10})); then
    echo "gpu_node.sh: exit code $code, crash $crashes in a row; giving up." >&2
    exit "$code"
  fi
  echo "gpu_node.sh: exit code $code; starts again from the last checkpoint in ${PAUSE:-10} s." >&2
  run sleep "${PAUSE:-10}" || exit "$code"
done
