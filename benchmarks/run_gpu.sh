#!/usr/bin/env bash
# How fast is everything here on this machine's GPU, beside PyTorch? All benchmarks of speed, in under 10 minutes on one
# H100; tables on the screen, figures as JSON and logs in a folder.
#
#   benchmarks/run_gpu.sh [FOLDER]        FOLDER: the checkout's runs/speed unless given
#   PYTHON=.venv/bin/python SIZE=l BATCH=32 BUDGET=1200 benchmarks/run_gpu.sh        BUDGET: seconds for all
#
# Needs no installation: it runs in a bare checkout with the machine's own python, if that has the packages that
# benchmarks/speed.py names where one is missing.
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
folder=$(realpath -m "${1:-$root/runs/speed}")
cd "$root" || exit 1
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3} size=${SIZE:-xl} batch=${BATCH:-64}
mkdir -p "$folder"

"$python" - <<'PYTHON' || exit 1
import importlib.util
import sys

needed = "jax flax optax absl etils numpy PIL psutil chex msgpack yaml ml_collections array_record".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)}. pip install ml_collections array_record 'jax[cuda13]' flax optax")
if importlib.util.find_spec("torch") is None:
    print("torch is missing: only our side will be timed.")
import jax

if jax.default_backend() != "gpu":
    sys.exit(f"JAX sees no GPU here, but {jax.devices()}.")
PYTHON

failed=()
run() { # name of the benchmark, its options
  local name=$1 began=$SECONDS left=$((${BUDGET:-590} - SECONDS))
  shift
  echo "=== $name $*"
  if [ $left -gt 0 ] && timeout $left "$python" "benchmarks/$name.py" --json "$folder/$name.json" "$@" 2>"$folder/$name.err" |
    tee "$folder/$name.txt"; then
    echo "--- $name took $((SECONDS - began)) s"
  else
    failed+=("$name")
    echo "--- $name FAILED after $((SECONDS - began)) s:"
    tail -n 5 "$folder/$name.err"
  fi
}
run train_step --size "$size" --batch "$batch" --rounds 5 --steps 8
run sampling --size "$size" --cases 1x50 1x100 32x50
run attention --size "$size" --batch "$batch"
run pixel_decoder --size "$size" --batch "$batch"
run frequency_loss --size "$size" --batch "$batch" --step "$folder/train_step.json"

echo "=== all tables, after $SECONDS s"
for name in train_step sampling attention pixel_decoder frequency_loss; do
  grep -hE '^(Training|Sampling|Attention|Pixel|Frequency|date|\||.* ÷ |most|JAX|share|first step|PyTorch.*off by|.*SAME)' "$folder/$name.txt" 2>/dev/null
  echo
done
[ ${#failed[@]} -eq 0 ] || echo "FAILED: ${failed[*]}"
exit ${#failed[@]}
