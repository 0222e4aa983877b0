#!/usr/bin/env bash
# From a fresh machine to digits drawn by your own DeCo: installs the CPU core into .venv, trains, samples, measures, and
# writes a page about it. Needs bash and Python ≥ 3.11. Run again, it resumes, or says that it is done.
#   bash launch/quickstart.sh [WORKDIR]        (default: runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS

source launch/venv.sh
make_venv ".[eval]"
echo "Installed into .venv after $((SECONDS - started)) s."

workdir=${1:-runs/quickstart}
.venv/bin/deco train --config configs/quickstart.py --workdir "$workdir"
.venv/bin/python benchmarks/digits.py "$workdir"
.venv/bin/deco report "$workdir"
echo "Total: $((SECONDS - started)) s."
