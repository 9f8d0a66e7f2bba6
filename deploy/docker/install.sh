#!/bin/sh
# Installs the wheel in WHEELS, with torch of an index (cpu, or cu128 for CUDA 12.8; default: pip's own), into a new
# environment at VENV: what the Dockerfile and `make package-check` run.
set -eu
if [ $# -lt 2 ]; then echo "usage: $0 WHEELS VENV [TORCH] [EXTRAS]" >&2 && exit 2; fi
wheel=$(ls "$1"/loraserve-*.whl)
python3 -m venv "$2"
if [ -n "${3:-}" ]; then
    "$2/bin/pip" install --quiet --no-cache-dir --index-url "https://download.pytorch.org/whl/$3" 'torch>=2.8'
fi
"$2/bin/pip" install --quiet --no-cache-dir "$wheel${4:-}"
