#!/usr/bin/env bash
# Puts what a GPU machine without network and cargo needs into .gpu-kit: the wheel of this package, and those of its
# requirements that CUDA images tend to lack. The wheels run on Python 3.10 and later. scripts/gpu_check.sh uses them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rm -rf .gpu-kit
"$python" -m maturin build --release --quiet --out .gpu-kit
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi abi3 --abi none \
    --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    --dest .gpu-kit 'llguidance>=1.9,<2' 'grpcio-health-checking>=1.68' 'grpcio-reflection>=1.68'
du -sh .gpu-kit/*
