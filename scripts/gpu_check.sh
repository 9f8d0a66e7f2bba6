#!/usr/bin/env bash
# Everything this repository can check on a machine with an NVIDIA GPU, in one command; writes
# docs/gpu-results.md. Run it in an environment where loraserve is installed with its dev dependencies.
#
#   scripts/gpu_check.sh            PYTHON=/path/to/python to choose the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=docs/gpu-results.md

has_gpu='import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no NVIDIA GPU here")'
if ! reason=$("$python" -c "$has_gpu" 2>&1); then
    echo "gpu_check: nothing was checked: $(tail -n 1 <<<"$reason")" >&2
    exit 1
fi

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
status=0
# An emulator or another NVRTC that the environment names would answer for the GPU.
unset LORASERVE_TEST_CUDA_EMULATOR LORASERVE_TEST_NVRTC

echo "tests on the GPU"
"$python" -m pytest tests/gpu -rs 2>&1 | tee "$logs/tests" || status=1
# All skipped: NVRTC is missing, for instance.
grep -q "[0-9] passed" "$logs/tests" || status=1

echo "machine code"
"$python" scripts/check_sass.py >"$logs/sass" 2>&1 && sass=0 || sass=$?
cat "$logs/sass"
[ "$sass" -ne 1 ] || status=1 # 2: there is no nvcc here

echo "kernels"
"$python" benches/bench_gpu_kernels.py --markdown "$logs/kernels" || status=1

{
    echo "# Results on a GPU"
    echo
    commit=$(git rev-parse --short HEAD 2>/dev/null || echo "an unknown commit")
    echo "Written by \`scripts/gpu_check.sh\` on $(date -u +%Y-%m-%d) at $commit."
    echo
    echo "## Tests"
    echo
    echo "\`tests/gpu\`: $(tail -n 1 "$logs/tests")"
    echo
    echo "## Kernels with Llama-3-8B's shapes"
    echo
    cat "$logs/kernels" 2>/dev/null || echo "The bench failed."
    echo
    echo "## Machine code"
    echo
    cat "$logs/sass"
} >"$results"
echo "wrote $results"
exit $status
