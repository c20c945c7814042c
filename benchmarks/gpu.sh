#!/bin/sh
# Everything that needs a GPU, in one go and offline: tests, self-test, tuning, benchmarks, report into benchmarks/results.
# Uses the packages that PYTHON has (torch and triton; pytest, matplotlib and peft where they are there) and installs none.
#   PYTHON=python3 sh benchmarks/gpu.sh
# A step that fails does not stop the others; the exit code is 1 then, and 2 where nothing can be run at all.

PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "$0")/.." && pwd) || exit 2
RESULTS=${RESULTS:-$ROOT/benchmarks/results}
cd "$ROOT" || exit 2
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "gpu.sh: $PYTHON has no torch: set PYTHON to an interpreter that has it" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: PyTorch finds no GPU here: nothing to run" >&2
    exit 2
fi

mkdir -p "$RESULTS" build || exit 2
failed=
step() {
    name=$1
    shift
    echo "== $name: $*" >&2
    "$@" || failed="$failed $name"
}
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

# The C++ and CUDA extensions, where compilers are; everything else works without them.
if has setuptools && has ninja; then
    "$PYTHON" setup.py --quiet build_ext --inplace >build/extensions.log 2>&1 ||
        echo "gpu.sh: extensions are not built, see build/extensions.log" >&2
fi
step info "$PYTHON" -m lora_kernels info
step selftest "$PYTHON" -m lora_kernels selftest
if ! has pytest; then
    echo "gpu.sh: tests are left out: $PYTHON has no pytest" >&2
elif [ -d tests/gpu ]; then
    step tests "$PYTHON" -m pytest tests/gpu -q
fi
step tune "$PYTHON" -m lora_kernels tune --output "$RESULTS/tuned.json"
step bench "$PYTHON" -m lora_kernels bench --device cuda --preset gpu --output "$RESULTS"
if has matplotlib; then
    step report "$PYTHON" -m lora_kernels report "$RESULTS"
else
    step report "$PYTHON" -m lora_kernels report "$RESULTS" --no-plots
fi

if [ -n "$failed" ]; then
    echo "gpu.sh: failed:$failed" >&2
    exit 1
fi
echo "gpu.sh: done, see $RESULTS/report.md" >&2
