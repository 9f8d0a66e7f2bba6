"""Generates python/loraserve/v1 from proto/, and with --check says whether it is up to date."""

import argparse
import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = "loraserve/v1/loraserve.proto"
STUBS = ("loraserve_pb2.py", "loraserve_pb2.pyi", "loraserve_pb2_grpc.py")

# protoc stamps its own version as the oldest runtime allowed, so fresh stubs would force the newest runtime
# on everyone. They use nothing that these older ones lack; pyproject.toml holds the same bounds.
OLDEST_GRPC = "1.68.0"
PROTOBUF_STAMP = re.compile(
    r"# Protobuf Python Version: .*\n"
    r"|from google\.protobuf import runtime_version as _runtime_version\n"
    r"|_runtime_version\.ValidateProtobufRuntimeVersion\([^)]*\)\n"
)
GRPC_STAMP = re.compile(r"(?<=GRPC_GENERATED_VERSION = )'\S+'")


def generate(into: Path) -> None:
    """Writes the stubs below `into`; raises RuntimeError when protoc refuses the proto file."""
    well_known = files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{well_known}", *outputs, PROTO])
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}")
    for name in STUBS:
        stub = into / "loraserve/v1" / name
        stub.write_text(without_stamps(stub.read_text()))


def without_stamps(stub: str) -> str:
    return GRPC_STAMP.sub(f"'{OLDEST_GRPC}'", PROTOBUF_STAMP.sub("", stub))


def outdated(package: Path) -> list[str]:
    """The names of stubs in `package` that differ from what the proto file generates."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = Path(scratch) / "loraserve/v1"
        return [name for name in STUBS if not _same_text(fresh / name, package / name)]


def _same_text(fresh: Path, committed: Path) -> bool:
    return committed.exists() and committed.read_text() == fresh.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a stub is stale")
    if not parser.parse_args().check:
        generate(ROOT / "python")
        return 0
    stale = outdated(ROOT / "python/loraserve/v1")
    if stale:
        print(f"out of date: {', '.join(stale)}; run scripts/generate_stubs.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
