#!/usr/bin/env bash
# Build trinity/_native.abi3.so, the part of Trinity in C++ (native/). Without a compiler, CMake or Python's headers: one line
# that says so, and no error; everything then runs without it. A file of ours that does not compile is an error.
# Usage: PYTHON=.venv/bin/python scripts/build_native.sh [FOLDER]      FOLDER: where the extension goes (trinity)
#        SANITIZE=address,undefined scripts/build_native.sh FOLDER     the programs of native/tests instead of it
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(mkdir -p "${1:-trinity}" && cd "${1:-trinity}" && pwd)
build=build/native${SANITIZE:+-${SANITIZE//,/-}}
mkdir -p build

without() {
  echo "no native kernels: $1. Trinity runs without them, slower; then run scripts/build_native.sh" >&2
  exit 0
}
command -v "${CXX:-c++}" >/dev/null || without "there is no C++ compiler (${CXX:-c++}), as in g++ or clang"
command -v make >/dev/null || command -v ninja >/dev/null || without "there is no make"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ -f "$include/Python.h" ] || without "$include has no Python.h, which is in python3-dev"
cmake=$(command -v cmake || command -v "$(dirname "$(command -v "$python")")/cmake") || without "there is no cmake (pip install cmake)"

"$cmake" -S native -B "$build" -DPYTHON_INCLUDE="$include" -DOUTPUT="$out" -DSANITIZE="${SANITIZE:-}" >"$build.log" 2>&1 ||
  { cat "$build.log" >&2; exit 1; }
"$cmake" --build "$build" --parallel "$(getconf _NPROCESSORS_ONLN)" >>"$build.log" 2>&1 || { cat "$build.log" >&2; exit 1; }
