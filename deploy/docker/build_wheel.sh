#!/bin/sh
# Builds loraserve's wheel of SOURCE (a directory or an sdist) into OUT: what the Dockerfile and `make package-check` run.
set -eu
if [ $# != 2 ]; then echo "usage: $0 SOURCE OUT" >&2 && exit 2; fi
python3 -m venv "$2/build"
"$2/build/bin/pip" wheel --quiet --no-deps --wheel-dir "$2" "$1"
rm -rf "$2/build"
