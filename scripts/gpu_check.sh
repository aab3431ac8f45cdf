#!/bin/sh
# Check all that needs a GPU, on a machine with one, in nine minutes at most, without a network and without Ray:
#
#     scripts/gpu_check.sh FOLDER             every stage
#     scripts/gpu_check.sh FOLDER --short     only: do the tests of the GPU pass, and how fast are the experts
#
# FOLDER gets results.jsonl (a line for each thing found, and one for the end of each stage), log.txt and summary.txt.
# A stage has its own time and takes no other with it. docs/gpu.md says what to look for.
#
# PYTHON             the Python that has torch (python3); wheels in .whl/ are installed into it first
# GPU_CHECK_DEVICE   cuda; cpu: a rehearsal with small sizes, where every stage runs as far as a CPU can
# GPU_CHECK_STAGES   names of the stages to run, separated by spaces
set -u
FOLDER=${1:?usage: gpu_check.sh FOLDER [--short]}
PYTHON=${PYTHON:-python3}
DEVICE=${GPU_CHECK_DEVICE:-cuda}
mkdir -p "$FOLDER" && FOLDER=$(cd "$FOLDER" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
RESULTS=$FOLDER/results.jsonl LOG=$FOLDER/log.txt
: >"$RESULTS" && : >"$LOG" || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}" # threads that wait sleep soon: on few cores they would starve the others
[ "${2:-}" != --short ] || GPU_CHECK_STAGES="install machine ceilings backends shared-buffer large mini"

now_ms() { echo $(($(date +%s%N) / 1000000)); }

stage() { # name, seconds it may take, command: its output goes to the log, its end to the results
    name=$1 limit=$2 && shift 2
    [ "$DEVICE" = cuda ] || limit=$((limit * 5)) # a rehearsal is in no hurry, and its machine may have other work
    case " ${GPU_CHECK_STAGES:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    echo "== $name" >>"$LOG"
    start=$(now_ms) rc=0
    timeout -k 2 "$limit" "$@" >>"$LOG" 2>&1 || rc=$?
    took=$(($(now_ms) - start))
    printf '{"stage": "%s", "rc": %d, "seconds": %d.%03d, "limit_s": %d}\n' \
        "$name" "$rc" $((took / 1000)) $((took % 1000)) "$limit" >>"$RESULTS"
}

python_stage() { # name, seconds, module of gpu_stages, arguments
    name=$1 limit=$2 module=$3 && shift 3
    stage "$name" "$limit" "$PYTHON" scripts/gpu_stages "$module" --name "$name" --device "$DEVICE" --results "$RESULTS" "$@"
}

set -- .whl/*.whl
[ ! -e "$1" ] || stage install 12 "$PYTHON" -m pip install --no-index --no-deps --no-compile --upgrade "$@"
python_stage machine 10 machine
python_stage ceilings 15 ceilings
python_stage backends 60 suite tests/gpu/test_cuda.py
python_stage shared-buffer 70 suite tests/gpu/test_shared_buffer_cuda.py
python_stage shard 25 shard
python_stage trainer 45 trainer
python_stage engine 55 engine
python_stage syncs 55 syncs
python_stage large 60 bench large
python_stage mini 60 bench mini
python_stage hop 60 hop
python_stage summary 10 summary
sed -n '/^== summary/,$p' "$LOG" | tee "$FOLDER/summary.txt"
