# Sourced by the launch scripts: make_venv SPEC makes .venv if it is not there and installs SPEC into it.
make_venv() {
  local python=
  if [[ ! -x .venv/bin/python ]]; then
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
      fi
    done
    if [[ -z $python ]]; then
      echo "No Python of version 3.11 or newer here; set PYTHON to one." >&2
      exit 1
    fi
    "$python" -m venv .venv
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$1"
}
