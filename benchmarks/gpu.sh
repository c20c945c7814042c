#!/bin/sh
# Everything that needs a GPU, in one go and offline: tests, self-test, tuning, benchmarks, report into benchmarks/results.
# Uses the packages that PYTHON has (torch and triton; pytest, matplotlib and peft where they are there) and installs none.
#   PYTHON=python3 sh benchmarks/gpu.sh             every step
#   PYTHON=python3 sh benchmarks/gpu.sh tune bench  these steps
#   REQUIRE=1 ...                                   what is missing (nvcc, pytest, a backend) is a failure, not left out
#   BASELINE=FILE.json ... compare                  what became slower than FILE; the first time FILE is made
# A step that fails, or takes more than LIMIT seconds (a kernel may hang), does not stop the others; the exit code is 1
# then, and 2 where nothing can be run at all.

PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "$0")/.." && pwd) || exit 2
RESULTS=${RESULTS:-$ROOT/benchmarks/results}
LIMIT=${LIMIT:-600}
STEPS=${*:-build info selftest tests tune bench report${BASELINE:+ compare}}
cd "$ROOT" || exit 2
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

for name in $STEPS; do
    case $name in
    build | info | selftest | tests | tune | bench | report) ;;
    compare) [ -n "$BASELINE" ] || { echo "gpu.sh: compare needs BASELINE=FILE.json" >&2 && exit 2; } ;;
    *) echo "gpu.sh: no step is called $name" >&2 && exit 2 ;;
    esac
done
if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "gpu.sh: $PYTHON has no torch: set PYTHON to an interpreter that has it" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: PyTorch finds no GPU here: nothing to run" >&2
    exit 2
fi

mkdir -p "$RESULTS" build || exit 2
python() {
    if command -v timeout >/dev/null; then timeout -k 10 "$LIMIT" "$PYTHON" "$@"; else "$PYTHON" "$@"; fi
}
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
lacks() { echo "gpu.sh: there is no $1: $2 left out" >&2 && [ -z "$REQUIRE" ]; }

# The CUDA extension for this GPU, where nvcc is; everything else works without it.
build() {
    command -v nvcc >/dev/null || { lacks nvcc "the cuda backend is" && return || return 1; }
    python csrc/cuda/build.py >build/extension.log 2>&1 || { tail build/extension.log >&2 && return 1; }
}
info() { python -m lora_kernels info; }
selftest() { python -m lora_kernels selftest; }
# One for each core, and for each 6 GiB of the GPU's memory.
PARTS="import os, torch
gib = torch.cuda.get_device_properties(0).total_memory >> 30
print(max(1, min(os.cpu_count() or 1, gib // 6, 12)))"
# In parts at once: most of their time goes into compiling, and an error that the GPU does not recover from ends one part.
tests() {
    rm -f build/tests-*.log
    has pytest || { lacks pytest "the tests are" && return || return 1; }
    parts=$(python -c "$PARTS") || return 1
    running= part=0
    while [ $((part += 1)) -le "$parts" ]; do
        python -m pytest tests/gpu -q --part $part/$parts ${REQUIRE:+--require triton,cuda} >"build/tests-$part.log" 2>&1 &
        running="$running $!"
    done
    wrong=0
    for process in $running; do wait "$process" || wrong=1; done
    tail -n 40 build/tests-*.log
    return $wrong
}
tune() { python -m lora_kernels tune --output "$RESULTS/tuned.json"; }
bench() { python -m lora_kernels bench --device cuda --preset gpu --seconds 0.4 --output "$RESULTS"; }
# A run that ends early leaves no baseline.
compare() {
    if [ -f "$BASELINE" ]; then
        python -m lora_kernels bench --compare "$BASELINE" --fail-over 1.10
        return
    fi
    mkdir -p "$(dirname "$BASELINE")"
    python -m lora_kernels bench --device cuda --preset gpu --seconds 0.4 --suite linear --output "$BASELINE.part.json" &&
        mv "$BASELINE.part.json" "$BASELINE" && echo "gpu.sh: $BASELINE is made: there was none to compare with" >&2
}
report() {
    plots=--no-plots
    has matplotlib && plots=
    python -m lora_kernels report "$RESULTS" $plots
}

failed=
for name in $STEPS; do
    echo "== $name" >&2
    "$name" || failed="$failed $name"
done
if [ -n "$failed" ]; then
    echo "gpu.sh: failed:$failed" >&2
    exit 1
fi
echo "gpu.sh: done, see $RESULTS/report.md" >&2
