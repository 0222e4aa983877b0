#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU. Asks for one (spot, as a queued resource) or takes the one of that name, copies the
# commit that is checked out here to every host, installs it, and runs. A TPU that was preempted is replaced, a crashed run
# is started again, and both go on from the last checkpoint: the workdir is in a bucket.
#   TPU=xl ZONE=europe-west4-a TYPE=v6e-64 bash launch/tpu_pod.sh --config configs/imagenet256_deco_xl.py \
#     --workdir gs://my-bucket/xl --config.data.path=gs://my-bucket/tensorflow_datasets --config.mesh.preset=fsdp
# It must stay running to notice a preemption: start it in tmux on a small VM that is logged in to gcloud. Ctrl-C or SIGTERM
# saves and ends the run. In the end the TPU is still there, and is still paid for, until
#   gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force
# Environment: PROFILE_AT, COMPILATION_CACHE (see common.sh), and
#   TPU, ZONE, TYPE           its name, zone and accelerator type (v6e-64 has 64 chips; v5p-64 and tpu7x-64 have 32)
#   PROJECT                   where it is made (default: gcloud's)
#   NETWORK, SUBNETWORK       it is in (default: the project's "default")
#   SERVICE_ACCOUNT           it acts as, and that may write to the bucket (default: Compute Engine's)
#   RUNTIME                   version of the TPU VM's image (default: by TYPE)
#   CAPACITY=--spot           or --reserved, or "" for on demand
#   RESTARTS=10               crashes in a row before it gives up; a run of an hour begins a new row
#   REPLACEMENTS=100          TPUs it asks for after the first one
#   PAUSE=30                  seconds between looks at the TPU's state, and before a restart
#   VERSIONS=FILE             of the packages, so that a replaced TPU gets what the first one got; written by the first install
#                             (default: runs/$TPU.versions.txt). Remove it when requirements.txt asks for others
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${TPU:?is the name of the TPU}" "${ZONE:?is the zone}" "${TYPE:?is its type, as v6e-64}"
if [[ -n ${PROJECT:-} ]]; then export CLOUDSDK_CORE_PROJECT=$PROJECT; fi # of all calls of gcloud
case $TYPE in
  tpu7x*) runtime=v2-alpha-tpu7-ubuntu2404 ;;
  v6e*) runtime=v2-alpha-tpuv6e ;;
  v5p*) runtime=v2-alpha-tpuv5 ;;
  v5litepod*) runtime=v2-alpha-tpuv5-lite ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
pause=${PAUSE:-30}
versions=${VERSIONS:-runs/$TPU.versions.txt}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

source launch/common.sh

queued() { gcloud compute tpus queued-resources "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
node() { gcloud compute tpus tpu-vm "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
on_all_hosts() { node ssh --worker=all --command="$1"; }

# state queued|node: NONE if there is none, UNKNOWN if gcloud cannot say, which is no reason to delete or create anything.
state() {
  local format='value(state)'
  if [[ $1 == queued ]]; then format='value(state.state)'; fi
  if ! "$1" describe --format="$format" 2>"$scratch/error"; then
    if grep -q NOT_FOUND "$scratch/error"; then echo NONE; else echo UNKNOWN; fi
  fi
}
ready() { [[ $(state queued) == ACTIVE && $(state node) == READY ]]; }
lost() { [[ $(state queued) =~ ^(NONE|SUSPENDING|SUSPENDED|DELETING|FAILED)$ || $(state node) =~ ^(NONE|PREEMPTED|TERMINATED)$ ]]; }

asked=0
get_tpu() { # returns when there is one; it may wait in the queue for days
  local request
  until ready; do
    request=$(state queued)
    echo "tpu_pod.sh: the request for $TPU is $request."
    if [[ $request == NONE ]]; then
      if ((asked > ${REPLACEMENTS:-100})); then
        echo "tpu_pod.sh: has asked for $asked TPUs; giving up." >&2
        exit 1
      fi
      asked=$((asked + 1))
      local options=(--node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-$runtime}")
      if [[ -n ${NETWORK:-} ]]; then options+=(--network="$NETWORK"); fi
      if [[ -n ${SUBNETWORK:-} ]]; then options+=(--subnetwork="$SUBNETWORK"); fi
      if [[ -n ${SERVICE_ACCOUNT:-} ]]; then
        options+=(--service-account="$SERVICE_ACCOUNT" --scopes=https://www.googleapis.com/auth/cloud-platform)
      fi
      # shellcheck disable=SC2086 # CAPACITY may be empty
      queued create "${options[@]}" ${CAPACITY---spot}
    elif [[ $request =~ ^(ACTIVE|SUSPENDED|FAILED)$ ]] && lost; then
      queued delete --force --quiet
    fi
    sleep "$pause"
  done
}

# Once on every host; again, it changes nothing. What an earlier call has left running is ended first: it holds the chips.
read -r -d '' prepare <<EOF || true
set -e
if pkill -TERM -x deco; then timeout 300 bash -c 'while pgrep -x deco; do sleep 1; done' >/dev/null || pkill -KILL -x deco; fi
mkdir -p deco_jax && tar -xzf deco_jax.tar.gz -C deco_jax && cd deco_jax
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv # the image's Python is too old, or not ours to fill
~/.local/bin/uv python install --quiet 3.12
if [[ -s ../versions.txt ]]; then export PIP_CONSTRAINT=\$(realpath ../versions.txt); fi
PYTHON=\$(~/.local/bin/uv python find 3.12) bash -c 'source launch/venv.sh && make_venv ".[tpu,gcs,t2i]"'
EOF

start="cd deco_jax && env"
for name in PROFILE_AT COMPILATION_CACHE LIBTPU_INIT_ARGS; do
  if [[ -v $name ]]; then start+=" $(printf '%q' "$name=${!name}")"; fi
done
start+=" bash launch/host.sh tpu$(printf ' %q' "$@")"

git archive --format=tar.gz --output="$scratch/deco_jax.tar.gz" HEAD
to_all_hosts() { gcloud compute tpus tpu-vm scp "$1" "$TPU:$2" --zone="$ZONE" --worker=all; }
prepare_hosts() {
  if [[ -s $versions ]]; then to_all_hosts "$versions" versions.txt || return; else on_all_hosts "rm -f versions.txt" || return; fi
  to_all_hosts "$scratch/deco_jax.tar.gz" "" && on_all_hosts "$prepare" || return
  if [[ ! -s $versions ]]; then
    node ssh --worker=0 --command="deco_jax/.venv/bin/python -m pip freeze --exclude-editable" >"$scratch/versions" || return
    mkdir -p "$(dirname "$versions")" && mv "$scratch/versions" "$versions"
  fi
}
pass_on() { on_all_hosts 'pkill -TERM -x deco' || true; } # the run then saves and ends by itself

crashes=0
while :; do
  get_tpu
  started=$SECONDS code=0
  if prepare_hosts; then run on_all_hosts "$start" || code=$?; else code=1; fi
  if is_final "$code" || [[ -n ${stopped:-} ]]; then exit "$code"; fi
  if lost; then
    echo "tpu_pod.sh: $TPU was preempted; another one goes on from the last checkpoint." >&2
    continue
  fi
  if ((SECONDS - started > 3600)); then crashes=0; fi
  crashes=$((crashes + 1))
  if ((crashes > ${RESTARTS:-10})); then
    echo "tpu_pod.sh: exit code $code, crash $crashes in a row; giving up." >&2
    exit "$code"
  fi
  echo "tpu_pod.sh: exit code $code; starts again from the last checkpoint in $pause s." >&2
  sleep "$pause"
done
