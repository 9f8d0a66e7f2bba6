#!/usr/bin/env bash
# Everything this repository can find out on a machine with an NVIDIA GPU, in one command: stages, each with a
# time limit of its own, the most telling first. A stage that fails or hangs stops itself, not the others; each
# writes its result into $OUT (default docs/gpu) when it has it, and summary.md there is a page about all.
#
#   scripts/gpu_check.sh                          where loraserve is installed, or with what `make gpu-kit` made
#   scripts/gpu_check.sh --rehearse               on the CUDA emulator, without the packages a GPU machine may lack
#   LORASERVE_GPU_STAGES="smoke engine" OUT=results PYTHON=/path/to/python scripts/gpu_check.sh
#
# `make gpu-kit` collects what a machine without network, cargo and some Python packages needs in .gpu-kit; where
# that folder is there, its wheels are installed into a temporary folder and used.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-docs/gpu}
stages=${LORASERVE_GPU_STAGES:-facts smoke tests kernels engine ncu sanitizer}
rehearse=$([ "${1:-}" = --rehearse ] && echo yes)
mkdir -p "$out"

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -d .gpu-kit ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .gpu-kit/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ -n "$rehearse" ]; then
    : "${LORASERVE_TEST_CUDA_EMULATOR:?set it to the folder with the libcuda.so.1 of the emulator}"
    export CUEMU_HOST_OK=1 CUEMU_INITCHECK=0
    mkdir "$site/absent"
    for package in pydantic fastapi uvicorn orjson httptools; do
        echo "import sys; sys.modules['$package'] = None"
    done >"$site/absent/sitecustomize.py"
    export PYTHONPATH="$site/absent${PYTHONPATH:+:$PYTHONPATH}"
else
    # An emulator or another NVRTC that the environment names would answer for the GPU.
    unset LORASERVE_TEST_CUDA_EMULATOR LORASERVE_TEST_NVRTC
    has_gpu='import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no NVIDIA GPU here")'
    if ! reason=$("$python" -c "$has_gpu" 2>&1); then
        echo "gpu_check: nothing was checked: $(tail -n 1 <<<"$reason")" >&2
        exit 1
    fi
fi
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
status=0

# stage NAME SECONDS FILE COMMAND…: what it prints goes to FILE
stage() {
    local name=$1 limit=$2 file=$out/$3 started=$SECONDS code result
    shift 3
    case " $stages " in *" $name "*) ;; *) return ;; esac
    echo "gpu_check: $name"
    timeout --kill-after=5 "$limit" "$@" >"$file" 2>&1
    code=$?
    case $code in
        0) result=ok ;;
        124 | 137) result="stopped after $limit s" ;;
        *) result="failed with status $code" ;;
    esac
    [ "$code" = 0 ] || status=1
    printf '| %s | %s | %d |\n' "$name" "$result" $((SECONDS - started)) >>"$site/stages"
    echo "gpu_check: $name: $result"
}

# An emulator takes many times as long as a GPU.
limit() { if [ -n "$rehearse" ]; then echo 3600; else echo "$1"; fi; }

# pytest's own settings turn warnings of other package versions into errors; parallel where xdist is there.
tests=("$python" -m pytest -W default -p no:cacheprovider)
has() { "$python" -c "import $1" 2>/dev/null; }
has pytest_timeout && tests+=(--timeout "$(limit 60)" --timeout-method thread) # a wait in the driver hears no signal
parallel=()
if has xdist; then parallel=(-n "$([ -n "$rehearse" ] && echo 2 || echo 8)" --dist worksteal); fi
# Eight processes with a thread per core each would mostly wait for one another.
in_parallel=(env OMP_NUM_THREADS=2)
profiled=("$python" benches/bench_gpu_kernels.py --once)
rehearsed=()
if [ -n "$rehearse" ]; then
    rehearsed=(--rehearse)
    profiled+=(--rehearse)
fi

facts() {
    # Tests load the emulator by its path, doctor looks where a driver would be.
    [ -z "$rehearse" ] || export LD_LIBRARY_PATH="$LORASERVE_TEST_CUDA_EMULATOR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    "$python" -m loraserve doctor || return
    [ -n "$rehearse" ] || { nvidia-smi && "$python" benches/gpu_facts.py; }
}
sanitized() { # stray accesses; then races in shared memory, where prefill's copies are asynchronous
    local check=(compute-sanitizer --error-exitcode 9 --target-processes all) ran=0
    local tests=("$python" -m pytest -W default -p no:cacheprovider -x --verbose)
    "${check[@]}" --tool memcheck "${tests[@]}" tests/gpu/test_step_graphs.py tests/gpu/test_lora_decode.py \
        -k 'replay or several_waves or graph or distinct' || ran=1
    "${check[@]}" --tool racecheck "${tests[@]}" tests/gpu/test_lora_prefill.py tests/gpu/test_lora_decode.py \
        -k 'several_waves or share_a_step' || ran=1
    return $ran
}
export -f facts sanitized
export python rehearse


stage facts "$(limit 60)" facts.txt bash -c facts
stage smoke "$(limit 90)" smoke.txt "${tests[@]}" -x tests/gpu/test_norm.py tests/gpu/test_lora_decode.py
stage tests "$(limit 200)" tests.txt "${in_parallel[@]}" "${tests[@]}" ${parallel[@]+"${parallel[@]}"} \
    --verbose --durations 10 -rsfE tests/gpu
stage kernels "$(limit 120)" kernels.md "$python" benches/bench_gpu_kernels.py ${rehearsed[@]+"${rehearsed[@]}"}
stage engine "$(limit 240)" engine.md "$python" benches/bench_gpu_engine.py ${rehearsed[@]+"${rehearsed[@]}"}
if [ -z "$rehearse" ]; then
    stage ncu 120 ncu.txt ncu --clock-control none --kernel-name 'regex:lora_|paged_attention' \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats \
        --section WarpStateStats "${profiled[@]}"
    stage sanitizer "$(limit 180)" sanitizer.txt bash -c sanitized
else
    stage ncu "$(limit 120)" ncu.txt "${profiled[@]}"
fi

{
    echo "# What a GPU says"
    echo
    commit=$(git rev-parse --short HEAD 2>/dev/null || echo "an unknown commit")
    echo "Written by \`scripts/gpu_check.sh\` on $(date -u +%Y-%m-%d) at $commit${rehearse:+, a rehearsal on the emulator}."
    echo
    echo "| stage | result | seconds |"
    echo "|---|---|---|"
    cat "$site/stages"
    echo
    echo '```'
    [ -f "$out/facts.txt" ] && tail -n 16 "$out/facts.txt"
    [ -f "$out/smoke.txt" ] && tail -n 3 "$out/smoke.txt"
    [ -f "$out/tests.txt" ] && grep -E '^(FAILED|ERROR)|passed|failed' "$out/tests.txt" | cut -c1-200 | tail -n 20
    [ -f "$out/sanitizer.txt" ] && grep -E 'ERROR SUMMARY|passed|failed' "$out/sanitizer.txt" | tail -n 3
    echo '```'
    [ -f "$out/engine.md" ] && sed -n '/^### Decode/,/^### Kernels/p' "$out/engine.md" | head -n 60
} >"$out/summary.md"
cat "$out/summary.md"
exit $status
