#!/usr/bin/env bash
# Writes the descriptors that later .proto files must stay compatible with: once for each release, when it is made.
# tests/serve/test_protos.py compares them. Usage: PYTHON=.venv/bin/python scripts/freeze_protos.sh [FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-tests/serve/protos_of_release.binpb}"
"${PYTHON:-python3}" -m grpc_tools.protoc -I. --descriptor_set_out="$out" protos/trinity/v1/*.proto
