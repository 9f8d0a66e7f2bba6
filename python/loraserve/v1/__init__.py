"""Generated from proto/loraserve/v1 by scripts/generate_stubs.py."""
