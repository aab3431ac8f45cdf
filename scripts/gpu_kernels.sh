#!/bin/sh
# Build MegaBlocks' compiled operators for the CUDA torch of a Python, and install them there (`make gpu-kernels`):
#
#     scripts/gpu_kernels.sh .venv/bin/python
#
# A wheel that is carried (install_megablocks.sh says where) is taken as it is. Else they are built, which needs no GPU:
# TORCH_CUDA_ARCH_LIST says what to build for (default: the GPU that is visible, else 9.0, Hopper).
# A few minutes of one core; nothing to do the second time. Repeat after every change of torch.
set -eu

PYTHON=${1:?usage: gpu_kernels.sh PYTHON}
HERE=$(dirname "$0")

ask() { "$PYTHON" -c "$1" 2>/dev/null; }

find_cuda() { # the usual toolkit, else the one around the nvcc on the path
    nvcc=/usr/local/cuda/bin/nvcc
    [ -x "$nvcc" ] || nvcc=$(command -v nvcc) || nvcc=/usr/local/cuda/bin/nvcc
    dirname "$(dirname "$(readlink -f "$nvcc")")"
}

missing() { # one line for each thing that is not there
    versions=$(ask 'import torch; print(torch.__version__, torch.version.cuda or "")') || { echo "torch, built for CUDA"; return; }
    cuda=${versions#* }
    if [ -z "$cuda" ]; then
        echo "a CUDA build of torch: this one is ${versions% }"
    elif [ ! -x "$CUDA_HOME/bin/nvcc" ]; then
        echo "the compiler of CUDA ${cuda%%.*}: no nvcc in $CUDA_HOME/bin; install the toolkit or set CUDA_HOME"
    elif ! "$CUDA_HOME/bin/nvcc" --version | grep -q "release ${cuda%%.*}\."; then
        echo "the compiler of CUDA ${cuda%%.*}, as torch: $CUDA_HOME is another version; set CUDA_HOME"
    fi
    command -v c++ >/dev/null || echo "a C++ compiler: install g++"
    command -v ninja >/dev/null || ask 'import ninja' || echo "ninja: $PYTHON -m pip install ninja"
    for module in setuptools wheel packaging triton; do
        ask "import $module" || echo "$module: $PYTHON -m pip install $module"
    done
}

loads() { ask 'import importlib.util as i, sys; i.find_spec("megablocks_ops") or sys.exit(1); import torch, megablocks_ops'; }

if loads; then
    echo "gpu_kernels: MegaBlocks' operators are there and load; nothing to do"
    exit 0
fi
if "$HERE/install_megablocks.sh" "$PYTHON" --carried && loads; then
    echo "gpu_kernels: MegaBlocks' operators came as a wheel and load"
    exit 0
fi
CUDA_HOME=${CUDA_HOME:-$(find_cuda)}
export CUDA_HOME
lacking=$(missing)
if [ "$lacking" ]; then
    echo "gpu_kernels: cannot build MegaBlocks' operators; missing:" >&2
    echo "$lacking" | sed 's/^/  - /' >&2
    echo "Install that and run \`make gpu-kernels\` again. Until then the experts run on backend torch." >&2
    exit 1
fi
if ! ask 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}"
fi
MAX_JOBS=1 "$HERE/install_megablocks.sh" "$PYTHON" --with-operators # it is one source file
"$PYTHON" -c 'import torch, megablocks_ops'
echo "gpu_kernels: MegaBlocks is installed with its operators"
