#!/usr/bin/env bash
# The test suite, in the same .venv as the quickstart. Arguments go to pytest.
#   bash launch/test.sh                  all, two at a time, in about 13 minutes on two cores
#   bash launch/test.sh -m slow          what takes longest, alone or with its like, left out otherwise
#   bash launch/test.sh tests/models     one folder
#   EXTRAS=test,tpu,plan-gpu bash launch/test.sh  also what compiles for TPUs and GPUs; the extras bring their compilers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/venv.sh
make_venv ".[${EXTRAS:-test}]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
