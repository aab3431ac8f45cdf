#!/bin/sh
# Install MegaBlocks and stk into the environment of a Python:
#
#     scripts/install_megablocks.sh .venv/bin/python                    without compiled operators: any machine
#     scripts/install_megablocks.sh .venv/bin/python --with-operators   what gpu_kernels.sh runs after its checks
#     scripts/install_megablocks.sh .venv/bin/python --carried          a wheel with operators, or fail: nothing is built
#
# Without a network: put megablocks' wheel or source (and stk's) into .whl/ of this repository, or say where they are with
# PIP_FIND_LINKS (and PIP_NO_INDEX=1). A wheel with operators fits one Python and one torch: build it where these are the same.
#
# MegaBlocks 0.10.0 is published as source only, so three things are changed in the source before it is installed:
# its pins (torch<2.7.1, numpy<2.1) would quarrel with what Ray needs; CUDA 13 took the last argument of the two scans
# it calls; and its setup.py would compile operators wherever it finds nvcc.
# --no-build-isolation: pip would otherwise download a second torch and build against that.
# Quick when both are there already. Needs torch, setuptools, wheel and packaging in that environment.
set -eu

PYTHON=${1:?usage: install_megablocks.sh PYTHON [--with-operators]}
OPERATORS=${2:-}
MEGABLOCKS=0.10.0
STK=0.7.1
if [ -z "${PIP_FIND_LINKS:-}" ]; then
    PIP_FIND_LINKS=$(cd "$(dirname "$0")/.." && pwd)/.whl
    [ ! -f "$PIP_FIND_LINKS/megablocks-$MEGABLOCKS.tar.gz" ] || export PIP_FIND_LINKS PIP_NO_INDEX=1
fi

carried() { # the first wheel with operators where pip would look; fails without one
    for folder in $PIP_FIND_LINKS; do
        for wheel in "$folder"/megablocks-"$MEGABLOCKS"-*.whl; do
            case $wheel in *-none-any.whl | *'*'*) ;; *) echo "$wheel" && return ;; esac
        done
    done
    return 1
}

install() { "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation "$@"; }

patch_source() { # the unpacked source
    sed -i.orig -e 's/stream,$/stream));/' -e '/debug_synchronous));/d' "$1/csrc/cumsum.h"
    sed -i.orig -E "s/'(numpy|packaging|torch)>=[^']*'/'\1'/" "$1/setup.py"
    [ "$(grep -c ' stream));' "$1/csrc/cumsum.h")" = 2 ] || { echo "install_megablocks: unknown source" >&2; exit 1; }
    [ "$OPERATORS" ] || sed -i.orig "s/^if 'cu' in torch.__version__.*/if False:/" "$1/setup.py"
}

has() { "$PYTHON" -c "import sys; from importlib.metadata import version; sys.exit(version('$1') != '$2')" 2>/dev/null; }

if [ -z "$OPERATORS" ] && has megablocks "$MEGABLOCKS" && has stanford-stk "$STK"; then
    exit 0
fi
if [ "$OPERATORS" ] && wheel=$(carried); then
    install --no-index --force-reinstall "$wheel"
    has stanford-stk "$STK" || install --no-index --find-links "$PIP_FIND_LINKS" "stanford-stk==$STK"
    exit 0
fi
[ "$OPERATORS" != --carried ] || exit 1
for module in torch setuptools wheel packaging; do
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" || {
        echo "install_megablocks: $PYTHON has no $module; install it first ($PYTHON -m pip install $module)" >&2
        exit 1
    }
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
source=$folder/megablocks-$MEGABLOCKS
# Even the download runs setup.py, which without a GPU stops unless it is told an architecture.
TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" "$PYTHON" -m pip download --quiet --no-deps --no-build-isolation \
    --no-binary megablocks --dest "$folder" "megablocks==$MEGABLOCKS"
tar -xzf "$source.tar.gz" -C "$folder"
patch_source "$source"
install --force-reinstall "$source"
has stanford-stk "$STK" || install "stanford-stk==$STK"
