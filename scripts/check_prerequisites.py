"""Says what this machine lacks for building loraserve; runs on any Python 3."""

import re
import shutil
import subprocess
import sys

MIN_PYTHON = (3, 10)
MIN_RUST = (1, 89)


def missing():
    if sys.version_info < MIN_PYTHON:
        found = dotted(sys.version_info[:2])
        yield f"Python {dotted(MIN_PYTHON)} or newer (found {found}; try make PYTHON=python3.12)"
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        yield "a C compiler (cc): install gcc or clang"
    rust = rust_version()
    if rust is None:
        yield "cargo, the Rust package manager (rustup.rs, or your distribution's package)"
    elif rust < MIN_RUST:
        yield f"Rust {dotted(MIN_RUST)} or newer (found {dotted(rust)}; try rustup update)"
    if not has_venv():
        yield "Python's venv module (python3-venv on Debian)"


def rust_version():
    """(major, minor) of cargo, None if there is none."""
    if not shutil.which("cargo"):
        return None
    output = subprocess.run(["cargo", "--version"], stdout=subprocess.PIPE, check=False).stdout.decode()
    found = re.search(r"(\d+)\.(\d+)", output)
    return (int(found.group(1)), int(found.group(2))) if found else None


def has_venv():
    try:
        import ensurepip  # noqa: F401, PLC0415
        import venv  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True


def dotted(version):
    return ".".join(str(part) for part in version)


def main():
    problems = list(missing())
    for problem in problems:
        print(f"missing: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
