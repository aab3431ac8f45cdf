#!/usr/bin/env bash
# Writes protos/trinity/v1/*_pb2.py, *.pyi and *_pb2_grpc.py from the .proto files; with a folder as argument, there.
# The output is checked in, and tests/serve/test_protos.py compares it with a fresh run.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-.}"
"${PYTHON:-python3}" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/trinity/v1/*.proto
