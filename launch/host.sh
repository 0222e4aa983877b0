#!/usr/bin/env bash
# One host's process of a run on several: what tpu_pod.sh starts on every host and what a pod on GKE runs.
#   bash launch/host.sh tpu|gpu --config FILE --workdir DIR …
# Environment: PROFILE_AT, COMPILATION_CACHE, DECO (see common.sh).
# Exit codes are those of `deco train`, but 75 (try again) where this host was told to stop: all is saved, and the machine is
# being taken away, so the run is not finished. The other hosts end with 0 then; who restarts the run looks for the 75.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/common.sh
case "${1:-}" in
  tpu) tpu_flags ;;
  gpu) gpu_flags ;;
  *)
    echo "usage: launch/host.sh tpu|gpu --config FILE --workdir DIR …" >&2
    exit 2
    ;;
esac
train_command "${@:2}"

code=0
run "${command[@]}" || code=$?
if [[ $code == 0 && -n $stopped ]]; then code=75; fi
exit "$code"
