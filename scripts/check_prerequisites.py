"""Says what this machine lacks for building loraserve; runs on any Python 3."""

import shutil
import sys

MIN_PYTHON = (3, 10)


def missing():
    if sys.version_info < MIN_PYTHON:
        found = f"{sys.version_info[0]}.{sys.version_info[1]}"
        yield f"Python 3.{MIN_PYTHON[1]} or newer (found {found}; pass PYTHON=python3.11 to make)"
    if not shutil.which("cargo"):
        yield "cargo, the Rust package manager (rustup.rs, or your distribution's package)"
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        yield "a C compiler (cc): install gcc or clang"
    try:
        import ensurepip  # noqa: F401, PLC0415
        import venv  # noqa: F401, PLC0415
    except ImportError:
        yield "Python's venv module (python3-venv on Debian)"


def main():
    problems = list(missing())
    for problem in problems:
        print(f"missing: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
