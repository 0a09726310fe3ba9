#!/usr/bin/env bash
# Set up the virtual environment DIR with jaxllm and its dependencies; does nothing if it is up to date.
#
#   tools/environment.sh DIR [EXTRA]     run in the repository; PYTHON=python3.12 chooses the interpreter
#
# Uses uv if it is on PATH, else venv and pip. The stamp is written last, so an interrupted installation is taken up again.
set -euo pipefail

venv=$1 extra=${2:-}
core_stamp=$venv/jaxllm-core.stamp
stamp=$venv/jaxllm-${extra:-core}.stamp
state="$(pwd) $(cksum <pyproject.toml)" # an editable installation knows its directory: moved means install again

fail() {
  echo "error: $*" >&2
  exit 1
}

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local python
  if [ -n "${PYTHON:-}" ]; then
    version "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON does not run"
    recent "$PYTHON" || fail "PYTHON=$PYTHON is Python $(version "$PYTHON"); jaxllm needs 3.11 or newer"
    echo "$PYTHON"
    return
  fi
  for python in python3 python3.13 python3.12 python3.11; do
    if recent "$python"; then
      echo "$python"
      return
    fi
  done
  if command -v uv >/dev/null; then
    echo ">=3.11" # uv looks further, and can download one
    return
  fi
  fail "jaxllm needs Python 3.11 or newer, python3 is $(version python3 || echo 'not there');" \
    "name one: make PYTHON=/path/to/python3.12"
}

create() {
  local python
  python=$(find_python)
  echo "creating $venv with $python"
  if command -v uv >/dev/null; then
    uv venv --quiet --python "$python" "$venv"
  else
    "$python" -m venv "$venv" || fail "$python -m venv failed; install python3-venv (Debian), or uv"
  fi
}

install() {
  local target=.${extra:+[$extra]}
  echo "installing jaxllm$([ -z "$extra" ] || echo " with [$extra]") into $venv (about 1 GB; takes minutes the first time)"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" --editable "$target"
    return
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # uv makes environments without pip
    "$venv/bin/python" -m ensurepip >/dev/null || fail "$venv has no pip; put uv on PATH, or run: make clean"
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target"
}

if [ -e "$venv" ] && ! "$venv/bin/python" -c '' 2>/dev/null; then
  [ -f "$venv/pyvenv.cfg" ] || fail "$venv exists and is not a virtual environment; move it away"
  echo "the Python of $venv is gone: making it anew"
  rm -rf "$venv"
fi
if [ -e "$venv" ]; then
  recent "$venv/bin/python" || fail "$venv is Python $(version "$venv/bin/python"); jaxllm needs 3.11: run make clean"
  if [ -n "${PYTHON:-}" ]; then
    asked=$(version "$(find_python)") || exit 1
    found=$(version "$venv/bin/python")
    [ "$asked" = "$found" ] || fail "$venv is Python $found, PYTHON=$PYTHON is $asked: run make clean first"
  fi
  [ "$(cat "$stamp" 2>/dev/null)" != "$state" ] || exit 0
else
  create
fi
rm -f "$stamp"
install
echo "$state" >"$stamp"
echo "$state" >"$core_stamp"
