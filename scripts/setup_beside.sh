#!/usr/bin/env bash
# Make an environment for other people's programs that sees the packages of the project's own, so that torch is not there twice.
# Usage: scripts/setup_beside.sh .venv/bin/python .venv-trl PACKAGE ...
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
venv=$2
shift 2

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
below=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
here=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$below" > "$here/project.pth"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
