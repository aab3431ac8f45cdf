#!/usr/bin/env bash
# Make the virtual environment: pinned versions, torch first (exactly, so that a small CPU build is taken where there is
# one), MegaBlocks last and without its own pins. Usage: PYTHON=python3 scripts/setup.sh .venv
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Trinity needs Python 3.11 or newer; $("$python" --version) is too old. Try: make setup PYTHON=python3.12" >&2
  exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check) # compiled below, by all cores

echo "setting up $venv (a few minutes the first time)"
torch=$(grep '^torch==' constraints.txt)
"${pip[@]}" "$torch"
"${pip[@]}" -c constraints.txt setuptools wheel packaging
# The part in C++ comes with the package, where it can be built (setup.py).
if command -v "${CXX:-c++}" >/dev/null && ! command -v cmake >/dev/null; then
  "${pip[@]}" -c constraints.txt cmake
fi
"${pip[@]}" -c constraints.txt --no-build-isolation -e '.[dev]'
scripts/install_megablocks.sh "$venv/bin/python"

# What a package keeps for its own tests, and transformers' hundreds of models, are compiled when somebody needs them.
"$venv/bin/python" -m compileall -q -j 0 -x '/(tests?|testing/_internal|transformers/models)/' "$venv"/lib/python*/site-packages || true
